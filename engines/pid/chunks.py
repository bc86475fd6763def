"""Division of tokens into chunks, which bounds the memory of the pixel blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_TILE_ROWS = 128  # rows of the tiles in which kernels compute large matrix products


def chunk_length(length: int, limit: int) -> int:
    """Return how many of `length` tokens to process at a time, at most `limit`.

    All of them if possible. Otherwise chunks should be of equal size, because each size is compiled separately, fill
    the tiles of matrix kernels, which have up to 128 rows, and be few. The result is, in this order of preference:

    1. the largest multiple of 128 that divides `length`, if that is more than half of `limit`;
    2. the largest divisor of `length`, if that is more than half of `limit`;
    3. the size of the largest chunk if `length` is divided evenly into as few as possible; see `chunks`.
    """
    if length <= limit:
        return length
    divisors = [size for size in range(limit, limit // 2, -1) if length % size == 0]  # the largest first
    aligned = [size for size in divisors if size % _TILE_ROWS == 0]
    return next(iter(aligned + divisors), -(-length // -(-length // limit)))


def chunks(count: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Divide tensors along axis 1 into `count` views.

    If `count` does not divide the length of the axis, the sizes differ by one entry, except in exported graphs: there
    the length varies and must be a multiple of `count`.
    """
    if torch.compiler.is_exporting():  # a split into sizes would be fixed in the graph, a reshape is not
        return zip(*(tensor.unflatten(1, (count, -1)).unbind(1) for tensor in tensors), strict=True)
    size, larger = divmod(tensors[0].shape[1], count)
    sizes = [size + 1] * larger + [size] * (count - larger)
    return zip(*(tensor.split(sizes, dim=1) for tensor in tensors), strict=True)


def in_chunks(function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
    """Apply a function to `count` chunks of axis 1, one at a time, and concatenate the results."""
    pieces = [function(*piece) for piece in chunks(count, *tensors)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
