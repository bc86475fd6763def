"""Fault injection, to test that every request gets a response even after a failure; not allowed in production."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.errors import DecodeError, DeviceLostError, DeviceMemoryError
from engines.runtime.protocol import Rows, Runtime, Sample, Slot

if TYPE_CHECKING:  # the settings import this module before the libraries are loaded
    import numpy as np

    from engines.runtime.kernels.choice import Choice

FAULTS = ("fail-step", "hang-step", "poison-device", "out-of-memory", "die-in-encoder")
_FAULT = re.compile(r"([a-z-]+)(?:=(\d{1,6}))?(?:@(\d{1,6}))?")


@dataclass
class _Countdown:
    """Number of calls until a fault occurs, and of calls in which it does."""

    delay: int  # calls that still succeed
    count: int  # calls that fail after these


class Faults:
    """Faults from a list such as `fail-step=2@10,hang-step`: the first step hangs; after ten steps, two fail.

    Counting starts with `arm`. All methods may be called from any thread.
    """

    def __init__(self, text: str) -> None:
        """Parse a comma-separated list of faults, each with an optional count and delay.

        Raises:
            ValueError: the list is invalid; the message is for users.
        """
        self._lock = threading.Lock()
        self._countdowns: dict[str, _Countdown] = {}
        self._armed = False
        self._released = threading.Event()
        for item in filter(None, (item.strip() for item in text.split(","))):
            match = _FAULT.fullmatch(item)
            if match is None or match[1] not in FAULTS:
                raise ValueError(
                    f"{item[:40]!r} is not a valid fault; use {', '.join(FAULTS)}, "
                    "with count and delay as in fail-step=2@10"
                )
            self._countdowns[match[1]] = _Countdown(delay=int(match[3] or 0), count=int(match[2] or 1))

    def __bool__(self) -> bool:
        return bool(self._countdowns)

    def arm(self) -> None:
        """Start to inject faults; called at the end of the warm-up."""
        self._armed = True

    def before_step(self) -> None:
        """Hang or raise if a fault occurs in this step; called before each step of a device."""
        if self._occurs("hang-step"):
            self._released.wait()
        if self._occurs("fail-step"):
            raise DecodeError("Injected failure of this step.")
        if self._occurs("out-of-memory"):
            raise DeviceMemoryError("Injected lack of device memory.")
        if self._occurs("poison-device"):
            raise DeviceLostError("Injected device failure.")

    def before_strip(self) -> None:
        """Raise if a fault occurs in this strip; called before each strip that is encoded."""
        if self._occurs("die-in-encoder"):
            raise RuntimeError("injected encoder failure")

    def release(self) -> None:
        """Release any injected hang."""
        self._released.set()

    def _occurs(self, fault: str) -> bool:
        """Count a call; return whether the fault occurs in it."""
        with self._lock:
            countdown = self._countdowns.get(fault)
            if not self._armed or countdown is None or countdown.count == 0:
                return False
            if countdown.delay:
                countdown.delay -= 1
                return False
            countdown.count -= 1
            return True


class FaultyRuntime:
    """A runtime with injected faults in its steps; see `Runtime` for the methods."""

    def __init__(self, runtime: Runtime, faults: Faults) -> None:
        self._runtime, self._faults, self.info = runtime, faults, runtime.info

    def warm_up(self) -> None:
        """Warm up the runtime."""
        self._runtime.warm_up()

    def start(self, sample: Sample) -> Slot:
        """Start a sample."""
        return self._runtime.start(sample)

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        """Inject the faults that occur in this step, then advance the slots."""
        self._faults.before_step()
        self._runtime.step(slots, indices)

    def preview(self, slot: Slot) -> np.ndarray:
        """Return the preview of an image."""
        return self._runtime.preview(slot)

    def finish(self, slot: Slot) -> Rows:
        """Finish an image."""
        return self._runtime.finish(slot)

    def release(self, slot: Slot) -> None:
        """Release a slot."""
        self._runtime.release(slot)

    def offload(self) -> None:
        """Move the weights to host memory."""
        self._runtime.offload()

    def restore(self) -> None:
        """Move the weights back to the device."""
        self._runtime.restore()

    def peak_memory(self) -> int | None:
        """Return the runtime's peak memory."""
        return self._runtime.peak_memory()

    def kernel_choices(self) -> Sequence[Choice]:
        """Return the runtime's measurements of kernels."""
        return self._runtime.kernel_choices()

    def close(self) -> None:
        """Close the runtime."""
        self._runtime.close()
