"""Images as arrays of numbers, without compression: the pixels of an npy file, and planes of float16."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from typing import Final, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

Range = Literal["signed", "unit"]

FLOAT16: Final = np.dtype("<f2")
_CHUNK = 2**18  # elements converted at once; NumPy makes 8-byte indices of them


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return everything before the elements of an npy file with a uint8 array of this shape, in C order."""
    out = io.BytesIO()
    npy.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue()


def planes(pixels: NDArray[np.uint8], values: Range) -> Iterator[bytes]:
    """Yield the elements of `pixels` [H, W, 3] as float16 [3, H, W], little-endian, in C order.

    A value x of `pixels` becomes x / 127.5 - 1 for "signed", and x / 255 for "unit". The rounding to float16 is so
    small that the opposite conversion, rounded to integers, gives x again.
    """
    table = _table(values)
    height, width, channels = pixels.shape
    rows = max(1, _CHUNK // width)
    for channel in range(channels):
        for start in range(0, height, rows):
            yield table.take(pixels[start : start + rows, :, channel]).tobytes()


@cache
def _table(values: Range) -> NDArray[np.float16]:
    """Return the float16 of each of the 256 values of a pixel."""
    x = np.arange(256, dtype=np.float64)
    return (x / 127.5 - 1 if values == "signed" else x / 255).astype(FLOAT16)
