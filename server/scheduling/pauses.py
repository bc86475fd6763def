"""Pauses of the whole process, which are neither work nor a failure of a device."""

from __future__ import annotations

from collections import deque

TOLERANCE = 1.0  # seconds by which a busy machine may delay a thread


class Pauses:
    """Recent periods in which the process did not run: stopped, starved, or frozen with its virtual machine.

    A thread calls `wake` about every `interval` seconds. If a call is late by more than TOLERANCE, the process was
    paused.
    """

    def __init__(self, interval: float) -> None:
        """Start without pauses; none is detected before the first `wake`."""
        self._interval = interval
        self._woken: float | None = None
        self._pauses: deque[tuple[float, float]] = deque(maxlen=100)

    def wake(self, now: float) -> None:
        """Record that the calling thread runs."""
        self._pauses.extend(self._unrecorded(now))
        self._woken = now

    def seconds(self, start: float, end: float) -> float:
        """Return the seconds between `start` and `end` (now or earlier) in which the process was paused.

        Another thread may ask before the first `wake` after a pause.
        """
        pauses = (*self._pauses, *self._unrecorded(end))
        return sum(max(0.0, min(end, until) - max(start, since)) for since, until in pauses)

    def _unrecorded(self, now: float) -> list[tuple[float, float]]:
        """Return the pause since the last `wake`, if there was one."""
        if self._woken is None or now - self._woken <= self._interval + TOLERANCE:
            return []
        return [(self._woken + self._interval, now)]
