"""State of the server process, as /health reports it."""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class State(enum.StrEnum):
    """State of the server."""

    STARTING = "starting"  # devices are warming up
    READY = "ready"
    DRAINING = "draining"  # finishing admitted requests before the exit
    FAILED = "failed"  # a device is lost; the process has to be restarted


class Lifecycle:
    """State machine of the server: starting -> ready -> draining, and from each of them to failed.

    Methods may be called from any thread.
    """

    def __init__(
        self, devices: int, on_ready: Callable[[], None] = lambda: None, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        """Start in the state STARTING.

        Args:
            devices: Number of devices to warm up.
            on_ready: Called just before the state becomes READY; until it returns, no other state change can happen.
            on_failure: Called once, on the first failure.
        """
        self.state = State.STARTING
        self.reason: str | None = None  # why the state is FAILED
        self._warming = devices
        self._on_ready, self._on_failure = on_ready, on_failure
        self._lock = threading.Lock()

    def device_ready(self) -> None:
        """Record that a device is warm; after the last one, change from STARTING to READY."""
        with self._lock:
            self._warming -= 1
            if self._warming == 0 and self.state is State.STARTING:
                self._on_ready()
                self.state = State.READY

    def drain(self) -> bool:
        """Change to DRAINING. Return False, without effect, if the server has failed."""
        with self._lock:
            if self.state is State.FAILED:
                return False
            self.state = State.DRAINING
            return True

    def fail(self, reason: str) -> None:
        """Change to FAILED; no effect after the first call."""
        with self._lock:
            if self.state is State.FAILED:
                return
            self.state, self.reason = State.FAILED, reason
        self._on_failure()  # before the log, which allocates memory
        log.critical("the server failed; /health/live returns 503 until the process is restarted: %s", reason)
