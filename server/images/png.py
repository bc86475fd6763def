"""PNG encoder that splits an RGB image into strips of rows, so that encoding is parallel and can start early.

A strip becomes one IDAT chunk and depends only on the row above it. Threads encode several strips at once, and a server
sends `png_head`, the strips' data in order as they finish, and `png_tail`. The chunks form one zlib stream, because
each ends on a byte boundary and contains no references to earlier chunks.

Formats: PNG specification (third edition), zlib (RFC 1950), deflate (RFC 1951).
"""

from __future__ import annotations

import itertools
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from server.images import png_deflate, png_filters
from server.images.numba_kernel import warn_about_cache

Compression = Literal["fast", "best", "none"]
Bytes = NDArray[np.uint8]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_SIDE = 2**31 - 1
_ADLER_MODULUS = 65_521
_STORED_BYTES = 65_535  # maximum size of a stored block
_ZLIB_HEADER = b"\x78\x01"
_FINAL_BLOCK = b"\x03\x00"  # empty, fixed codes
_STRIP_BYTES = 800_000  # smaller strips lose more to GIL hand-over than they gain in cache locality
_FIRST_ROWS, _MAX_ROWS = 32, 128


class Checksum(NamedTuple):
    """Adler-32 of a strip's filtered bytes, and the number of these bytes."""

    adler: int
    length: int


@dataclass(frozen=True, slots=True)
class Strip:
    """A strip of rows as one complete IDAT chunk, and the checksum that `png_tail` needs."""

    data: bytes
    checksum: Checksum


