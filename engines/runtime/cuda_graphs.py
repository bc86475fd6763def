"""Execution of prepared work on a device: called directly, or captured once as a CUDA graph and replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from engines.errors import DecodeError, DeviceLostError, DeviceMemoryError, PidError
from engines.runtime.devices import device_memory


class GraphRunner(Protocol):
    """Runs named pieces of work over fixed buffers."""

    def stream(self) -> AbstractContextManager[None]:
        """Return a context in which work uses the stream that `prepare` uses."""

    def prepare(self, key: Hashable, work: Callable[[], None]) -> None:
        """Register `work` under a key. It may only use buffers that live, unmoved, as long as this runner."""

    def run(self, key: Hashable) -> None:
        """Run the work of a key on the current stream."""


class EagerRunner:
    """Calls the work directly, on devices without CUDA graphs."""

    def __init__(self) -> None:
        self._work: dict[Hashable, Callable[[], None]] = {}

    def stream(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()

    def prepare(self, key: Hashable, work: Callable[[], None]) -> None:
        """Store the work."""
        self._work[key] = work

    def run(self, key: Hashable) -> None:
        """Call the work."""
        self._work[key]()


_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

preparing = threading.Lock()  # PyTorch compiles and captures in one thread of a process at a time


class GraphMemory:
    """Memory pool and capture stream of CUDA graphs that are never replayed at the same time.

    Attributes:
        device: The device of both.
        pool: Memory pool.
        stream: Stream on which work is prepared and captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.MemPool()
        self.stream = torch.cuda.Stream(device)


class CudaGraphRunner:
    """Captures each piece of work as a CUDA graph, and replays it on the current stream.

    All graphs share one memory pool. Prepare the largest work first, so that later graphs fit into the pool. The run
    before each capture uses the same pool and the same stream, because libraries keep a workspace per stream;
    otherwise both runs would need memory of their own.
    """

    def __init__(self, memory: GraphMemory) -> None:
        self._device, self._pool, self._stream = memory.device, memory.pool, memory.stream
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def prepare(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run the work once, then capture it. The graph keeps the raw addresses of all buffers."""
        with preparing:
            with self.stream(), torch.cuda.use_mem_pool(self._pool, self._device):
                work()  # the first run compiles, chooses kernels and allocates workspaces, which a capture forbids
            graph = torch.cuda.CUDAGraph()
            # Restrict only this thread during the capture: others may be serving other devices or encoding.
            with torch.cuda.graph(graph, self._pool.id, self._stream, "thread_local"):  # type: ignore[arg-type]
                work()
        self._graphs[key] = graph

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Make the stream of `prepare` current, in order with the work on the caller's stream before and after."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    def run(self, key: Hashable) -> None:
        """Replay the graph."""
        self._graphs[key].replay()


def other_bytes(device: torch.device) -> int:
    """Return the memory in use on a CUDA device that this process did not allocate through PyTorch."""
    free, total = device_memory(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def free_bytes(device: str) -> int | None:
    """Return the free memory of a CUDA device, or None for other devices."""
    if torch.device(device).type != "cuda":
        return None
    return_unused_memory()
    return device_memory(device)[0]


def return_unused_memory() -> None:
    """Return memory that PyTorch keeps for later use to the devices, where TensorRT and other programs can use it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def device_errors() -> Iterator[None]:
    """Translate exceptions from PyTorch to this project's errors.

    Raises:
        DeviceMemoryError: The device is out of memory.
        DeviceLostError: An error after which the CUDA context is unusable.
        MemoryError: The host is out of memory.
        DecodeError: Any other RuntimeError.
    """
    try:
        yield
    except PidError:
        raise
    except RuntimeError as error:
        if _ran_out_of_memory(error):
            raise DeviceMemoryError(
                "The device ran out of memory, or the host of page-locked memory. Use a smaller size, batch, number of "
                "slots or limit of pixels."
            ) from error
        # PyTorch has one exception type for all failures of a device; after these its context is unusable.
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            raise DeviceLostError("Unrecoverable CUDA error; the process must be restarted.") from error
        if "DefaultCPUAllocator" in str(error):
            raise MemoryError("The host is out of memory.") from error
        raise DecodeError("The decoder failed on this image.") from error


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Return whether the error, or one in its context, is a lack of memory: a failed capture raises a second error.

    PyTorch has no separate exception type for a lack of page-locked host memory. The context survives it.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) == _OUT_OF_MEMORY:
            return True
        error = error.__context__
    return False
