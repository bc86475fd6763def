"""Finished images on their way from the device to encoder threads."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from engines.errors import DecodeError
from engines.size import Size

STRIP = 256  # rows that travel together: about 1.5 MB at 2048 wide, 60 µs on PCIe 5


class BufferPool:
    """A fixed number of host buffers, pinned where the device can use that."""

    def __init__(self, count: int, nbytes: int, pinned: bool) -> None:
        self._free = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]
        self._available = threading.Condition()

    def take(self) -> Tensor:
        """A buffer; waits while all are being encoded, which holds the device back rather than memory."""
        with self._available:
            self._available.wait_for(lambda: self._free)
            return self._free.pop()

    def give_back(self, buffer: Tensor) -> None:
        with self._available:
            self._free.append(buffer)
            self._available.notify()


class HostRows:
    """Rows arriving in a host buffer, strip by strip."""

    def __init__(self, pool: BufferPool, size: Size) -> None:
        self._pool = pool
        self._buffer: Tensor | None = pool.take()
        self._arrivals: list[tuple[int, torch.cuda.Event]] = []
        self._finite: Tensor | None = None
        count = 3 * size[0] * size[1]
        self._target = self._buffer[:count].view(*size, 3)
        self.pixels: np.ndarray = self._target.numpy()  # [H, W, 3]

    def fill(self, image: Tensor, finite: Tensor) -> None:
        """Copy image [H, W, 3] uint8 from a device; on CUDA this only enqueues the copies on the current stream."""
        self._finite = finite
        if image.device.type != "cuda":
            self._target.copy_(image)
            return
        for start in range(0, image.shape[0], STRIP):
            stop = min(start + STRIP, image.shape[0])
            self._target[start:stop].copy_(image[start:stop], non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # a waiting thread sleeps instead of spinning
            event.record()
            self._arrivals.append((stop, event))

    def wait(self, stop: int) -> None:
        for arrived, event in self._arrivals:
            event.synchronize()
            if arrived >= stop:
                break
        if self._finite is not None and not bool(self._finite):
            raise DecodeError("The decoder produced values that are not finite; the latent may be out of its range.")

    def close(self) -> None:
        if self._buffer is not None:
            self._pool.give_back(self._buffer)
            self._buffer = None
