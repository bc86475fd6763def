"""Accounting of admitted requests until their responses are delivered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from server.dispatch import Clock, DecodeJob, Dispatcher
from server.errors import ClientShareError, QueueFullError
from server.stream import ImageStream


class Undelivered:
    """Open requests, and the bytes that are held in memory until their clients have read them.

    All methods are called on the event loop; the properties may be read from any thread.
    """

    def __init__(self, limit: int, read_timeout: float, dispatcher: Dispatcher, clock: Clock) -> None:
        """Start without open requests.

        Args:
            limit: Maximum number of bytes held.
            read_timeout: Seconds without progress after which a client that stops reading is disconnected.
            dispatcher: Holds the jobs of the requests.
            clock: The clock of the dispatcher.
        """
        self._limit, self._read_timeout, self._dispatcher, self._clock = limit, read_timeout, dispatcher, clock
        self._open: dict[Admission, None] = {}  # in order of admission
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def requests(self) -> int:
        """Number of open requests."""
        return len(self._open)

    @property
    def bytes(self) -> int:
        """Number of bytes held for all open requests."""
        return sum(admission.held for admission in list(self._open))

    def check(self, client: str, nbytes: int) -> None:
        """Check that `client` may have `nbytes` more held.

        One client may hold at most as much as it leaves free; the client "" stands for all and may hold everything. A
        request of any size fits if the client, or the server in the case of the limit, holds no other.

        Raises:
            QueueFullError: they exceed the limit.
            ClientShareError: they exceed the client's share.
        """
        held = {admission: admission.held for admission in self._open}
        total, own = sum(held.values()), _of(client, held)
        if self._fits(client, nbytes, total, own):
            return
        wait = self._wait(client, nbytes, held)
        used = f"{total / 2**20:.0f} of {self._limit / 2**20:.0f} MiB"
        if total + nbytes > self._limit:
            raise QueueFullError(f"Undelivered responses use {used}; retry later.", wait)
        raise ClientShareError(
            f"Undelivered responses use {used}, {own / 2**20:.0f} MiB of them by this client, which is its share; "
            "read them and retry.",
            wait,
        )

    def next_end(self, client: str) -> float | None:
        """Return the predicted seconds until a request of `client` ends, or None if it has none."""
        ends = self._ends(admission for admission in self._open if admission.client == client)
        return min(ends.values(), default=None)

    def admit(self, jobs: tuple[DecodeJob, ...], nbytes: int) -> Admission:
        """Add a request, whose `jobs` the dispatcher has admitted; `nbytes` is the size of the pixels of each."""
        admission = Admission(jobs, nbytes, self, self._clock)
        self._open[admission] = None
        self._empty.clear()
        return admission

    def remove(self, admission: Admission) -> None:
        """Remove a request, delivered or not, and cancel its unfinished images."""
        del self._open[admission]
        unfinished = [job for job in admission.jobs if not job.payload.stream.ended]
        if unfinished:
            self._dispatcher.cancel(unfinished)
        if not self._open:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Return once no request is open."""
        await self._empty.wait()

    def _fits(self, client: str, nbytes: int, total: int, own: int) -> bool:
        free = self._limit - total - nbytes
        return (not total or free >= 0) and (not client or not own or own + nbytes <= free)

    def _wait(self, client: str, nbytes: int, held: Mapping[Admission, int]) -> float:
        """Return the predicted seconds until enough requests have ended for `nbytes` to fit."""
        total, own, wait = sum(held.values()), _of(client, held), 0.0
        for admission, seconds in sorted(self._ends(held).items(), key=lambda item: item[1]):
            wait, total = seconds, total - held[admission]
            own -= held[admission] * (admission.client == client)
            if self._fits(client, nbytes, total, own):
                break
        return wait

    def _ends(self, admissions: Iterable[Admission]) -> dict[Admission, float]:
        """Return the predicted seconds until each request ends, because its client has read it or is disconnected."""
        now = self._clock()
        decoded = self._dispatcher.query(lambda scheduler: scheduler.ends(now))
        seconds = {}
        for admission in admissions:
            end = max((decoded[job] for job in admission.jobs if job in decoded), default=now)
            seconds[admission] = end - now + admission.seconds_to_read(self._read_timeout)
        return seconds


class Admission:
    """The admitted images of one request, in order. They count as undelivered until `release`."""

    def __init__(self, jobs: tuple[DecodeJob, ...], nbytes: int, undelivered: Undelivered, clock: Clock) -> None:
        """Describe a request; see `Undelivered.admit`."""
        self.jobs = jobs
        self.client = jobs[0].client
        self._nbytes, self._undelivered, self._clock = nbytes, undelivered, clock
        self._delivered = 0
        self._began: float | None = None  # when the response began
        self._progressed = 0.0  # when bytes of it last left the server's memory
        self._released = False

    @property
    def streams(self) -> tuple[ImageStream, ...]:
        """The streams of the images."""
        return tuple(job.payload.stream for job in self.jobs)

    @property
    def held(self) -> int:
        """Bytes held for the request: the pixels of each image until it is encoded, then what is not delivered."""
        return max(0, sum(s.pushed if s.ended else self._nbytes for s in self.streams) - self._delivered)

    def delivered(self, nbytes: int) -> None:
        """Record that `nbytes` more of the encoded images have left the server's memory.

        Calls before any image has bytes are ignored: the time until then says nothing about the speed of the client.
        """
        if not any(stream.pushed for stream in self.streams):
            return
        now = self._clock()
        if self._began is None:
            self._began = self._progressed = now
        if nbytes:
            self._progressed = now
        self._delivered += nbytes

    def seconds_to_read(self, timeout: float) -> float:
        """Return how long the client will probably read what is held, at most until `timeout` disconnects it."""
        if self._began is None:
            return 0.0
        now = self._clock()
        elapsed = now - self._began
        at_this_rate = elapsed * self.held / self._delivered if self._delivered else elapsed
        return max(0.0, min(at_this_rate, timeout - (now - self._progressed)))

    def release(self) -> None:
        """End the request, delivered or not, and cancel its unfinished images.

        Call it on the event loop; further calls have no effect.
        """
        if not self._released:
            self._released = True
            self._undelivered.remove(self)


def _of(client: str, held: Mapping[Admission, int]) -> int:
    return sum(nbytes for admission, nbytes in held.items() if admission.client == client)
