"""Fault injection, to test that every request gets a response even if something fails; not allowed in production."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from engines.errors import DecodeError, DeviceLostError, DeviceMemoryError
from engines.runtime.protocol import Rows, Runtime, Sample, Slot

FAULTS = ("fail-step", "hang-step", "poison-device", "out-of-memory", "die-in-encoder")
_FAULT = re.compile(r"([a-z-]+)(?:=(\d{1,6}))?(?:@(\d{1,6}))?")


@dataclass
class _Plan:
    """When a fault occurs, counted in calls of the place where it does."""

    delay: int  # calls that still succeed
    count: int  # calls that then fail


class Faults:
    """Faults from a list such as `fail-step=2@10,hang-step`: after ten steps, two fail; the first step hangs.

    Counting starts with `arm`. All methods may be called from any thread.
    """

    def __init__(self, text: str) -> None:
        """Parse a comma-separated list of faults, each with an optional count and delay.

        Raises:
            ValueError: the list is invalid; the message is for users.
        """
        self._lock = threading.Lock()
        self._plans: dict[str, _Plan] = {}
        self._armed = False
        self._released = threading.Event()
        for item in filter(None, (item.strip() for item in text.split(","))):
            match = _FAULT.fullmatch(item)
            if match is None or match[1] not in FAULTS:
                raise ValueError(
                    f"{item[:40]!r} is not a fault; use {', '.join(FAULTS)}, with count and delay as in fail-step=2@10"
                )
            self._plans[match[1]] = _Plan(delay=int(match[3] or 0), count=int(match[2] or 1))

    def __bool__(self) -> bool:
        return bool(self._plans)

    def arm(self) -> None:
        """Start to inject faults; called at the end of the warm-up."""
        self._armed = True

    def before_step(self) -> None:
        """Hang or raise if a step's fault is due; called before each step of a device."""
        if self._due("hang-step"):
            self._released.wait()
        if self._due("fail-step"):
            raise DecodeError("Injected failure of this step.")
        if self._due("out-of-memory"):
            raise DeviceMemoryError("Injected lack of device memory.")
        if self._due("poison-device"):
            raise DeviceLostError("Injected device failure.")

    def before_strip(self) -> None:
        """Raise if an encoder fault is due; called before each strip that is encoded."""
        if self._due("die-in-encoder"):
            raise RuntimeError("injected encoder failure")

    def release(self) -> None:
        """Release any injected hang."""
        self._released.set()

    def _due(self, fault: str) -> bool:
        """Count a call; return whether the fault occurs in it."""
        with self._lock:
            plan = self._plans.get(fault)
            if not self._armed or plan is None or plan.count == 0:
                return False
            if plan.delay:
                plan.delay -= 1
                return False
            plan.count -= 1
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
        """Inject the faults that are due, then advance the slots."""
        self._faults.before_step()
        self._runtime.step(slots, indices)

    def finish(self, slot: Slot) -> Rows:
        """Finish an image."""
        return self._runtime.finish(slot)

    def release(self, slot: Slot) -> None:
        """Release a slot."""
        self._runtime.release(slot)

    def peak_memory(self) -> int | None:
        """Return the runtime's peak memory."""
        return self._runtime.peak_memory()

    def close(self) -> None:
        """Close the runtime."""
        self._runtime.close()
