"""Compiled row filter and checksum of the PNG encoder (PNG specification, third edition, clause 9; RFC 1950).

The inner loops compute in uint8, so that they vectorise to the full width.
"""

from __future__ import annotations

import numpy as np

from server.images.numba_kernel import kernel

_PAETH = 4
_U8, _U16, _U64 = np.uint8, np.uint16, np.uint64


@kernel
def paeth(rows: np.ndarray, above: np.ndarray, filtered: np.ndarray) -> None:
    """Filter `rows` [n, B] uint8, below the row `above` [B], into `filtered` [n * (1 + B)] with type 4 (Paeth).

    Predictions use raw pixels, so they are independent of each other. With pa = |b - c| and pb = |a - c|, the third
    distance pc is pa + pb if a and b lie on the same side of c, and so never the smallest; otherwise it is |pa - pb|.
    All of them fit into a byte.
    """
    n, size = rows.shape
    for y in range(n):
        row = rows[y]
        up = rows[y - 1] if y else above
        line = filtered[y * (size + 1) : (y + 1) * (size + 1)]
        line[0] = _PAETH
        for x in range(3):
            line[x + 1] = row[x] - up[x]
        for x in range(size - 3):
            a, b, c = row[x], up[x + 3], up[x]
            pa = _U8(b - c) if b > c else _U8(c - b)
            pb = _U8(a - c) if a > c else _U8(c - a)
            pc = _U8(max(pa, pb) - min(pa, pb))
            side = a if pa <= pb else b
            between = c if pc < min(pa, pb) else side
            line[x + 4] = row[x + 3] - (between if (b < c) != (a < c) else side)


@kernel
def adler32(data: np.ndarray) -> np.uint64:
    """Return the Adler-32 (RFC 1950) of `data` [n] uint8.

    Bytes are summed in groups of 256, so that their position weights are applied once per 65536 bytes.
    """
    low, high = _U64(1), _U64(0)
    columns = np.empty(256, np.uint16)  # sums of 256 bytes just fit
    for start in range(0, len(data), 65_536):
        stop = min(start + 65_536, len(data))
        columns[:] = 0
        for at in range(start, stop, 256):
            group = data[at : min(at + 256, stop)]
            total = _U64(0)
            for value in group:
                total += _U64(value)
            for i in range(len(group)):
                columns[i] = columns[i] + group[i]
            high += _U64(len(group)) * (low + total)
            low += total
        for i in range(256):
            high -= _U64(i) * _U64(columns[i])
        low, high = low % _U64(65_521), high % _U64(65_521)
    return (high << _U64(16)) | low
