"""Memory of a device for the weights of several decoders, of which some are in host memory."""

from __future__ import annotations

import heapq
import threading
from typing import Any, Protocol

import torch
from torch import Tensor

from engines.errors import DeviceMemoryError
from engines.runtime.virtual_memory import VirtualMemory

CHUNK_BYTES = 32 * 2**20  # a power of two, to which PyTorch rounds pinned memory up


class WeightMemory(Protocol):
    """Memory for the weights of one decoder. It can be freed and allocated again; tensors over it remain valid.

    Attributes:
        bytes: All of the memory, uint8; exists after the first `allocate`.
    """

    bytes: Tensor

    def allocate(self) -> None:
        """Allocate the memory, with undefined content.

        Raises:
            DeviceMemoryError: The device has too little free memory; none is in use then.
        """

    def free(self) -> None:
        """Free the memory, which the device must not be using."""

    def close(self) -> None:
        """Free the memory and the addresses, for good."""


class WeightPool:
    """Memory of a device that the weights of all its decoders share.

    On CUDA it consists of chunks. Weights that move to host memory leave their chunks to others. The pool keeps as many
    as the `resident` largest decoders need, so that moving weights allocates nothing.

    The first thread that acquires chunks is that of the device. It gets unused ones. Another thread, which warms up a
    decoder while that one decodes, gets separate chunks, which it keeps until the thread of the device uses them.

    Attributes:
        device: The device.
        nbytes: Memory of the device in the pool, whether weights use it or not; 0 on the CPU.
        peak_bytes: The largest value of `nbytes` so far.
    """

    def __init__(self, device: torch.device, resident: int) -> None:
        """Create an empty pool for a device, on which the weights of `resident` decoders are usually at a time.

        Raises:
            ConfigError: The device does not support it.
        """
        self.device = torch.empty(0, device=device).device  # adds the index if `device` has none
        self.nbytes = self.peak_bytes = 0
        self._resident = resident
        self._unused: list[int] = []  # handles of chunks
        self._opened: list[int] = []  # chunks that each decoder needs
        self._own: set[int] = set()  # chunks of other threads than that of the device
        self._thread: int | None = None  # that of the device
        self._lock = threading.Lock()  # not held during calls of the driver, except short ones
        self.addresses = VirtualMemory(self.device.index) if self.device.type == "cuda" else None

    @property
    def on_device_thread(self) -> bool:
        """Whether the caller is the thread of the device, or the first one."""
        return self._thread in (None, threading.get_ident())

    def memory(self, nbytes: int) -> WeightMemory:
        """Return memory for the weights of a decoder, which is not allocated yet."""
        return HostWeightMemory(nbytes) if self.addresses is None else CudaWeightMemory(self, self.addresses, nbytes)

    def open(self, count: int) -> None:
        """Register a decoder that needs `count` chunks."""
        with self._lock:
            self._opened.append(count)

    def close(self, count: int) -> None:
        """Reverse an `open`."""
        with self._lock:
            self._opened.remove(count)
            self._trim()

    def acquire(self, count: int) -> list[int]:
        """Return the handles of chunks: for the thread of the device unused ones first, otherwise new ones.

        The first call allocates all that the pool keeps.

        Raises:
            DeviceMemoryError: The device has too little free memory.
        """
        own = not self.on_device_thread
        if self._thread is None:
            self._thread = threading.get_ident()
            self.release(self._create(self._needed()))
        with self._lock:
            chunks = [] if own else self._unused[:count]
            del self._unused[: len(chunks)]
        try:
            return chunks + self._create(count - len(chunks), own)
        except DeviceMemoryError:
            self.release(chunks)
            raise

    def use(self, chunks: list[int]) -> None:
        """On the thread of the device, count chunks that were another thread's own as part of what the pool keeps."""
        if self.on_device_thread:
            with self._lock:
                self._own.difference_update(chunks)
                self._trim()

    def release(self, chunks: list[int]) -> None:
        """Return chunks that are not mapped to the pool."""
        with self._lock:
            self._own.difference_update(chunks)
            self._unused += chunks
            self._trim()

    def _create(self, count: int, own: bool = False) -> list[int]:
        chunks: list[int] = []
        try:
            while len(chunks) < count:
                chunks.append(self._allocate())
                with self._lock:
                    self._own.update(chunks[-1:] if own else ())
                    self.nbytes += CHUNK_BYTES
                    self.peak_bytes = max(self.peak_bytes, self.nbytes)
        except DeviceMemoryError:
            self.release(chunks)
            raise
        return chunks

    def _allocate(self) -> int:
        assert self.addresses is not None  # noqa: S101  there are chunks on CUDA only
        try:
            return self.addresses.create(CHUNK_BYTES)
        except DeviceMemoryError:
            torch.cuda.empty_cache()  # PyTorch keeps memory that it no longer uses
            return self.addresses.create(CHUNK_BYTES)

    def _needed(self) -> int:
        return sum(heapq.nlargest(self._resident, self._opened)) + len(self._own)

    def _trim(self) -> None:
        assert self.addresses is not None  # noqa: S101  there are chunks on CUDA only
        while self._unused and self.nbytes > self._needed() * CHUNK_BYTES:
            self.addresses.release(self._unused.pop())
            self.nbytes -= CHUNK_BYTES


