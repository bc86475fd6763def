"""Accounting of admitted requests until their responses are delivered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.dispatch import DecodeJob, Dispatcher
from server.errors import QueueFullError
from server.stream import ImageStream


class Undelivered:
    """Number of open requests and bytes of their pixels, which stay in memory until the client has read them.

    All methods are called on the event loop.
    """

    def __init__(self, limit: int) -> None:
        """Start without open requests; `limit` is in bytes."""
        self.requests = self.bytes = 0
        self._limit = limit
        self._empty = asyncio.Event()
        self._empty.set()

    def check(self, nbytes: int, retry_after: Callable[[], float]) -> None:
        """Raise QueueFullError if `nbytes` more exceed the limit. A request of any size fits if no other is open."""
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


class Admission:
    """The admitted images of one request, in order. They count as undelivered until `release`."""

    def __init__(
        self, jobs: tuple[DecodeJob, ...], nbytes: int, dispatcher: Dispatcher, undelivered: Undelivered
    ) -> None:
        """Add `jobs`, which `dispatcher` has admitted, to `undelivered`; `nbytes` is the size of their pixels."""
        self.jobs = jobs
        self._nbytes, self._dispatcher, self._undelivered = nbytes, dispatcher, undelivered
        self._released = False
        undelivered.add(nbytes)

    @property
    def streams(self) -> tuple[ImageStream, ...]:
        """The streams of the images."""
        return tuple(job.payload.stream for job in self.jobs)

    def release(self) -> None:
        """End the request, delivered or not, and cancel its unfinished images.

        Call it on the event loop; further calls have no effect.
        """
        if self._released:
            return
        self._released = True
        unfinished = [job for job in self.jobs if not job.payload.stream.ended]
        if unfinished:
            self._dispatcher.cancel(unfinished)
        self._undelivered.remove(self._nbytes)
