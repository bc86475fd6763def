"""The captions that are known: embeddings in memory and, optionally, in a directory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping

from torch import Tensor

from engines.captions.protocol import TextEncoderInfo
from server.captions.disk_cache import DiskCache
from server.captions.memory_cache import MemoryCache
from server.metrics import CaptionSource
from server.process.threads import started_pool
from server.settings import Settings

LOOKUP_SECONDS = 1.0  # after which a slow disk counts as not having the embedding
MAX_PENDING_WRITES = 32  # further embeddings are not written; each one is more than 1 MB


class CaptionCache:
    """Embeddings by prompt. One thread reads and writes the directory, so that a slow disk delays nothing else."""

    def __init__(self, memory: MemoryCache, disk: DiskCache | None) -> None:
        """Combine the caches and start the thread."""
        self.memory, self.disk = memory, disk
        self._thread = None if disk is None else started_pool(1, "caption cache")
        self._writes = threading.Semaphore(MAX_PENDING_WRITES)

    def get(self, prompt: str) -> Tensor | None:
        """Return the embedding of `prompt` if it is in memory."""
        return self.memory.get(prompt)

    async def find(self, prompts: Iterable[str]) -> Mapping[str, tuple[Tensor, CaptionSource]]:
        """Return the known embeddings of `prompts`, and where each was found. Call it on the event loop."""
        found: dict[str, tuple[Tensor, CaptionSource]] = {}
        missing, disk = [], self.disk
        for prompt in dict.fromkeys(prompts):
            if (embedding := self.get(prompt)) is not None:
                found[prompt] = embedding, "memory"
            else:
                missing.append(prompt)
        if missing and disk is not None:
            stored = await asyncio.gather(*(self._read(disk, prompt) for prompt in missing))
            for prompt, embedding in zip(missing, stored, strict=True):
                if embedding is not None:
                    found[prompt] = embedding, "disk"
        return found

    async def _read(self, disk: DiskCache, prompt: str) -> Tensor | None:
        read = asyncio.get_running_loop().run_in_executor(self._thread, disk.get, prompt)
        try:
            embedding = await asyncio.wait_for(read, LOOKUP_SECONDS)
        except TimeoutError:
            return None
        if embedding is not None:
            self.memory.put(prompt, embedding)
        return embedding

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Store the embedding [T, E] in memory, and begin to write it to the directory. May be called on any thread."""
        self.memory.put(prompt, embedding)
        if self.disk is not None and self._thread is not None and self._writes.acquire(blocking=False):
            self._thread.submit(self._write, self.disk, prompt, embedding)

    def _write(self, disk: DiskCache, prompt: str, embedding: Tensor) -> None:
        try:
            disk.put(prompt, embedding)
        finally:
            self._writes.release()

    def close(self) -> None:
        """End the thread after what it is doing."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def open_caption_cache(settings: Settings, info: TextEncoderInfo) -> CaptionCache:
    """Return the cache of a server's captions, with a directory if the settings name one."""
    disk = None
    if settings.caption_cache is not None:
        shape = (info.tokens, info.width)
        disk = DiskCache(settings.caption_cache, settings.caption_disk_bytes, info.identity, shape)
    return CaptionCache(MemoryCache(settings.caption_cache_bytes), disk)
