"""Thread that checks the devices periodically, since a worker thread cannot check itself during a step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Watchdog:
    """Thread that calls `check` every `interval` seconds until it returns False or the watchdog stops."""

    def __init__(self, check: Callable[[], bool], interval: float) -> None:
        """Create the thread."""
        self._check, self._interval = check, interval
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread before its next check."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            try:
                if not self._check():
                    return
            except Exception:  # the watchdog must never stop silently
                log.exception("a check of the devices failed; it is repeated in %g s", self._interval)


def is_stuck(elapsed: float, predicted: float, factor: float, minimum: float) -> bool:
    """Return whether work of `predicted` seconds that has run for `elapsed` seconds counts as stuck."""
    return elapsed > max(minimum, factor * predicted)
