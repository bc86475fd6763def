"""A runtime with a cost table instead of a network: same slots, same errors, pictures that tell what was asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.errors import DecodeError
from engines.runtime.protocol import RuntimeInfo, Sample, Size, Slot


@dataclass(frozen=True)
class SimulatedCost:
    """Seconds on the device for one size; a step of b images takes step · (1 + (b − 1) · batch_slope)."""

    condition: float = 0.0
    step: float = 0.0
    finish: float = 0.0
    batch_slope: float = 1.0  # 1: batching gains nothing, as at 2048² where one image fills a GPU

    def step_of(self, batch: int) -> float:
        return self.step * (1 + (batch - 1) * self.batch_slope)


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
            device="simulated",
        )
        self._costs = dict(costs)
        self._pictures = {**{size: gradient(size) for size in costs}, **(pictures or {})}
        self._running: dict[Slot, tuple[Size, list[int]]] = {}

    def warm_up(self) -> None:
        pass

    def start(self, sample: Sample) -> Slot:
        if sample.size not in self._costs:
            raise DecodeError(f"This runtime does not decode to {sample.size[0]}x{sample.size[1]}.")
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
        return SimulatedRows(self._pictures[size])

    def release(self, slot: Slot) -> None:
        if self._running.pop(slot, None) is None:
            raise DecodeError(f"Slot {slot} was released twice.")

    def peak_memory(self) -> int | None:
        return None

    def close(self) -> None:
        pass


def gradient(size: Size) -> np.ndarray:
    """A smooth picture [H, W, 3] uint8 with a little grain, so that encoders meet something like a photograph."""
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    grain = np.random.default_rng(0).normal(0, 3, (height, width)).astype(np.float32)
    waves = np.stack([np.sin(rows / 97 + k) + np.cos(columns / 61 - k) for k in range(3)], axis=-1)
    return np.clip(127 + 60 * waves + grain[..., None], 0, 255).astype(np.uint8)


def _spend(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)
