"""The cache in memory: order, bytes and whose memory the embeddings are in."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.captions.memory_cache import MemoryCache


def embedding(value: float = 0.0, tokens: int = 5) -> Tensor:
    return torch.full((tokens, 4), value, dtype=torch.bfloat16)


def size(prompt: str, tokens: int = 5) -> int:
    return tokens * 4 * 2 + sys.getsizeof(prompt)


def test_an_embedding_is_found_under_its_prompt_only():
    cache = MemoryCache(10_000)
    cache.put("a cat", embedding(1))
    cache.put("", embedding(2))
    assert torch.equal(cache.get("a cat"), embedding(1))
    assert torch.equal(cache.get(""), embedding(2))
    assert cache.get("A cat") is None
    assert len(cache) == 2
    assert cache.bytes == size("a cat") + size("")


def test_the_least_recently_used_is_dropped_first():
    cache = MemoryCache(3 * size("a"))
    for prompt in "abc":
        cache.put(prompt, embedding())
    cache.get("a")
    cache.put("b", embedding(1))
    cache.put("d", embedding())
    assert [prompt for prompt in "abcd" if cache.get(prompt) is not None] == ["a", "b", "d"]


def test_a_large_embedding_replaces_several():
    cache = MemoryCache(3 * size("a"))
    for prompt in "abc":
        cache.put(prompt, embedding())
    cache.put("d", embedding(tokens=10))
    assert [prompt for prompt in "abcd" if cache.get(prompt) is not None] == ["c", "d"]
    assert cache.bytes == size("c") + size("d", 10)


def test_the_text_of_the_prompt_counts():
    cache = MemoryCache(3 * size("a"))
    cache.put("a", embedding())
    cache.put("b" * 100, embedding())
    assert cache.get("a") is None
    assert cache.bytes == size("b" * 100)


def test_what_is_larger_than_the_cache_is_not_kept_and_nothing_is_dropped_for_it():
    cache = MemoryCache(2 * size("a"))
    cache.put("a", embedding())
    cache.put("b", embedding(tokens=100))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    cache.put("a", embedding(tokens=100))
    assert cache.get("a") is None  # the older one would be wrong
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_cache_of_no_bytes_is_always_empty():
    cache = MemoryCache(0)
    cache.put("a", embedding())
    assert cache.get("a") is None


def test_a_replaced_embedding_no_longer_counts():
    cache = MemoryCache(10_000)
    cache.put("a", embedding(1))
    cache.put("a", embedding(2, tokens=7))
    assert torch.equal(cache.get("a"), embedding(2, tokens=7))
    assert cache.bytes == size("a", 7)


def test_a_row_of_a_batch_does_not_keep_the_batch_in_memory():
    cache = MemoryCache(10_000)
    batch = torch.arange(3 * 5 * 4, dtype=torch.float32).view(3, 5, 4).bfloat16()
    cache.put("row", batch[1])
    cache.put("transposed", batch[1].T)
    expected = batch[1].clone()
    batch.zero_()
    assert torch.equal(cache.get("row"), expected)
    assert torch.equal(cache.get("transposed"), expected.T)
    for prompt in ("row", "transposed"):
        kept = cache.get(prompt)
        assert kept.is_contiguous()
        assert kept.untyped_storage().nbytes() == kept.nbytes


def test_an_embedding_with_its_own_memory_is_not_copied():
    cache, own = MemoryCache(10_000), embedding()
    cache.put("a", own)
    assert cache.get("a").data_ptr() == own.data_ptr()


@given(
    st.integers(0, 600),
    st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.integers(1, 12)), max_size=60),
)
def test_it_is_an_lru_cache_within_its_bytes(limit: int, operations: list[tuple[str, int | None]]):
    """Compared with a list, in which the most recently used entry is the last. None reads, a number stores."""
    cache, model = MemoryCache(limit), list[tuple[str, int]]()
    for prompt, tokens in operations:
        found = [entry for entry in model if entry[0] == prompt]
        rest = [entry for entry in model if entry[0] != prompt]
        if tokens is None:
            kept = cache.get(prompt)
            assert (None if kept is None else kept.shape[0]) == (found[0][1] if found else None)
            model = rest + found
        else:
            cache.put(prompt, embedding(tokens=tokens))
            model = rest
            if size(prompt, tokens) <= limit:
                while sum(size(*entry) for entry in model) + size(prompt, tokens) > limit:
                    model.pop(0)
                model.append((prompt, tokens))
        assert len(cache) == len(model)
        assert cache.bytes == sum(size(*entry) for entry in model) <= limit


def test_threads_can_share_it():
    cache = MemoryCache(20 * size("00"))

    def use(first: int) -> None:
        for number in range(500):
            prompt = f"{(first + 7 * number) % 40:02}"
            cache.put(prompt, embedding(float(prompt)))
            kept = cache.get(f"{(first + number) % 40:02}")
            assert kept is None or torch.equal(kept, embedding((first + number) % 40))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    assert len(cache) == 20
    assert cache.bytes == 20 * size("00")


@pytest.mark.parametrize("prompt", ["é" * 50, "\N{PINCHING HAND}" * 50, "\0", "\ud800"])
def test_any_text_is_a_key(prompt: str):
    cache = MemoryCache(10_000)
    cache.put(prompt, embedding(3))
    assert torch.equal(cache.get(prompt), embedding(3))
