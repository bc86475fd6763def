"""Memory of a computation: peak and retained bytes, on any device."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakActivations(TorchDispatchMode):
    """Context manager that counts the bytes of tensors created inside it.

    `live` is the number of bytes that are still referenced, `peak` its maximum. Views and tensors that existed before
    are not counted. Neither is the workspace that a kernel allocates and frees internally, so the result is a lower
    bound. It does not depend on the device and also works on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._known.add(tensor.untyped_storage())
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(device: torch.device, work: Callable[[], None]) -> int:
    """Return the peak number of bytes that `work` allocates.

    On CUDA the allocator reports it; elsewhere the tensors that `work` creates are counted (`PeakActivations`).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakActivations() as memory:
        work()
    return memory.peak


def retained_bytes(device: torch.device, work: Callable[[], None]) -> int:
    """Return the number of bytes that `work` leaves allocated, for example in buffers and CUDA graphs."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # Reserved rather than allocated: the memory pool of a CUDA graph is not allocated between replays.
        before = torch.cuda.memory_reserved(device)
        work()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device) - before
    with PeakActivations() as memory:
        work()
    return memory.live


def bytes_in_use(device: torch.device) -> int:
    """Return the bytes reserved by the device's allocator on CUDA, else the resident set of this process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
