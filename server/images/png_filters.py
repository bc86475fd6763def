"""Row filters and checksum of the PNG encoder, compiled (PNG specification, third edition, clause 9; RFC 1950).

Bytes stay bytes in the inner loops, so that they vectorise to the full width.
"""

from __future__ import annotations

import numpy as np

from server.images.numba_kernel import kernel

_PAETH = 4
_U8, _U16, _U64 = np.uint8, np.uint16, np.uint64


@kernel
def paeth(rows: np.ndarray, above: np.ndarray, filtered: np.ndarray) -> None:
    """Filter `rows` [n, B] uint8 below `above` [B] into `filtered` [n * (1 + B)], every row with type 4 (Paeth).

    Predictions come from raw pixels, so none waits for another. With pa = |b - c| and pb = |a - c|, the third distance
    is pa + pb where b and a lie on one side of c, so never the least, and |pa - pb| elsewhere: bytes are wide enough.
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
    """Adler-32 (RFC 1950) of `data` uint8 [n], by groups of 256 bytes so that the position weights are summed once."""
    low, high = _U64(1), _U64(0)
    columns = np.empty(256, np.uint16)  # 256 groups of bytes below 256 just fit
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
