"""Cache of caption embeddings in the memory of the process."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict

from torch import Tensor


class MemoryCache:
    """Embeddings by prompt, of which the least recently used are dropped at a limit in bytes. Thread-safe.

    `get` and the other reads are O(1), also while another thread stores an embedding.
    """

    def __init__(self, max_bytes: int) -> None:
        """Create an empty cache.

        Args:
            max_bytes: Limit for the embeddings and the texts of their prompts together. With 0, nothing is kept.
        """
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[Tensor, int]] = OrderedDict()  # with bytes; the last was used last
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes that the entries use."""
        return self._bytes

    def get(self, prompt: str) -> Tensor | None:
        """Return the embedding of `prompt`, which then counts as used last, or None. Its values must not be changed."""
        with self._lock:
            entry = self._entries.get(prompt)
            if entry is None:
                return None
            self._entries.move_to_end(prompt)
            return entry[0]

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Store the embedding of `prompt`, and drop the least recently used ones until all fit.

        An embedding that is larger than the whole cache is not kept; neither is an older one of this prompt.

        Args:
            prompt: Text of the prompt.
            embedding: CPU tensor of any shape, whose values must not be changed afterwards. It is copied if it is a
                part of a larger tensor, such as a batch, which would otherwise stay in memory as a whole.
        """
        size = embedding.nbytes + sys.getsizeof(prompt)
        kept = _compact(embedding) if size <= self._max_bytes else None
        dropped: list[object] = []  # freed after the lock is released, because that takes time
        with self._lock:
            if previous := self._entries.pop(prompt, None):
                self._drop(previous, dropped)
            if kept is None:
                return
            while self._bytes + size > self._max_bytes:
                self._drop(self._entries.popitem(last=False)[1], dropped)
            self._entries[prompt] = (kept, size)
            self._bytes += size

    def _drop(self, entry: tuple[Tensor, int], dropped: list[object]) -> None:
        self._bytes -= entry[1]
        dropped.append(entry)


def _compact(tensor: Tensor) -> Tensor:
    """Return `tensor`, contiguous and in memory that contains nothing else."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
