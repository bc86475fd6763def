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
    STALLED = "stalled"  # a step takes far longer than predicted
    LOADING = "loading"  # a bundle is being replaced, without memory for both
    DRAINING = "draining"  # finishing admitted requests before the exit
    FAILED = "failed"  # a device is lost; the process has to be restarted


class Lifecycle:
    """State machine of the server: starting -> ready -> draining, and from each of them to failed.

    While a device is stalled, the server is in the state STALLED instead of READY, and while a decoder is unloaded, in
    the state LOADING.

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
        self._state = State.STARTING
        self._failure: str | None = None
        self._stall: str | None = None
        self._loading: str | None = None
        self._warming = devices
        self._on_ready, self._on_failure = on_ready, on_failure
        self._lock = threading.Lock()

    @property
    def state(self) -> State:
        """The current state."""
        if self._state is not State.READY:
            return self._state
        return State.STALLED if self._stall else State.LOADING if self._loading else State.READY

    @property
    def stalled(self) -> bool:
        """True while a device is stalled, in any state."""
        return self._stall is not None

    @property
    def reason(self) -> str | None:
        """Why the server has failed or is not ready, or None."""
        return self._failure or self._stall or self._loading

    def device_ready(self) -> None:
        """Record that a device is warm; after the last one, change from STARTING to READY."""
        with self._lock:
            self._warming -= 1
            if self._warming == 0 and self._state is State.STARTING:
                self._on_ready()
                self._state = State.READY

    def stall(self, reason: str | None) -> None:
        """Record why a device is stalled, or None if no device is."""
        with self._lock:
            if bool(reason) != bool(self._stall):
                log.warning(reason or "no device is stalled any longer")
            self._stall = reason

    def loading(self, reason: str | None) -> None:
        """Record why a decoder is unloaded, or None if all are loaded."""
        with self._lock:
            self._loading = reason

    def drain(self) -> bool:
        """Change to DRAINING. Return False, without effect, if the server has failed."""
        with self._lock:
            if self._state is State.FAILED:
                return False
            self._state = State.DRAINING
            return True

    def fail(self, reason: str) -> None:
        """Change to FAILED; no effect after the first call."""
        with self._lock:
            if self._state is State.FAILED:
                return
            self._state, self._failure = State.FAILED, reason
        self._on_failure()  # before the log, which allocates memory
        log.critical("the server failed; /health/live returns 503 until the process is restarted: %s", reason)
