"""Where images live between start and finish: one arena of equal slots, seen through a layout for each output size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from engines.errors import DecodeError
from engines.pid.config import PATCH_PIXELS, PidConfig
from engines.size import Size

ALIGNMENT = 256  # bytes; what kernels like their tensors to start at


class LazyGather(Sequence[Tensor]):
    """The same rows of several [S, …] tensors, picked only when asked for: one copy at a time instead of all."""

    def __init__(self, tensors: Sequence[Tensor], index: Tensor) -> None:
        self._tensors, self._index = tensors, index

    def __len__(self) -> int:
        return len(self._tensors)

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, i: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(i, slice):
            return LazyGather(self._tensors[i], self._index)
        return self._tensors[i].index_select(0, self._index)

    def copy_to(self, i: int, out: Tensor) -> None:
        """Tensor i, picked straight into `out`, contiguous and of its shape."""
        torch.index_select(self._tensors[i], 0, self._index, out=out)


@dataclass(frozen=True)
class SlotState:
    """The state of all slots at one size: tensors with the slot as their first axis."""

    x: Tensor  # [S, 3, H, W] float32
    sigma: Tensor  # [S, 1] float32
    caption: Tensor  # [S, T, D]
    tokens: tuple[Tensor, ...]  # each [S, L, D]: one per injection, then that of the pixel blocks where there is one


class Arena:
    """`slots` equal pieces of one allocation, each large enough for the largest size.

    Addresses never change, so captured CUDA graphs stay valid, and sizes share memory that each alone would leave idle.
    """

    def __init__(
        self,
        config: PidConfig,
        sizes: Sequence[Size],
        caption_tokens: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        layouts = {size: _layout(config, size, caption_tokens, dtype) for size in sizes}
        stride = max(sum(_bytes(shape, dtype) for shape, dtype in layout) for layout in layouts.values())
        self._storage = torch.zeros(slots, stride, dtype=torch.uint8, device=device)
        self._free = list(range(slots))
        self.fields = {size: self._views(layout) for size, layout in layouts.items()}

    def take(self) -> int:
        """A free slot. Raises DecodeError where there is none: admission must not let it come to that."""
        if not self._free:
            raise DecodeError("All slots of the runtime are taken; release one before starting another image.")
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        if slot in self._free:
            raise DecodeError(f"Slot {slot} was released twice.")
        self._free.append(slot)

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes

    def _views(self, layout: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> SlotState:
        views, offset = [], 0
        for shape, dtype in layout:
            piece = self._storage[:, offset : offset + math.prod(shape) * dtype.itemsize]
            views.append(piece.view(dtype).unflatten(1, shape))
            offset += _bytes(shape, dtype)
        x, sigma, caption, *tokens = views
        return SlotState(x, sigma, caption, tuple(tokens))


def _layout(
    config: PidConfig, size: Size, caption_tokens: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tokens = (size[0] * size[1] // PATCH_PIXELS, config.hidden_size)
    return [
        ((3, *size), torch.float32),
        ((1,), torch.float32),
        ((caption_tokens, config.hidden_size), dtype),
        *[(tokens, dtype)] * config.token_sets,
    ]


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = math.prod(shape) * dtype.itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT
