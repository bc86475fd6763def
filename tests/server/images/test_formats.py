"""Encodings: what is known about an encoded image before, during and after its encoding."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from engines.size import Size
from server.images.available import available_formats
from server.images.encoder import Encoder
from server.images.encoding import EncodeProgress, Encoding
from server.images.formats import MEDIA_TYPES, OUTPUT_FORMATS, OutputFormat
from server.stream import ImageStream
from tests.server.images.decoding import decode

SIZE = Size(300, 64)
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)  # four strips
FIRST_STRIP = 32  # rows
ARRAYS = ("raw", "npy", "planes-signed", "planes-unit")
STRIPED = ("png", "raw", "npy")
AVAILABLE = (*available_formats(), "planes-signed", "planes-unit")
LIMIT = 60.0


class LateRows:
    """Rows of which the first strip arrives only when `first` is set, and the last row when `last` is set."""

    def __init__(self) -> None:
        self.pixels = PIXELS
        self.first, self.last = threading.Event(), threading.Event()

    def wait(self, stop: int) -> None:
        if stop == FIRST_STRIP:
            assert self.first.wait(LIMIT)
        if stop == SIZE.height:
            assert self.last.wait(LIMIT)

    def close(self) -> None:
        self.pixels = np.zeros_like(PIXELS)  # the buffer is used for another image


class Encoded:
    """An image that two threads encode from `rows`."""

    def __init__(self, image_format: OutputFormat) -> None:
        self.rows, self.done = LateRows(), threading.Event()  # done: all strips but the first are encoded
        encoding = Encoding(image_format, quality=100)
        self.stream = ImageStream(
            0, encoding.media_type, content_length=encoding.content_length(SIZE), shape=encoding.shape(SIZE)
        )
        self.encoder = Encoder(2)
        self.encoder.start()
        self.encoder.encode(self.rows, self.stream, encoding, report=self._report)

    def _report(self, progress: EncodeProgress) -> None:
        if progress.done >= 1 - FIRST_STRIP / SIZE.height:
            self.done.set()

    async def rest(self) -> bytes:
        """Return the bytes that have not been read yet."""
        chunks = []
        while (chunk := await self.stream.chunk()) is not None:
            chunks.append(chunk)
        return b"".join(chunks)


@pytest.mark.parametrize("image_format", STRIPED)
def test_strips_that_finish_in_another_order_are_sent_in_image_order(image_format: OutputFormat):
    async def test() -> None:
        encoded = Encoded(image_format)
        encoded.rows.last.set()
        assert await asyncio.to_thread(encoded.done.wait, LIMIT)
        assert encoded.stream.pushed == 0
        encoded.rows.first.set()
        assert np.array_equal(decode(await encoded.rest(), image_format, SIZE), PIXELS)
        encoded.encoder.close()

    asyncio.run(test())


@pytest.mark.parametrize("image_format", STRIPED)
def test_the_first_strip_can_be_read_before_the_last_rows_arrive(image_format: OutputFormat):
    async def test() -> None:
        encoded = Encoded(image_format)
        encoded.rows.first.set()
        first = await asyncio.wait_for(encoded.stream.chunk(), LIMIT)
        encoded.rows.last.set()
        assert np.array_equal(decode(first + await encoded.rest(), image_format, SIZE), PIXELS)
        encoded.encoder.close()

    asyncio.run(test())


@pytest.mark.parametrize("image_format", AVAILABLE)
def test_the_content_length_is_right_when_the_first_chunk_can_be_read(image_format: OutputFormat):
    async def test() -> None:
        encoded = Encoded(image_format)
        assert (encoded.stream.content_length is not None) == (image_format in ARRAYS)
        encoded.rows.first.set()
        encoded.rows.last.set()
        first = await asyncio.wait_for(encoded.stream.chunk(), LIMIT)
        length = encoded.stream.content_length
        data = first + await encoded.rest()
        assert length == (None if image_format == "png" else len(data))
        assert encoded.stream.pushed == len(data)
        encoded.encoder.close()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("image_format", "shape", "dtype"),
    [
        ("png", None, None),
        ("webp", None, None),
        ("raw", (300, 64, 3), "uint8"),
        ("npy", (300, 64, 3), "uint8"),
        ("planes-signed", (3, 300, 64), "float16"),
        ("planes-unit", (3, 300, 64), "float16"),
    ],
)
def test_arrays_have_a_shape_and_a_dtype(image_format: OutputFormat, shape: tuple[int, ...], dtype: str):
    encoding = Encoding(image_format)
    assert (encoding.shape(SIZE), encoding.dtype) == (shape, dtype)


def test_no_uncompressed_image_is_larger_than_the_bytes_that_are_reserved_for_it():
    for image_format in OUTPUT_FORMATS:
        encoding = Encoding(image_format)
        assert encoding.held_bytes(SIZE) >= max(3 * SIZE.area, encoding.content_length(SIZE) or 0)
    assert Encoding("planes-unit").held_bytes(SIZE) == 6 * SIZE.area


def test_formats_that_differ_only_in_the_header_or_in_values_share_their_cost():
    assert Encoding("raw").kind == Encoding("npy").kind
    assert Encoding("planes-signed").kind == Encoding("planes-unit").kind


def test_every_format_has_a_media_type():
    assert set(MEDIA_TYPES) == set(OUTPUT_FORMATS)
