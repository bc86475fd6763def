"""How prepared work is run on a device: called directly, or captured once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from engines.errors import DecodeError, DeviceLostError, DeviceMemoryError, PidError


class GraphRunner(Protocol):
    """Named pieces of work over fixed buffers."""

    def prepare(self, key: Hashable, work: Callable[[], None]) -> None: ...

    def run(self, key: Hashable) -> None: ...


class EagerRunner:
    """Calls the work. For devices without graphs."""

    def __init__(self) -> None:
        self._work: dict[Hashable, Callable[[], None]] = {}

    def prepare(self, key: Hashable, work: Callable[[], None]) -> None:
        self._work[key] = work

    def run(self, key: Hashable) -> None:
        self._work[key]()


class CudaGraphRunner:
    """Captures each piece of work once, all in one memory pool, and replays it on the current stream.

    Prepare the largest first: later graphs then fit into the pool's memory. Graphs hold raw addresses, so every
    buffer that the work touches must live, unmoved, as long as this object.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def prepare(self, key: Hashable, work: Callable[[], None]) -> None:
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            work()  # libraries pick kernels and allocate workspaces on first use, which a capture forbids
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Only this thread is forbidden what would break the capture: others serve other devices or encode.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self._graphs[key] = graph

    def run(self, key: Hashable) -> None:
        self._graphs[key].replay()


@contextmanager
def device_errors() -> Iterator[None]:
    """Translate what PyTorch throws into the error tree."""
    try:
        yield
    except PidError:
        raise
    except RuntimeError as error:
        if _ran_out_of_memory(error):
            raise DeviceMemoryError(
                "The device ran out of memory; a smaller size, batch or number of slots would fit."
            ) from error
        # PyTorch has one type for all its failures; after these the CUDA context is of no more use.
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            raise DeviceLostError("The device reported an error that its context does not survive.") from error
        raise DecodeError("The decoder failed on this image.") from error


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Also where a graph's capture, cut short by it, ended in an error of its own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False
