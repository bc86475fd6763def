"""The cache in front of memory and disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.captions import cache as module
from server.captions.cache import CaptionCache
from server.captions.disk_cache import DiskCache
from server.captions.memory_cache import MemoryCache
from tests.waiting import until

SHAPE = (3, 4)


class SlowDisk(DiskCache):
    """Blocks while `blocked` is set."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, 10**6, "0" * 64, SHAPE)
        self.unblocked = threading.Event()
        self.unblocked.set()
        self.puts = 0

    def get(self, prompt: str) -> torch.Tensor | None:
        assert self.unblocked.wait(60)
        return super().get(prompt)

    def put(self, prompt: str, embedding: torch.Tensor) -> None:
        assert self.unblocked.wait(60)
        self.puts += 1
        super().put(prompt, embedding)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    disk = SlowDisk(tmp_path)
    yield disk
    disk.unblocked.set()


def embedding(value: float = 1.0) -> torch.Tensor:
    return torch.full(SHAPE, value, dtype=torch.bfloat16)


def test_each_embedding_is_found_where_it_is(disk: SlowDisk):
    cache = CaptionCache(MemoryCache(10**6), disk)
    disk.put("on disk", embedding(1.0))
    cache.put("in memory", embedding(2.0))
    found = asyncio.run(cache.find(["in memory", "on disk", "nowhere", "on disk"]))
    assert {prompt: source for prompt, (_, source) in found.items()} == {"in memory": "memory", "on disk": "disk"}
    assert torch.equal(found["on disk"][0], embedding(1.0))
    assert cache.get("on disk") is not None, "kept in memory after it was read"
    cache.close()


def test_an_embedding_is_written_to_disk(disk: SlowDisk):
    cache = CaptionCache(MemoryCache(0), disk)
    cache.put("a", embedding())
    until(lambda: disk.get("a") is not None)
    cache.close()


def test_a_disk_that_does_not_answer_counts_as_empty(disk: SlowDisk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOKUP_SECONDS", 0.01)
    cache = CaptionCache(MemoryCache(10**6), disk)
    disk.put("a", embedding())
    disk.unblocked.clear()
    assert asyncio.run(cache.find(["a"])) == {}
    disk.unblocked.set()
    cache.close()


def test_only_so_many_writes_wait_for_a_slow_disk(disk: SlowDisk):
    cache = CaptionCache(MemoryCache(10**6), disk)
    disk.unblocked.clear()
    for number in range(module.MAX_PENDING_WRITES + 10):
        cache.put(str(number), embedding())
    disk.unblocked.set()
    until(lambda: disk.puts == module.MAX_PENDING_WRITES)
    cache.put("after", embedding())
    until(lambda: disk.get("after") is not None)
    assert disk.puts == module.MAX_PENDING_WRITES + 1
    cache.close()
