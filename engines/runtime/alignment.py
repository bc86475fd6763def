"""Alignment of tensors within a larger piece of memory."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 256  # bytes; required by TensorRT, and more than kernels expect


def round_up(nbytes: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def aligned(buffer: Tensor) -> Tensor:
    """Return what remains of a buffer of bytes from the first aligned address."""
    return buffer[-buffer.data_ptr() % ALIGNMENT :]
