"""Finished images on their way from the device to encoder threads."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from engines.errors import NonFiniteImageError
from engines.runtime.cuda_graphs import device_errors
from engines.size import Size

STRIP = 256  # rows per copy: about 1.5 MB at a width of 2048, 60 µs over PCIe 5


class BufferPool:
    """Fixed number of host buffers, in pinned memory if the device can use it, and further ones in pageable memory."""

    def __init__(self, count: int, nbytes: int, pinned: bool) -> None:
        self._nbytes = nbytes
        self._free = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]
        self._pooled = {buffer.data_ptr() for buffer in self._free}
        self._lock = threading.Lock()

    def acquire(self) -> Tensor:
        """Return a free buffer, or a new one, to which copies are slower, while all are in use.

        Waiting for one would let slow encoders stop the device, and an urgent image would wait for less urgent ones.
        The caller limits the number of images that are not encoded yet.
        """
        with self._lock:
            if self._free:
                return self._free.pop()
        return torch.empty(self._nbytes, dtype=torch.uint8)

    def release(self, buffer: Tensor) -> None:
        """Make a buffer of the pool available again, and free any other. May be called from any thread."""
        if buffer.data_ptr() in self._pooled:
            with self._lock:
                self._free.append(buffer)


def nbytes(size: Size) -> int:
    """Return the size of a buffer for `HostRows`."""
    return 3 * size.area + 1


class HostRows:
    """Image whose rows arrive in a host buffer, strip by strip; implements `protocol.Rows`."""

    def __init__(self, pool: BufferPool, size: Size) -> None:
        """Acquire a buffer of at least `nbytes(size)`."""
        self._pool = pool
        self._buffer: Tensor | None = pool.acquire()
        self._arrivals: list[tuple[int, torch.cuda.Event]] = []
        # In the last byte of the buffer rather than in a second pinned tensor: PyTorch aborts the process if pinned
        # memory is freed after an error that the CUDA context does not survive.
        self._finite = self._buffer[-1:].view(torch.bool)
        self._finite.fill_(True)
        self._target = self._buffer[: 3 * size.area].view(*size, 3)
        self.pixels: np.ndarray = self._target.numpy()  # [H, W, 3]

    def fill(self, image: Tensor, finite: Tensor) -> None:
        """Copy an image from the device; on CUDA this only enqueues the copies on the current stream.

        Args:
            image: [H, W, 3] uint8.
            finite: Bool tensor with one element, on the same device: whether all values were finite.
        """
        self._finite.copy_(finite, non_blocking=True)
        if image.device.type != "cuda":
            self._target.copy_(image)
            return
        for start in range(0, image.shape[0], STRIP):
            stop = min(start + STRIP, image.shape[0])
            self._target[start:stop].copy_(image[start:stop], non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # waiting threads sleep instead of spinning
            event.record()
            self._arrivals.append((stop, event))

    def wait(self, stop: int) -> None:
        """Wait until rows 0..stop have arrived.

        Raises:
            NonFiniteImageError: The image contains NaN or infinity.
            DeviceLostError: The device failed before the rows had arrived.
        """
        with device_errors():
            for arrived, event in self._arrivals:
                event.synchronize()
                if arrived >= stop:
                    break
        if not bool(self._finite):
            raise NonFiniteImageError("The decoder produced NaN or infinity; check that the latent is normalised.")

    def close(self) -> None:
        """Release the buffer; later calls do nothing."""
        if self._buffer is not None:
            self._pool.release(self._buffer)
            self._buffer = None
