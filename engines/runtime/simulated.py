"""A runtime with a cost table instead of a network: same slots, same errors, pictures that tell what was asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import ConfigError, DecodeError
from engines.runtime.protocol import RuntimeInfo, Sample, Slot
from engines.size import Size

STEPS = 4  # of a full decode


@dataclass(frozen=True)
class SimulatedCost:
    """Seconds on the device for one size; a step of b images takes step · (1 + (b − 1) · batch_slope)."""

    condition: float = 0.0
    step: float = 0.0
    finish: float = 0.0
    batch_slope: float = 1.0  # 1: batching gains nothing, as at 2048² where one image fills a GPU

    def step_of(self, batch: int) -> float:
        return self.step * (1 + (batch - 1) * self.batch_slope)

    def service(self, steps: int = STEPS) -> float:
        """Seconds that one image keeps the device to itself."""
        return self.condition + steps * self.step + self.finish


@dataclass(frozen=True)
class SimulatedTable:
    """What a device costs and what its decoder takes; `estimated` says that nobody has measured it."""

    name: str
    estimated: bool
    source: str
    costs: Mapping[Size, SimulatedCost]
    latent_channels: int = 16
    pixels_per_cell: int = 8
    max_batch: int = 1

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        cell = 4 * self.pixels_per_cell
        return self.latent_channels, size[0] // cell, size[1] // cell


def load_table(path: Path) -> SimulatedTable:
    """Read a cost table: JSON with the fields of `SimulatedTable`, costs by size as "2048x2048", seconds.

    Raises ConfigError for a file that is not one.
    """
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        costs = {Size.parse(size): SimulatedCost(**cost) for size, cost in fields.pop("costs").items()}
        table = SimulatedTable(**fields, costs=costs)
    except OSError as error:
        raise ConfigError(f"The cost table {path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a cost table: {error}.") from None
    if not costs:
        raise ConfigError(f"The cost table {path} names no size.")
    return table


class SimulatedRows:
    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def wait(self, stop: int) -> None:
        pass

    def close(self) -> None:
        pass


class SimulatedRuntime:
    """Sleeps for as long as the table says, then hands out a fixed picture, shared between answers of one size."""

    def __init__(
        self,
        costs: Mapping[Size, SimulatedCost],
        pictures: Mapping[Size, np.ndarray] | None = None,
        latent_channels: int = 16,
        pixels_per_cell: int = 8,
        upscale: int = 4,
        max_batch: int = 4,
        slots: int | None = None,
        device: str = "simulated",
    ) -> None:
        self.info = RuntimeInfo(
            decoder="simulated",
            latent_space="simulated",
            latent_channels=latent_channels,
            pixels_per_cell=pixels_per_cell,
            upscale=upscale,
            sigma_frame="flow",
            caption_tokens=300,
            caption_width=2304,
            sizes=tuple(costs),
            max_batch=max_batch,
            slots=slots or max_batch + 1,
            precision="simulated",
            kind="simulated",
            device=device,
        )
        self._costs = dict(costs)
        self._pictures = dict(pictures or {})
        self._running: dict[Slot, tuple[Size, list[int]]] = {}

    @classmethod
    def from_table(
        cls, table: SimulatedTable, max_batch: int | None = None, slots: int | None = None
    ) -> SimulatedRuntime:
        """A device that costs what `table` says."""
        return cls(
            table.costs,
            latent_channels=table.latent_channels,
            pixels_per_cell=table.pixels_per_cell,
            max_batch=max_batch or table.max_batch,
            slots=slots,
            device=table.name,
        )

    def warm_up(self) -> None:
        for size in self._costs:
            self._picture(size)

    def start(self, sample: Sample) -> Slot:
        if sample.size not in self._costs:
            raise DecodeError(f"This runtime does not decode to {sample.size}.")
        slot = next((slot for slot in range(self.info.slots) if slot not in self._running), None)
        if slot is None:
            raise DecodeError("All slots of the runtime are taken; release one before starting another image.")
        self._running[slot] = (sample.size, [])
        _spend(self._costs[sample.size].condition)
        return slot

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        size = self._running[slots[0]][0]
        _spend(self._costs[size].step_of(len(slots)))
        for slot, index in zip(slots, indices, strict=True):
            self._running[slot][1].append(index)

    def finish(self, slot: Slot) -> SimulatedRows:
        size = self._running[slot][0]
        _spend(self._costs[size].finish)
        return SimulatedRows(self._picture(size))

    def release(self, slot: Slot) -> None:
        if self._running.pop(slot, None) is None:
            raise DecodeError(f"Slot {slot} was released twice.")

    def _picture(self, size: Size) -> np.ndarray:
        if size not in self._pictures:
            self._pictures[size] = picture(size)
        return self._pictures[size]

    def peak_memory(self) -> int | None:
        return None

    def close(self) -> None:
        pass


@cache
def picture(size: Size) -> np.ndarray:
    """A picture [H, W, 3] uint8 that an encoder finds about as hard as a photograph; one for all who ask.

    Value noise with amplitudes that fall as 1/f, as in natural images, and a grain of its own in each channel.
    """
    generator = np.random.default_rng(0)
    octaves = (2, 4, 8, 16, 32, 64, 128)
    rows, columns = (np.hstack([_interpolation(cells, side) for cells in octaves]) for side in size)
    tiles = -(-size[0] // 256), -(-size[1] // 256)
    pixels = np.empty((*size, 3), np.uint8)
    for channel in range(3):
        corners = [generator.normal(0, 90 / cells**0.8, (cells + 1, cells + 1)) for cells in octaves]
        grain = generator.normal(127, 4, (256, 256)).astype(np.float32)
        plane = rows @ _block_diagonal(corners) @ columns.T + np.tile(grain, tiles)[: size[0], : size[1]]
        pixels[..., channel] = plane.clip(0, 255)
    return pixels


def _interpolation(cells: int, side: int) -> np.ndarray:
    """The matrix [side, cells + 1] that interpolates linearly between the corners of `cells` equal cells."""
    at = np.linspace(0, cells, side, endpoint=False)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells + 1))).astype(np.float32)


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    matrix = np.zeros((sum(len(block) for block in blocks),) * 2, np.float32)
    at = 0
    for block in blocks:
        matrix[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return matrix


def _spend(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)
