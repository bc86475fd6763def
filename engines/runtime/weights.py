"""Weights of a network that move between a device and host memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from engines.errors import ConfigError
from engines.runtime.alignment import round_up
from engines.runtime.weight_memory import CHUNK_BYTES, WeightPool


class Weights(Protocol):
    """Weights of a decoder, on its device or in host memory.

    Attributes:
        on_device: Whether the weights are on the device.
    """

    on_device: bool

    def restore(self) -> None:
        """Move the weights to the device, unless they are there; wait for it.

        Raises:
            DeviceMemoryError: The device has too little free memory; the weights are still in host memory.
        """

    def save(self) -> None:
        """Update the copy in host memory, after the weights were rearranged on the device."""

    def offload(self) -> None:
        """Free the memory of the weights on the device, unless they are in host memory; wait for the device.

        Raises:
            ConfigError: They cannot move.
        """

    def close(self) -> None:
        """Free the memory on the device for good, and its addresses. The decoder cannot be used after that."""

    def pool_bytes(self, peak: bool = False) -> int:
        """Return the current or peak size of the pool of the weights in bytes."""


class FixedWeights:
    """Weights that stay on the device, in PyTorch's memory; implements `Weights`."""

    on_device = True

    def restore(self) -> None:
        """Do nothing."""

    def save(self) -> None:
        """Do nothing."""

    def offload(self) -> None:
        """Raise ConfigError."""
        raise ConfigError("This decoder was opened without a pool for its weights, so they stay on the device.")

    def close(self) -> None:
        """Do nothing."""

    def pool_bytes(self, peak: bool = False) -> int:
        """Return 0."""
        return 0


class MovableWeights:
    """The parameters and buffers of a network, all of them in one piece of memory on a device or in host memory.

    There is always a copy in host memory, pinned if the device is a GPU, because decoding does not change weights.
    Implements `Weights`.
    """

    def __init__(self, network: nn.Module, pool: WeightPool) -> None:
        """Move the weights of a network to host memory; it has none until `restore`."""
        self._pool, self.on_device = pool, False
        tensors = list(chain(network.parameters(), network.buffers()))
        self._places: list[tuple[Tensor, Tensor, int]] = []  # weight, its layout on the device "meta", byte offset
        offsets: dict[tuple[int, int], int] = {}  # of the weights at an address with a size: they may share memory
        end = 0
        for tensor in tensors:
            content = _content(tensor)
            key = content.data_ptr(), content.nbytes
            if key not in offsets:
                offsets[key], end = end, end + round_up(content.nbytes)
            layout = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._places.append((tensor, layout, offsets[key]))
        packed = torch.zeros(end, dtype=torch.uint8)
        for tensor, _, offset in self._places:
            content = _content(tensor)
            packed[offset : offset + content.nbytes] = content
            tensor.data = torch.empty(0, dtype=tensor.dtype)  # frees the weight
        pinned = pool.device.type == "cuda"
        self._host = [piece.pin_memory() if pinned else piece for piece in packed.split(CHUNK_BYTES)]
        self._memory = pool.memory(end)

    @torch.inference_mode(False)  # the network keeps tensors that are created here
    def restore(self) -> None:
        """Copy the weights to the device, to the same addresses as before."""
        if self.on_device:
            return
        self._memory.allocate()
        for piece, target in self._copies():
            target.copy_(piece, non_blocking=True)
        self._synchronize()
        if self._places:
            self._bind()
        self.on_device = True

    def save(self) -> None:
        """Copy the weights to host memory."""
        for piece, source in self._copies():
            piece.copy_(source, non_blocking=True)
        self._synchronize()

    def offload(self) -> None:
        """Wait for the device, and free the memory there."""
        if self.on_device:
            self._synchronize()
            self._memory.free()
            self.on_device = False

    def close(self) -> None:
        """Free the memory on the device and its addresses."""
        self.offload()
        self._memory.close()

    def pool_bytes(self, peak: bool = False) -> int:
        """Return the memory in the pool."""
        return self._pool.peak_bytes if peak else self._pool.nbytes

    def _bind(self) -> None:
        """Let the network use the memory on the device."""
        for tensor, layout, offset in self._places:
            content = self._memory.bytes[offset : offset + _content(layout).nbytes].view(layout.dtype)
            tensor.data = content.as_strided(layout.shape, layout.stride())
        self._places.clear()  # the tensors remain valid when the memory is freed and allocated again

    def _copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each piece of host memory, and that of the device."""
        return zip(self._host, self._memory.bytes[: sum(map(len, self._host))].split(CHUNK_BYTES), strict=True)

    def _synchronize(self) -> None:
        if self._pool.device.type == "cuda":
            torch.cuda.current_stream(self._pool.device).synchronize()


def _content(tensor: Tensor) -> Tensor:
    """Return the memory between the first and the last value, as a vector of uint8."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((extent,), (1,)).view(torch.uint8)
