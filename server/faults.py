"""Faults on demand, to test that the server keeps its promises through them. Production refuses the setting."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence

from engines.errors import DecodeError, DeviceLostError, DeviceMemoryError
from engines.runtime.protocol import Rows, Runtime, Sample, Slot

FAULTS = ("fail-step", "hang-step", "poison-device", "out-of-memory", "die-in-encoder")
_FAULT = re.compile(r"([a-z-]+)(?:=(\d{1,6}))?(?:@(\d{1,6}))?")


class Faults:
    """`fail-step=2@10,hang-step`: ten steps go well, then two fail; the first step hangs. Counted once armed."""

    def __init__(self, text: str) -> None:
        """Raises ValueError with a sentence if `text` cannot be read."""
        self._lock = threading.Lock()
        self._left: dict[str, tuple[int, int]] = {}  # how often yet, after how many that go well
        self._armed = False
        self._hung = threading.Event()
        for part in filter(None, (part.strip() for part in text.split(","))):
            match = _FAULT.fullmatch(part)
            if match is None or match[1] not in FAULTS:
                raise ValueError(f"a fault is one of {', '.join(FAULTS)}, perhaps with a count and a delay, as =2@10")
            self._left[match[1]] = (int(match[2] or 1), int(match[3] or 0))

    def __bool__(self) -> bool:
        return bool(self._left)

    def arm(self) -> None:
        """The warm-up is over."""
        self._armed = True

    def strikes(self, fault: str) -> bool:
        with self._lock:
            count, delay = self._left.get(fault, (0, 0))
            if not (self._armed and count):
                return False
            self._left[fault] = (count, delay - 1) if delay else (count - 1, 0)
            return delay == 0

    def before_step(self) -> None:
        if self.strikes("hang-step"):
            self._hung.wait()
        if self.strikes("fail-step"):
            raise DecodeError("This step was made to fail.")
        if self.strikes("out-of-memory"):
            raise DeviceMemoryError("The device was made to run out of memory.")
        if self.strikes("poison-device"):
            raise DeviceLostError("The device was made to fail.")

    def before_strip(self) -> None:
        if self.strikes("die-in-encoder"):
            raise RuntimeError("the encoder was made to fail")

    def release(self) -> None:
        """Release any injected hang."""
        self._hung.set()


class FaultyRuntime:
    """A runtime, and what `faults` do to its steps."""

    def __init__(self, runtime: Runtime, faults: Faults) -> None:
        self._runtime, self._faults, self.info = runtime, faults, runtime.info

    def warm_up(self) -> None:
        self._runtime.warm_up()

    def start(self, sample: Sample) -> Slot:
        return self._runtime.start(sample)

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        self._faults.before_step()
        self._runtime.step(slots, indices)

    def finish(self, slot: Slot) -> Rows:
        return self._runtime.finish(slot)

    def release(self, slot: Slot) -> None:
        self._runtime.release(slot)

    def peak_memory(self) -> int | None:
        return self._runtime.peak_memory()

    def close(self) -> None:
        self._runtime.close()
