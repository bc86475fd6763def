"""A timer that is set again with every request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls a function once a time has passed, unless the deadline is moved or cleared before.

    To move it costs little, because a timer of the event loop that ends too early is kept and started again.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expiry: Callable[[str], None]) -> None:
        """Begin without a deadline; `on_expiry` is called with the reason that `set` was given."""
        self._loop, self._on_expiry = loop, on_expiry
        self._at, self._reason = float("inf"), ""
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float, reason: str) -> None:
        """Move the deadline to `seconds` from now."""
        self._at, self._reason = self._loop.time() + seconds, reason
        if self._timer is None or self._timer.when() > self._at:
            self._start()

    def clear(self) -> None:
        """Remove the deadline."""
        self._at = float("inf")

    def close(self) -> None:
        """Remove the deadline and the timer."""
        self.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._loop.time() >= self._at:
            self._on_expiry(self._reason)
        elif self._at < float("inf"):
            self._start()
