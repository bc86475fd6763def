"""A thread that looks after the device threads, which cannot do so themselves while they are at a step."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Watchdog:
    """Calls `look` every `interval` seconds until stopped, or until it returns False."""

    def __init__(self, look: Callable[[], bool], interval: float) -> None:
        self._look, self._interval = look, interval
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval) and self._look():
            pass


def is_stuck(seconds: float, predicted: float, factor: float, floor: float) -> bool:
    """Whether work that was predicted to take `predicted` seconds, and has taken `seconds`, will never be done."""
    return seconds > max(floor, factor * predicted)
