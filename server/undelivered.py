"""Accounting of admitted requests whose response has not been delivered yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.errors import QueueFullError


class Undelivered:
    """Number of open requests and bytes of their pixels, which stay in memory until the client has read them.

    All methods are called on the event loop.
    """

    def __init__(self, limit: int) -> None:
        """Create an empty account; `limit` is in bytes."""
        self.requests = self.bytes = 0
        self._limit = limit
        self._empty = asyncio.Event()
        self._empty.set()

    def check(self, nbytes: int, retry_after: Callable[[], float]) -> None:
        """Raise QueueFullError if `nbytes` more exceed the limit; one request always fits, whatever its size."""
        if self.bytes and self.bytes + nbytes > self._limit:
            held = f"{self.bytes / 2**20:.0f} of {self._limit / 2**20:.0f} MiB"
            raise QueueFullError(f"Undelivered responses use {held}; retry later.", retry_after())

    def add(self, nbytes: int) -> None:
        """Add an open request."""
        self.requests += 1
        self.bytes += nbytes
        self._empty.clear()

    def remove(self, nbytes: int) -> None:
        """Remove a request, delivered or not."""
        self.requests -= 1
        self.bytes -= nbytes
        if not self.requests:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Return once no request is open."""
        await self._empty.wait()
