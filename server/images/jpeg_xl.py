"""Lossless JPEG XL encoder, based on the optional package imagecodecs (libjxl)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.images.checks import check_pixels

_EFFORT = 1  # from 1 to 9; 1 is as fast as the PNG encoder, 2 needs more than ten times as long


def is_installed() -> bool:
    """Return whether imagecodecs is installed with JPEG XL; the first call imports it."""
    try:
        import imagecodecs
    except ImportError:
        return False
    return bool(imagecodecs.JPEGXL.available)


def encode_jxl(pixels: NDArray[np.uint8]) -> bytes:
    """Encode `pixels` [H, W, 3] uint8 losslessly as JPEG XL, which is sRGB unless it says otherwise.

    Raises:
        ValueError: the array is invalid, or a side is longer than 262144 pixels.
        ImportError: imagecodecs is not installed.
    """
    import imagecodecs

    check_pixels(pixels, "jxl")
    return bytes(imagecodecs.jpegxl_encode(pixels, lossless=True, effort=_EFFORT, numthreads=1))
