"""Simulated runtimes that a test controls."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engines.errors import NonFiniteImageError
from engines.runtime.protocol import Rows, Sample, Slot
from engines.runtime.simulated import SimulatedRuntime


class RecordingRuntime(SimulatedRuntime):
    """Keeps the samples that it decodes, for a decoder of `latent_space`."""

    def __init__(self, latent_space: str, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.info = replace(self.info, latent_space=latent_space)
        self.samples: list[Sample] = []

    def start(self, sample: Sample) -> Slot:
        self.samples.append(sample)
        return super().start(sample)


class ControlledRuntime(SimulatedRuntime):
    """Steps wait between `pause` and `resume`, and raise `error` while it is set."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.entered = threading.Event()  # a step has begun since the last `pause`
        self.steps = 0
        self.error: Exception | None = None
        self._unpaused = threading.Event()
        self._unpaused.set()  # for the warm-up

    def pause(self) -> None:
        self.entered.clear()
        self._unpaused.clear()

    def resume(self) -> None:
        self._unpaused.set()

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        self.entered.set()
        assert self._unpaused.wait(60)
        if self.error is not None:
            raise self.error
        self.steps += 1
        super().step(slots, indices)


class LateRowsRuntime(SimulatedRuntime):
    """Rows below the first 32 arrive only once `arrived` is set."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.arrived = threading.Event()
        self.arrived.set()  # for the warm-up

    def finish(self, slot: Slot) -> Rows:
        rows = super().finish(slot)
        rows.wait = lambda stop: None if stop <= 32 else self.arrived.wait(60)  # type: ignore[method-assign]
        return rows


class NonFiniteRuntime(SimulatedRuntime):
    """Images contain NaN while `finite` is False."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.finite = True  # for the warm-up

    def finish(self, slot: Slot) -> Rows:
        rows = super().finish(slot)
        if not self.finite:
            rows.wait = self._wait  # type: ignore[method-assign]
        return rows

    def _wait(self, stop: int) -> None:
        raise NonFiniteImageError("The image contains NaN.")


class PacedRuntime(SimulatedRuntime):
    """Previews get brighter with each step. Once `paced`, a step waits until those of the last one have been read."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.paced = False  # during the warm-up
        self.read = threading.Semaphore(0)  # released for each preview that the client has read
        self.steps_done: dict[Slot, int] = {}
        self._unread = 0

    def start(self, sample: Sample) -> Slot:
        slot = super().start(sample)
        self.steps_done[slot] = 0
        return slot

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        self._wait()
        super().step(slots, indices)
        for slot in slots:
            self.steps_done[slot] += 1

    def preview(self, slot: Slot) -> np.ndarray:
        self._unread += self.paced
        return np.full_like(super().preview(slot), 40 * self.steps_done[slot])

    def finish(self, slot: Slot) -> Rows:
        self._wait()
        return super().finish(slot)

    def _wait(self) -> None:
        while self._unread:
            assert self.read.acquire(timeout=60)
            self._unread -= 1


class PoisonedRuntime(SimulatedRuntime):
    """Steps raise `error` if one of their images has a latent with the value `POISON`."""

    POISON = 99.0

    def __init__(self, error: Exception, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.error = error
        self.poisoned: set[Slot] = set()

    def start(self, sample: Sample) -> Slot:
        slot = super().start(sample)
        (self.poisoned.add if sample.latent.max() == self.POISON else self.poisoned.discard)(slot)
        return slot

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        if self.poisoned & set(slots):
            raise self.error
        super().step(slots, indices)