def strip_bounds(width: int, height: int) -> list[tuple[int, int]]:
    """Split `height` rows into strips (start, stop); the first is short, so that it can be sent early."""
    rows = min(max(_STRIP_BYTES // (1 + 3 * width), 8), _MAX_ROWS)
    edges = [0, *range(min(_FIRST_ROWS, rows), height, rows), height]
    return list(itertools.pairwise(edges))


def png_head(width: int, height: int, text: Mapping[str, str] | None = None) -> bytes:
    """Return everything before the first strip of an 8-bit sRGB image.

    `text` becomes tEXt chunks, or iTXt chunks for values that are not Latin-1.

    Raises:
        ValueError: PNG does not support the size, a keyword or a value.
    """
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise ValueError(f"PNG supports 1 to {MAX_SIDE} pixels per side, not {width} x {height}.")
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, deflate, filters, not interlaced
    chromaticities = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)  # white, red, green, blue of sRGB
    return b"".join(
        (
            SIGNATURE,
            _chunk(b"IHDR", header),
            _chunk(b"gAMA", struct.pack(">I", 45455)),  # gAMA and cHRM are for decoders that ignore sRGB
            _chunk(b"cHRM", struct.pack(">8I", *chromaticities)),
            _chunk(b"sRGB", b"\0"),  # perceptual
            *(_text_chunk(keyword, value) for keyword, value in (text or {}).items()),
        )
    )


def encode_strip(rows: Bytes, above: Bytes | None, compression: Compression = "fast") -> Strip:
    """Encode the contiguous strip `rows` [n, W, 3] uint8; `above` [W, 3] is the row above it, None for the first strip.

    "fast" applies the Paeth filter to every row and codes the result with Huffman codes; "best" also tries zlib's
    string matching, slowly; "none" stores the rows. Strips can be encoded on any threads in any order, with identical
    results; the expensive parts run without the GIL.

    Raises:
        ValueError: an array has another shape, dtype or layout, or the compression is unknown.
    """
    _check(rows, above, compression)
    n, width, _ = rows.shape
    scratch = _scratch.of_size(n * (1 + 3 * width))
    lines = _writeable(rows).reshape(n, -1)
    up = np.zeros(3 * width, np.uint8) if above is None else _writeable(above).reshape(-1)
    if compression == "none":
        filtered = scratch.filtered.reshape(n, -1)
        filtered[:, 0] = 0
        filtered[:, 1:] = lines
        body: bytes | memoryview = _store(scratch.filtered)
    else:
        png_filters.paeth(lines, up, scratch.filtered)
        body = _deflate(scratch)
        if compression == "best":
            body = _best(scratch.filtered, bytes(body))
    checksum = Checksum(int(png_filters.adler32(scratch.filtered)), scratch.filtered.size)
    return Strip(_chunk(b"IDAT", _ZLIB_HEADER if above is None else b"", body), checksum)


def png_tail(checksums: Iterable[Checksum]) -> bytes:
    """Return everything after the last strip: the end of the zlib stream with its Adler-32, and IEND.

    `checksums` are those of all strips in order.
    """
    low, high = 1, 0
    for adler, length in checksums:
        high = (high + (adler >> 16) + length * (low - 1)) % _ADLER_MODULUS
        low = (low + (adler & 0xFFFF) - 1) % _ADLER_MODULUS
    return _chunk(b"IDAT", _FINAL_BLOCK, struct.pack(">HH", high, low)) + _chunk(b"IEND")


def encode(pixels: Bytes, text: Mapping[str, str] | None = None, compression: Compression = "fast") -> bytes:
    """Encode `pixels` [H, W, 3] uint8 as a complete PNG on the calling thread."""
    _check(pixels, None, compression)
    height, width, _ = pixels.shape
    strips = [
        encode_strip(pixels[start:stop], pixels[start - 1] if start else None, compression)
        for start, stop in strip_bounds(width, height)
    ]
    head, tail = png_head(width, height, text), png_tail(strip.checksum for strip in strips)
    return b"".join((head, *(strip.data for strip in strips), tail))


def warm_up() -> None:
    """Compile the kernels, or load them from numba's cache, before the first request needs them."""
    for compression in get_args(Compression):
        encode(np.zeros((2, 40, 3), np.uint8), compression=compression)
    warn_about_cache()


def _check(rows: Bytes, above: Bytes | None, compression: str) -> None:
    if compression not in get_args(Compression):
        raise ValueError(f"compression must be one of {', '.join(get_args(Compression))}, not {compression!r}.")
    if rows.dtype != np.uint8 or rows.ndim != 3 or rows.shape[2] != 3 or rows.size == 0:
        raise ValueError(f"pixels must be non-empty uint8 [rows, width, 3], not {rows.dtype} {rows.shape}.")
    if above is not None and (above.dtype != np.uint8 or above.shape != rows.shape[1:]):
        raise ValueError(f"The row above must be uint8 {rows.shape[1:]}, not {above.dtype} {above.shape}.")
    if not rows.flags.c_contiguous or not (above is None or above.flags.c_contiguous):
        raise ValueError("pixels must be C-contiguous; use numpy.ascontiguousarray.")


def _writeable(array: Bytes) -> Bytes:
    """Return `array`, or a writeable copy, as numba would compile the kernels again for read-only arrays."""
    return array if array.flags.writeable else array.copy()


class _Scratch(threading.local):
    """Working memory of a thread, as large as the largest strip it has encoded."""

    def __init__(self) -> None:
        self.pairs = np.empty(65_536, np.uint32)
        self._capacity = -1

    def of_size(self, size: int) -> _Scratch:
        """Return this object with room for a strip of `size` filtered bytes, viewed as `filtered`."""
        if size > self._capacity:
            self._capacity = size
            self._filtered = np.empty(size // 8 + 1, np.uint64)  # words, for alignment
            self.words = np.empty(size // 8 + 10, np.uint64)
            self.runs = np.empty((size // 16 + 1, 2), np.int64)
        self.filtered = self._filtered.view(np.uint8)[:size]
        return self


_scratch = _Scratch()


def _deflate(scratch: _Scratch) -> bytes | memoryview:
    """Compress the filtered bytes, or store them if that is smaller; the result may be a view of `scratch`."""
    written = png_deflate.deflate(scratch.filtered, scratch.runs, scratch.pairs, scratch.words)
    return scratch.words.view(np.uint8)[:written].data if written else _store(scratch.filtered)


def _best(filtered: Bytes, fast: bytes) -> bytes:
    """Return the smallest of `fast` and zlib's results at level 9, which also end on a byte boundary."""
    candidates = [fast]
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED):
        deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
        candidates.append(deflater.compress(filtered.data) + deflater.flush(zlib.Z_FULL_FLUSH))
    return min(candidates, key=len)


def _store(data: Bytes) -> bytes:
    pieces = [data[at : at + _STORED_BYTES] for at in range(0, data.size, _STORED_BYTES)]
    return b"".join(
        part for piece in pieces for part in (struct.pack("<BHH", 0, piece.size, piece.size ^ 0xFFFF), piece.data)
    )


def _chunk(kind: bytes, *parts: bytes | memoryview) -> bytes:
    crc = zlib.crc32(kind)
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join((struct.pack(">I", sum(map(len, parts))), kind, *parts, struct.pack(">I", crc)))


def _text_chunk(keyword: str, value: str) -> bytes:
    try:
        key = keyword.encode("latin-1")
    except UnicodeEncodeError:
        key = b""
    printable = all(32 <= byte <= 126 or byte >= 161 for byte in key)
    if not 1 <= len(key) <= 79 or not printable or b"  " in key or key != key.strip(b" "):
        raise ValueError(
            "A PNG text keyword must be 1 to 79 printable Latin-1 characters without leading, trailing or double "
            f"spaces, not {keyword!r}."
        )
    if "\0" in value:
        raise ValueError(f"The PNG text of {keyword!r} must not contain the character NUL.")
    try:
        return _chunk(b"tEXt", key, b"\0", value.encode("latin-1"))
    except UnicodeEncodeError:  # uncompressed, without language tag or translated keyword
        return _chunk(b"iTXt", key, b"\0\0\0\0\0", value.encode("utf-8"))
