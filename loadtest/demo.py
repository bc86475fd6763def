"""`python -m loadtest.demo`: decode a photo's latent on a server with the bundled decoder and save a comparison."""

from __future__ import annotations

import http.client
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save
from torch import Tensor

from engines.bundled import dct
from engines.bundled.decoder import PHOTO, read_photo
from engines.cli import ArgumentParser
from engines.errors import DecodeError, PidError
from engines.pixels import from_uint8, to_uint8
from loadtest.processes import decode_server, running

TIMEOUT_SECONDS = 300.0
_DETAIL, _ENLARGEMENT = 96, 2  # side of a detail in pixels, and the factor by which it is enlarged
_MARGIN, _CAPTION = 6, 28  # pixels between the cells of the sheet, and above them


@dataclass(frozen=True)
class Decoded:
    """A response of the server."""

    png: bytes
    seconds: float  # from sending the request to the last byte
    timing: str  # Server-Timing header: durations of the stages


def photo_latent(photo: Tensor) -> Tensor:
    """Return the latent [16, H/16, W/16] of a photo [3, H, W] in the space `dct`."""
    return dct.encode(dct.downscale(photo[None]))[0]


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


def comparison(photo: Tensor, decoded: Image.Image) -> Image.Image:
    """Draw two enlarged details of a photo [3, H, W] in [-1, 1] next to those of its latent and of the decoded image.

    The first detail is where decoding restores most of what the latent lacks, the second where the latent lacks most.
    Each row has the whole decoded image with the detail outlined, and then the detail four times: in the low-resolution
    image of the latent, in that image enlarged bicubically, in the decoded image, and in the photo.
    """
    original = photo[None]
    low = dct.decode(dct.encode(dct.downscale(original)))  # [1, 3, H/4, W/4]
    size = (decoded.height, decoded.width)
    bicubic = F.interpolate(low, size, mode="bicubic", antialias=False)
    missing = _error(bicubic, original)  # [1, 1, H, W]
    restored = missing - _error(from_uint8(torch.from_numpy(np.array(decoded)))[None], original)
    versions = {
        "latent": _to_image(F.interpolate(low, size, mode="nearest")),
        "bicubic": _to_image(bicubic),
        "decoded": decoded,
        "original": _to_image(original),
    }
    cell = _DETAIL * _ENLARGEMENT
    sheet = Image.new("RGB", (5 * (cell + _MARGIN) + _MARGIN, 2 * (cell + _MARGIN) + _CAPTION), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for column, caption in enumerate(("the decoded image", *versions)):
        draw.text((_MARGIN + column * (cell + _MARGIN), 5), caption, fill="black", font=font)
    for row, window in enumerate((_highest(restored), _highest(missing))):
        cells = [_outlined(decoded, window)]
        cells += [image.crop(window).resize((cell, cell), Image.Resampling.NEAREST) for image in versions.values()]
        for column, image in enumerate(cells):
            sheet.paste(image, (_MARGIN + column * (cell + _MARGIN), _CAPTION + row * (cell + _MARGIN)))
    return sheet


def _error(image: Tensor, original: Tensor) -> Tensor:
    """Return the squared error of the brightness of images [1, 3, H, W], [1, 1, H, W]."""
    return (image - original).mean(1, keepdim=True).square()


def _highest(score: Tensor) -> tuple[int, int, int, int]:
    """Return the window (left, top, right, bottom) with the highest mean of a score [1, 1, H, W]."""
    means = F.avg_pool2d(score, _DETAIL, stride=1)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return left, top, left + _DETAIL, top + _DETAIL


def _outlined(image: Image.Image, window: tuple[int, int, int, int]) -> Image.Image:
    """Return `image` at the size of an enlarged detail or smaller, with an outline around `window`."""
    small = image.copy()
    ImageDraw.Draw(small).rectangle(window, outline="white", width=4)
    small.thumbnail((_DETAIL * _ENLARGEMENT,) * 2, Image.Resampling.LANCZOS)
    return small


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
    photo = read_photo(options.photo)
    latent = photo_latent(photo)
    print("starting the server; the first start compiles the PNG encoder", flush=True)
    server = decode_server(options.bundle, ["--drain-delay", "0", "--log-level", "warning"])
    try:
        with running(server):
            decoded = decode(server.port, latent, options.seed)
    except PidError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    image = Image.open(io.BytesIO(decoded.png))
    comparison(photo, image).save(options.output)
    print(
        f"decoded a latent of {'×'.join(map(str, latent.shape))} to {image.width}×{image.height} pixels "
        f"in {1000 * decoded.seconds:.0f} ms ({decoded.timing})\nwrote {options.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
