"""Inputs of the prepared work, copied to the device from pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StagedInput:
    """Float32 buffer on the device that never moves, with a pinned buffer on the host for what is copied to it.

    Copies from pageable memory would go through a buffer of the driver, piece by piece.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        """Allocate room for `count` values."""
        self._device_values = torch.zeros(count, device=device)
        self._host = torch.zeros(count, pin_memory=True) if device.type == "cuda" else None

    def view(self, shape: Sequence[int]) -> Tensor:
        """Return the first values of the device's buffer with this shape."""
        return self._device_values[: torch.Size(shape).numel()].view(shape)

    def write(self, values: Tensor) -> None:
        """Enqueue a copy of `values`, which are on the CPU or on the device, to the start of the buffer.

        The previous copy must have completed.
        """
        values = values.flatten()
        target = self._device_values[: len(values)]
        if self._host is None or values.device == target.device:
            target.copy_(values)
        else:
            target.copy_(self._host[: len(values)].copy_(values), non_blocking=True)
