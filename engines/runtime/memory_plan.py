"""Memory that decoders need on a device, computed from their bundles before anything is loaded."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

from engines.bundle import DTYPES, WEIGHTS, Bundle
from engines.runtime.buffers import BufferPart, Needs, runtime_needs
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.tensorrt_runtime import engine_counts

Part = Literal["weights", BufferPart]

_REMEDY = "Use fewer decoders, set --resident, or lower --device-slots, --max-batch, --sizes or --max-pixels."


class MemoryItem(NamedTuple):
    """Part of the memory of a device."""

    part: Part
    decoder: str | None  # that needs it; None: all decoders share it
    nbytes: int

    def __str__(self) -> str:
        name = "other buffers" if self.part == "other" else self.part
        return f"{name}{f' of {self.decoder}' if self.decoder else ''} {_gigabytes(self.nbytes)}"


class PlannedDecoder(NamedTuple):
    """Memory requirements of one decoder."""

    weight_bytes: int
    needs: Needs

    @classmethod
    def of(cls, bundle: Bundle, info: RuntimeInfo) -> PlannedDecoder:
        """Return what the runtime of a bundle with these limits needs."""
        manifest = bundle.manifest
        weights = [engine.file for engine in manifest.engines] or [WEIGHTS]
        counts = engine_counts(manifest, info) if manifest.engines else {}
        needs = runtime_needs(manifest.network, DTYPES[manifest.precision], info, counts)
        return cls(sum(manifest.files[name].bytes for name in weights), needs)


@dataclass(frozen=True)
class MemoryPlan:
    """Planned memory of a device, without the working memory of the steps.

    Attributes:
        items: The parts; first the weights, which may be in host memory.
        resident: How many decoders have their weights on the device at a time. None: all of them.
    """

    items: tuple[MemoryItem, ...]
    resident: int | None = None

    @property
    def nbytes(self) -> int:
        """The sum of all items; of the weights, only the largest that are on the device at a time count."""
        weights, buffers = self._split()
        largest = heapq.nlargest(self.resident or len(weights), (item.nbytes for item in weights))
        return sum(largest) + sum(item.nbytes for item in buffers)

    def __str__(self) -> str:
        weights, buffers = self._split()
        terms = [str(item) for item in weights]
        if self.resident is not None and self.resident < len(weights):
            terms = [f"largest {self.resident} of ({', '.join(terms)})"]
        return f"{' + '.join((*terms, *map(str, buffers)))} = {_gigabytes(self.nbytes)}"

    def _split(self) -> tuple[list[MemoryItem], list[MemoryItem]]:
        weights = [item for item in self.items if item.part == "weights"]
        return weights, [item for item in self.items if item.part != "weights"]

    def of_decoder(self, name: str) -> MemoryPlan:
        """Return what one of several decoders needs, and what it shares with the others."""
        return MemoryPlan(tuple(item for item in self.items if item.decoder in (name, None)))

    def problem(self, device: str, free: int | None) -> str | None:
        """Return why the plan does not fit into the `free` bytes of a device; None if it does, or they are unknown."""
        if free is None or self.nbytes <= free:
            return None
        return (
            f"{device} has {_gigabytes(free)} of free memory, but this is needed: {self}, and the working memory of "
            f"the steps, which is known only after the warm-up. {_REMEDY}"
        )


def plan_memory(
    decoders: Mapping[str, PlannedDecoder], owner: str | None = None, resident: int | None = None
) -> MemoryPlan:
    """Plan the memory of a device.

    Args:
        decoders: The decoders by name.
        owner: Decoder to which the buffers belong; None: all share them.
        resident: How many decoders have their weights on the device at a time. None: all of them.
    """
    weights = [MemoryItem("weights", name, decoder.weight_bytes) for name, decoder in decoders.items()]
    needs = reduce(Needs.combined, (decoder.needs for decoder in decoders.values()))
    buffers = [MemoryItem(part, owner, nbytes) for part, nbytes in needs.device_bytes().items() if nbytes]
    return MemoryPlan((*weights, *buffers), resident)


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