class HostWeightMemory:
    """Weight memory on the CPU, where nothing keeps raw addresses: the storage of a tensor."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8)
        self._nbytes = nbytes
        self.free()

    def allocate(self) -> None:
        """Give the storage its size."""
        self.bytes.untyped_storage().resize_(self._nbytes)

    def free(self) -> None:
        """Make the storage empty."""
        self.bytes.untyped_storage().resize_(0)

    def close(self) -> None:
        """Make the storage empty."""
        self.free()


class CudaWeightMemory:
    """Weight memory on a CUDA device, always at the same addresses, which captured graphs keep."""

    bytes: Tensor

    def __init__(self, pool: WeightPool, addresses: VirtualMemory, nbytes: int) -> None:
        """Reserve the addresses."""
        self._pool, self._addresses = pool, addresses
        self._count = -(-nbytes // CHUNK_BYTES)
        self._chunks: list[int] = []  # those that are mapped, in the order of their addresses
        self._kept: list[int] = []  # those that are not mapped and remain its own
        self._start = addresses.reserve(self._count * CHUNK_BYTES)
        pool.open(self._count)

    def allocate(self) -> None:
        """Map chunks to the addresses."""
        chunks, self._kept = self._kept or self._pool.acquire(self._count), []
        self._pool.use(chunks)
        try:
            for chunk in chunks:
                self._addresses.map(self._start + len(self._chunks) * CHUNK_BYTES, CHUNK_BYTES, chunk)
                self._chunks.append(chunk)
            self._addresses.allow_access(self._start, self._count * CHUNK_BYTES)
        except DeviceMemoryError:  # for page tables
            self._kept = chunks[len(self._chunks) :]
            self._unmap()
            self._return()
            raise
        if not hasattr(self, "bytes"):  # PyTorch asks the driver for the device of the memory, which must exist
            self.bytes = torch.as_tensor(_Array(self._start, self._count * CHUNK_BYTES), device=self._pool.device)

    def free(self) -> None:
        """Return the chunks to the pool; only keep them on a thread that warms up beside that of the device."""
        self._unmap()
        if self._pool.on_device_thread:
            self._return()

    def close(self) -> None:
        """Return the chunks, and free the addresses."""
        self._unmap()
        self._return()
        self._addresses.free(self._start, self._count * CHUNK_BYTES)
        self._pool.close(self._count)

    def _unmap(self) -> None:
        for index in range(len(self._chunks)):
            self._addresses.unmap(self._start + index * CHUNK_BYTES, CHUNK_BYTES)
        self._kept, self._chunks = self._kept + self._chunks, []

    def _return(self) -> None:
        self._pool.release(self._kept)
        self._kept = []


class _Array:
    """Memory on a CUDA device, for `torch.as_tensor`."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }
