"""Checks of images that are about to be encoded, and the largest images that formats support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from server.images.formats import OutputFormat

# Longest side in pixels; formats that are not listed have no limit. libavif can encode AVIF with sides of 65536 pixels,
# but not decode it. The limit of JPEG XL is that of level 5 of the standard, which every decoder supports.
MAX_SIDE: Final[Mapping[OutputFormat, int]] = {
    "png": 2**31 - 1,
    "webp": 16_383,
    "jpeg": 65_535,
    "avif": 32_768,
    "jxl": 262_144,
}


def check_size(width: int, height: int, image_format: OutputFormat) -> None:
    """Raise ValueError if `image_format` does not support an image of this size."""
    limit = MAX_SIDE.get(image_format)
    if min(width, height) < 1 or (limit is not None and max(width, height) > limit):
        raise ValueError(
            f"The format {image_format} supports 1 to {limit} pixels per side, not {width} x {height}; "
            "use PNG or a smaller image."
        )


def check_pixels(pixels: NDArray[np.uint8], image_format: OutputFormat) -> None:
    """Raise ValueError if `pixels` is not an array [H, W, 3] uint8 whose size `image_format` supports."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be uint8 [height, width, 3], not {pixels.dtype} {pixels.shape}.")
    height, width, _ = pixels.shape
    check_size(width, height, image_format)
