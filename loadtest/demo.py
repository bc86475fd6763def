"""`make demo`: start the server on the bundled decoder, send it the latent of a photo, show what comes back."""

from __future__ import annotations

import argparse
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save
from torch import Tensor

from engines.bundled import dct
from engines.bundled.decoder import PHOTO, read_photo
from engines.pixels import to_uint8

READY_SECONDS = 300.0  # a first start compiles the PNG encoder
_MARGIN, _CAPTION = 12, 28  # pixels around and above the panels


def photo_latent(path: Path) -> Tensor:
    """The photo a quarter the size, as the 16 numbers a block that a diffusion model would hand over: [16, h, w]."""
    return dct.encode(dct.downscale(read_photo(path)[None]))[0]


@contextmanager
def running_server(bundle: Path) -> Iterator[str]:
    """A server on a free port of this machine, ready; gone when the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server", "--bundle", str(bundle), "--port", str(port)]
    process = subprocess.Popen([*command, "--drain-delay", "0", "--log-level", "warning"])  # noqa: S603
    try:
        _wait_until_ready(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + READY_SECONDS
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise SystemExit("demo: the server ended before it was ready; its own words are above.")
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise SystemExit(f"demo: the server was not ready after {READY_SECONDS:g} s.")


def decode(url: str, latent: Tensor, seed: int) -> tuple[bytes, float, str]:
    """The PNG, the seconds until its last byte, and what the server says of the stages."""
    began = time.perf_counter()
    answer = httpx.post(
        f"{url}/decode",
        content=save({"latent": latent.half()}),
        headers={"Content-Type": "application/x-safetensors"},
        params={"seed": seed},
        timeout=READY_SECONDS,
    )
    answer.raise_for_status()
    return answer.content, time.perf_counter() - began, answer.headers["server-timing"]


def panels(latent: Tensor, decoded: Image.Image) -> Image.Image:
    """What the latent holds enlarged, a bicubic enlargement of it, and the decoded picture, side by side."""
    low = dct.decode(latent[None])  # [1, 3, H/4, W/4]
    size = (decoded.height, decoded.width)
    pictures = {
        "latent, enlarged": _to_image(F.interpolate(low, size, mode="nearest")),
        "bicubic": _to_image(F.interpolate(low, size, mode="bicubic", antialias=False)),
        "decoded": decoded,
    }
    width = len(pictures) * (decoded.width + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, decoded.height + _CAPTION + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for i, (caption, picture) in enumerate(pictures.items()):
        x = _MARGIN + i * (decoded.width + _MARGIN)
        draw.text((x, 5), caption, fill="black", font=font)
        sheet.paste(picture, (x, _CAPTION))
    return sheet


def _to_image(picture: Tensor) -> Image.Image:
    """[1, 3, H, W] in [-1, 1] to a picture."""
    return Image.fromarray(to_uint8(picture[0]).permute(1, 2, 0).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.demo", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="bundle of the decoder that ships with the project")
    parser.add_argument("--photo", type=Path, default=PHOTO, help="picture with sides that are multiples of 16")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="where to write the comparison")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    latent = photo_latent(arguments.photo)
    print("starting the server on the bundled decoder; the first time, the PNG encoder is compiled", flush=True)
    with running_server(arguments.bundle) as url:
        data, seconds, timing = decode(url, latent, arguments.seed)
    image = Image.open(io.BytesIO(data))
    panels(latent, image).save(arguments.output)
    print(
        f"decoded a latent of {'×'.join(map(str, latent.shape))} to {image.width}×{image.height} pixels "
        f"in {1000 * seconds:.0f} ms ({timing})\nwrote {arguments.output}"
    )


if __name__ == "__main__":
    main()
