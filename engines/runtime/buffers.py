"""Memory that the runtimes of a device share: it runs one piece of work at a time, whichever decoder it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from engines.errors import DeviceMemoryError
from engines.pid.config import PidConfig
from engines.runtime.alignment import ALIGNMENT, aligned
from engines.runtime.cuda_graphs import CudaGraphRunner, EagerRunner, GraphMemory, GraphRunner
from engines.runtime.host_rows import BufferPool, nbytes
from engines.runtime.protocol import RuntimeInfo, preview_size
from engines.runtime.slots import FreeSlots, slot_bytes
from engines.runtime.staging import StagedInput
from engines.size import Size

BufferPart = Literal["slots", "tiles", "other"]


class _Kind(NamedTuple):
    """How a buffer is allocated, and which part of the memory it belongs to."""

    dtype: torch.dtype  # fixed: the bits of another type could be NaN, which spoils an image even if multiplied by 0
    part: BufferPart = "other"
    per_slot: bool = False


_BUFFERS = {
    "slots": _Kind(torch.uint8, "slots", per_slot=True),  # a view of it is written before it is read
    "slot index": _Kind(torch.long),
    "step index": _Kind(torch.long),
    "noise index": _Kind(torch.long),
    "step noise": _Kind(torch.float32),
    "preview": _Kind(torch.uint8),
    "image": _Kind(torch.uint8),
    "finite": _Kind(torch.bool),
    "tile x": _Kind(torch.float32, "tiles", per_slot=True),
    "tile total": _Kind(torch.float32, "tiles", per_slot=True),
    "tile latent": _Kind(torch.float32, "tiles", per_slot=True),
    "tile caption": _Kind(torch.float32, "tiles", per_slot=True),
    "engine tensors": _Kind(torch.uint8),  # each is written before it is read
}
_STAGED: dict[str, BufferPart] = {"latent": "other", "caption": "other", "tile weights": "tiles"}
_HOST = ("host image", "host image in tiles")  # in pools with one more than the slots


@dataclass(frozen=True)
class Needs:
    """Memory requirements of a runtime: slots, and elements per buffer, or per slot of buffers that each slot has."""

    slots: int
    counts: Mapping[str, int]

    def combined(self, other: Needs) -> Needs:
        """Return what suffices for either of two runtimes at a time."""
        names = dict.fromkeys((*self.counts, *other.counts))
        counts = {name: max(self.counts.get(name, 0), other.counts.get(name, 0)) for name in names}
        return Needs(max(self.slots, other.slots), counts)

    def device_bytes(self) -> dict[BufferPart, int]:
        """Return the bytes on the device by part."""
        parts: dict[BufferPart, int] = {"slots": 0, "tiles": 0, "other": 0}
        for name, count in self.counts.items():
            if name in _STAGED:
                parts[_STAGED[name]] += count * torch.float32.itemsize
            elif name in _BUFFERS:
                kind = _BUFFERS[name]
                parts[kind.part] += count * kind.dtype.itemsize * (self.slots if kind.per_slot else 1)
        return parts


def runtime_needs(
    config: PidConfig, dtype: torch.dtype, info: RuntimeInfo, backend_counts: Mapping[str, int] | None = None
) -> Needs:
    """Return what a runtime needs.

    Args:
        config: The network.
        dtype: Dtype of caption tokens and adapter tokens.
        info: Limits of the runtime.
        backend_counts: Elements of the buffers that only its backend uses.
    """
    pixels = max(size.area for size in info.sizes)
    tiled = info.max_pixels or 0
    largest = max(pixels, tiled)
    latent, caption = info.latent_channels * (largest // info.cell_side**2), info.caption_tokens * info.caption_width
    counts = {
        "slots": slot_bytes(config, info.sizes, info.caption_tokens, dtype),
        "slot index": info.max_batch,
        "step index": info.max_batch,
        "noise index": 1,
        "step noise": info.max_batch * 3 * pixels,
        "preview": 3 * max(preview_size(size).area for size in info.sizes),
        "image": 3 * largest,
        "finite": 1,
        "latent": latent,
        "caption": caption,
        "host image": max(map(nbytes, info.sizes)),
    }
    if tiled:
        counts |= {
            "tile x": 3 * tiled,
            "tile total": 3 * tiled,
            "tile latent": info.latent_channels * (tiled // info.cell_side**2),
            "tile caption": caption,
            "tile weights": max(sum(size) for size in info.sizes),
            "host image in tiles": nbytes(Size(1, tiled)),
        }
    return Needs(info.slots, {**counts, **(backend_counts or {})})


class DeviceBuffers:
    """Buffers, slots and graph memory of a device, for one or several runtimes that never work at the same time.

    Each runtime reserves what it needs when it is created. The first one that warms up allocates the maximum of what
    all have reserved. Nothing moves after that, because CUDA graphs keep raw addresses.

    Attributes:
        device: The device.
        plan: What is planned for the memory of the device, as text for error messages; empty if nothing is.
        copy_stream: Stream on which finished images are copied from their buffer to the host; None without CUDA.
    """

    def __init__(self, device: torch.device, plan: str = "") -> None:
        self.device, self.plan = device, plan
        self.copy_stream: torch.cuda.Stream | None = None
        self._needs = Needs(0, {})
        self._graph_memory: GraphMemory | None = None
        self._tensors: dict[str, Tensor] = {}
        self._staged: dict[str, StagedInput] = {}
        self._pools: dict[str, BufferPool] = {}
        self._activations = torch.empty(0, dtype=torch.uint8, device=device)
        self._free_slots: FreeSlots

    @property
    def allocated(self) -> bool:
        """Whether the memory is allocated, so that no other runtime can reserve any."""
        return bool(self._tensors)

    @property
    def needs(self) -> Needs:
        """Combined requirements of all runtimes that have reserved memory."""
        return self._needs

    @property
    def free_slots(self) -> FreeSlots:
        """The slots, which images of all runtimes share."""
        return self._free_slots

    def reserve(self, needs: Needs) -> None:
        """Reserve what a runtime needs, before the memory is allocated."""
        assert not self.allocated  # noqa: S101  graphs hold the addresses
        self._needs = self._needs.combined(needs)

    def runner(self) -> GraphRunner:
        """Return what runs the work of one runtime: on CUDA as graphs, which share one pool of memory."""
        if self.device.type != "cuda":
            return EagerRunner()
        if self._graph_memory is None:
            self._graph_memory = GraphMemory(self.device)
        return CudaGraphRunner(self._graph_memory)

    def allocate(self) -> None:
        """Allocate everything on the current stream, unless that has been done."""
        if self.allocated:
            return
        slots, counts, pinned = self._needs.slots, self._needs.counts, self.device.type == "cuda"
        self.copy_stream = torch.cuda.Stream(self.device) if pinned else None
        self._free_slots = FreeSlots(slots)
        self._staged = {name: StagedInput(counts.get(name, 0), self.device) for name in _STAGED}
        self._pools = {name: _pool(slots, counts.get(name, 0), pinned) for name in _HOST}
        self._tensors = {
            name: torch.zeros(
                (slots, counts.get(name, 0)) if kind.per_slot else counts.get(name, 0),
                dtype=kind.dtype,
                device=self.device,
            )
            for name, kind in _BUFFERS.items()
        }

    @contextmanager
    def add_plan_to_memory_errors(self) -> Iterator[None]:
        """Add the plan to the message of an error.

        Raises:
            DeviceMemoryError: The block has raised it.
        """
        try:
            yield
        except DeviceMemoryError as error:
            if not self.plan:
                raise
            text = f"{error} Planned, without the working memory of the steps: {self.plan}."
            raise DeviceMemoryError(text) from error

    def tensor(self, name: str) -> Tensor:
        """Return a buffer on the device, [elements] or [slots, elements]."""
        return self._tensors[name]

    def staged(self, name: str) -> StagedInput:
        """Return an input that is copied from the host."""
        return self._staged[name]

    def activations(self, count: int) -> Tensor:
        """Return at least `count` bytes, aligned for TensorRT, for values that no later work reads.

        TensorRT determines how many it needs only at the warm-up. If an earlier runtime needed less, its graphs keep
        the memory that they have.
        """
        if self._activations.nbytes < count:
            memory = torch.empty(count + ALIGNMENT, dtype=torch.uint8, device=self.device)
            self._activations = aligned(memory)[:count]
        return self._activations

    def pool(self, name: str) -> BufferPool:
        """Return the buffers on the host for finished images."""
        return self._pools[name]


def _pool(slots: int, size: int, pinned: bool) -> BufferPool:
    return BufferPool(slots + 1 if size else 0, size, pinned)
