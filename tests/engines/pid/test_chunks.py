"""Chunks of the pixel blocks: their sizes for the released decoders and in general, and how a function is applied."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.pid import FoldedDecoder, released
from engines.pid.chunks import chunk_length, chunks, in_chunks
from engines.pid.config import PATCH_PIXELS
from engines.pid.released import released_names
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import Size

SIZES = {Size(1024, 1024)} | {size for name in released_names() for size in released(name).sizes}
NO_MULTIPLE_OF_128 = {Size(2304, 1728), Size(1728, 2304), Size(3840, 2880), Size(2880, 3840)}
# The only multiple of 128 within the budget is 128, at most half of what would fit.
TOO_SMALL_MULTIPLE_OF_128 = {(size, batch) for size in (Size(3840, 2176), Size(2176, 3840)) for batch in (3, 4)}


def sizes_of_chunks(length: int, chunk: int) -> list[int]:
    return [piece.shape[1] for (piece,) in chunks(-(-length // chunk), torch.empty(1, length, 1, device="meta"))]


@pytest.fixture(scope="module")
def decoder() -> FoldedDecoder:
    with torch.device("meta"):
        return FoldedDecoder(released("flux-2kto4k-v1.5").config, MODEL_TIMESTEPS).to(torch.bfloat16)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("size", sorted(SIZES), ids=str)
def test_released_sizes_are_divided_into_equal_chunks(decoder: FoldedDecoder, size: Size, batch: int):
    tokens = size.area // PATCH_PIXELS
    chunk = decoder.chunk_tokens(batch, tokens)
    assert len(set(sizes_of_chunks(tokens, chunk))) == 1
    limit = 1024 // batch  # tokens
    assert limit / 2 < chunk <= limit
    if size not in NO_MULTIPLE_OF_128 and (size, batch) not in TOO_SMALL_MULTIPLE_OF_128:
        assert chunk % 128 == 0


@given(length=st.integers(1, 2**16), limit=st.integers(1, 4096))
def test_chunks_are_balanced_and_within_the_limit(length: int, limit: int):
    chunk = chunk_length(length, limit)
    sizes = sizes_of_chunks(length, chunk)
    assert sum(sizes) == length
    assert max(sizes) == chunk <= limit
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) <= 2 * -(-length // limit)


@given(rows=st.integers(1, 256), columns=st.integers(1, 256), limit=st.integers(128, 4096))
def test_equal_chunks_are_preferred_and_among_them_multiples_of_128(rows: int, columns: int, limit: int):
    length = rows * columns
    chunk = chunk_length(length, limit)
    divisors = [size for size in range(limit // 2 + 1, min(limit, length) + 1) if length % size == 0]
    aligned = [size for size in divisors if size % 128 == 0]
    if length <= limit:
        assert chunk == length
    elif aligned:
        assert chunk == aligned[-1]
    elif divisors:
        assert chunk == divisors[-1]


@pytest.mark.parametrize("length", [1, 16, 127, 819])
def test_few_tokens_are_one_chunk(length: int):
    assert chunk_length(length, 819) == length


@given(length=st.integers(1, 100), data=st.data())
def test_a_function_of_single_tokens_does_not_depend_on_the_chunks(length: int, data: st.DataObject):
    count = data.draw(st.integers(1, length))
    x, y = torch.arange(2 * length).view(2, length, 1), torch.arange(length).view(1, length, 1).expand(2, -1, -1)
    assert torch.equal(in_chunks(lambda a, b: 3 * a + b, count, x, y), 3 * x + y)
