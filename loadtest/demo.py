"""`python -m loadtest.demo`: decode a photo's latent on a server with the bundled decoder and save a comparison."""

from __future__ import annotations

import http.client
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save
from torch import Tensor

from engines.bundled import dct
from engines.bundled.decoder import PHOTO, read_photo
from engines.cli import ArgumentParser
from engines.errors import DecodeError, PidError
from engines.pixels import to_uint8
from loadtest.processes import decode_server, running

TIMEOUT_SECONDS = 300.0
_MARGIN, _CAPTION = 12, 28  # pixels around the panels, and above them


@dataclass(frozen=True)
class Decoded:
    """A response of the server."""

    png: bytes
    seconds: float  # from sending the request to the last byte
    timing: str  # Server-Timing header: durations of the stages


def photo_latent(path: Path) -> Tensor:
    """Read a photo [H, W] and return its latent [16, H/16, W/16] in the space `dct`."""
    return dct.encode(dct.downscale(read_photo(path)[None]))[0]


def decode(port: int, latent: Tensor, seed: int) -> Decoded:
    """Decode `latent` on the server at `port` of this machine.

    Raises:
        DecodeError: The server returned an error.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    body, headers = save({"latent": latent.half()}), {"Content-Type": "application/x-safetensors"}
    began = time.perf_counter()
    connection.request("POST", f"/decode?seed={seed}", body, headers)
    response = connection.getresponse()
    data = response.read()
    seconds = time.perf_counter() - began
    connection.close()
    if response.status != 200:
        raise DecodeError(f"The server returned status {response.status}: {data.decode(errors='replace')}")
    return Decoded(data, seconds, response.headers["Server-Timing"])


def comparison(latent: Tensor, decoded: Image.Image) -> Image.Image:
    """Draw the low-resolution image of `latent` enlarged, enlarged bicubically, and decoded, side by side."""
    low = dct.decode(latent[None])  # [1, 3, H/4, W/4]
    size = (decoded.height, decoded.width)
    panels = {
        "latent, enlarged": _to_image(F.interpolate(low, size, mode="nearest")),
        "bicubic": _to_image(F.interpolate(low, size, mode="bicubic", antialias=False)),
        "decoded": decoded,
    }
    width = len(panels) * (decoded.width + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, decoded.height + _CAPTION + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for i, (caption, panel) in enumerate(panels.items()):
        x = _MARGIN + i * (decoded.width + _MARGIN)
        draw.text((x, 5), caption, fill="black", font=font)
        sheet.paste(panel, (x, _CAPTION))
    return sheet


def _to_image(pixels: Tensor) -> Image.Image:
    """Convert [1, 3, H, W] in [-1, 1] to an image."""
    return Image.fromarray(to_uint8(pixels[0]).permute(1, 2, 0).numpy())


def main(arguments: Sequence[str]) -> int:
    """Run the demo; return the exit status."""
    parser = ArgumentParser(
        prog="python -m loadtest.demo",
        usage="%(prog)s --bundle DIR [options]",
        description="Decode a photo's latent on a server with the bundled decoder, and save a comparison.",
    )
    add = parser.add_argument
    add("--bundle", type=Path, required=True, metavar="DIR", help="bundle of the decoder dct-demo (required)")
    add(
        "--photo",
        type=Path,
        default=PHOTO,
        metavar="FILE",
        help="image in one of the decoder's sizes, such as 512x512 (default: the bundled photo)",
    )
    add(
        "--output",
        type=Path,
        default=Path("demo.png"),
        metavar="FILE",
        help="image to write (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of the decoder's noise (default: %(default)s)")
    options = parser.parse_args(arguments)
    latent = photo_latent(options.photo)
    print("starting the server; the first start compiles the PNG encoder", flush=True)
    server = decode_server(options.bundle, ["--drain-delay", "0", "--log-level", "warning"])
    try:
        with running(server):
            decoded = decode(server.port, latent, options.seed)
    except PidError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    image = Image.open(io.BytesIO(decoded.png))
    comparison(latent, image).save(options.output)
    print(
        f"decoded a latent of {'×'.join(map(str, latent.shape))} to {image.width}×{image.height} pixels "
        f"in {1000 * decoded.seconds:.0f} ms ({decoded.timing})\nwrote {options.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
