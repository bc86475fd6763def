"""Formats of a decoded image: those that clients choose by name, and those that only some protocols produce."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

# Values of the option `format`; some need optional packages, see available.py. raw and npy are the pixels,
# uint8 [H, W, 3]; npy has a header of NumPy.
ImageFormat = Literal["png", "webp", "jpeg", "avif", "jxl", "raw", "npy"]
# planes-signed and planes-unit are float16 [3, H, W], little-endian, with values in [-1, 1] and in [0, 1].
OutputFormat = Literal[ImageFormat, "planes-signed", "planes-unit"]

IMAGE_FORMATS: Final[tuple[ImageFormat, ...]] = get_args(ImageFormat)  # most preferred first
OUTPUT_FORMATS: Final[tuple[OutputFormat, ...]] = get_args(OutputFormat)

ALIASES: Final[Mapping[str, ImageFormat]] = {"jpg": "jpeg"}  # other names of formats

MEDIA_TYPES: Final[Mapping[OutputFormat, str]] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "avif": "image/avif",
    "jxl": "image/jxl",
    "raw": "application/octet-stream",
    "npy": "application/x-npy",
    "planes-signed": "application/octet-stream",
    "planes-unit": "application/octet-stream",
}
