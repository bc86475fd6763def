"""Simulated runtimes whose steps a test can pause or fail."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from engines.runtime.protocol import Rows, Sample, Slot
from engines.runtime.simulated import SimulatedRuntime


class PausableRuntime(SimulatedRuntime):
    """Steps wait while `resume` is not set."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.resume = threading.Event()
        self.entered = threading.Event()
        self.steps = 0
        self.resume.set()  # for the warm-up

    def pause(self) -> None:
        self.entered.clear()
        self.resume.clear()

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        self.entered.set()
        assert self.resume.wait(60)
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


class FailingRuntime(SimulatedRuntime):
    """Steps raise `error` while it is set."""

    error: Exception | None = None

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        if self.error is not None:
            raise self.error
        super().step(slots, indices)


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
