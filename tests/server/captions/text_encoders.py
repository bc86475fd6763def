"""Text encoders and runtimes that a test controls."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch import Tensor

from engines.captions.simulated import SimulatedTextEncoder
from engines.runtime.protocol import Sample, Slot
from engines.runtime.simulated import SimulatedRuntime


class ControlledTextEncoder(SimulatedTextEncoder):
    """Records the batches, waits between `pause` and `resume`, and raises `errors` by prompt."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[list[str]] = []
        self.errors: dict[str, Exception] = {}
        self.entered = threading.Event()  # an encoding has begun since the last `pause`
        self._unpaused = threading.Event()
        self._unpaused.set()  # for the warm-up

    @property
    def prompts(self) -> list[str]:
        """All prompts that were encoded, without those of the warm-up."""
        return [prompt for batch in self.batches for prompt in batch]

    def pause(self) -> None:
        self.entered.clear()
        self._unpaused.clear()

    def resume(self) -> None:
        self._unpaused.set()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        self.entered.set()
        assert self._unpaused.wait(60)
        self.batches.append(list(prompts))
        for prompt in prompts:
            if prompt in self.errors:
                raise self.errors[prompt]
        return super().encode(prompts)


class RecordingRuntime(SimulatedRuntime):
    """Records the caption of each image that starts."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.captions: list[Tensor | None] = []

    def start(self, sample: Sample) -> Slot:
        self.captions.append(sample.caption)
        return super().start(sample)
