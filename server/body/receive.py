"""Receiving of bodies: limits of size, time and memory, and parsing that does not hold up other requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import TypeVar

from server.body.headers import too_large
from server.errors import BodyMemoryError, BodyTimeoutError, MalformedBodyError, count_of

T = TypeVar("T")

SMALL_BODY = 512 * 1024  # bytes; larger bodies are parsed on a thread


class BodyMemory:
    """Bytes of the bodies of all requests, from their arrival until they are parsed. Use it on the event loop."""

    def __init__(self, limit: int) -> None:
        """Start without bodies; `limit` is in bytes."""
        self.bytes = 0
        self._limit = limit

    @contextmanager
    def reserve(self, expected: int) -> Iterator[Reservation]:
        """Hold the memory of one body, which is released at the end of the context.

        Raises:
            BodyMemoryError: `expected` bytes do not fit now. Only bytes that arrive count against the limit, because
                otherwise clients could use it up without sending anything.
        """
        reservation = Reservation(self)
        reservation.check(expected)
        try:
            yield reservation
        finally:
            self.bytes -= reservation.bytes

    def fits(self, nbytes: int) -> bool:
        """Return whether `nbytes` more are within the limit."""
        return self.bytes + nbytes <= self._limit


class Reservation:
    """Memory of one body. A body of any size fits if there is no other."""

    def __init__(self, memory: BodyMemory) -> None:
        self.bytes = 0
        self._memory = memory

    def check(self, nbytes: int) -> None:
        """Raise BodyMemoryError if `nbytes` more do not fit."""
        if self._memory.bytes > self.bytes and not self._memory.fits(nbytes):
            raise BodyMemoryError("The bodies of other requests use all memory for bodies; retry later.")

    def add(self, nbytes: int) -> None:
        """Reserve `nbytes` more. Raises BodyMemoryError if they do not fit."""
        self.check(nbytes)
        self.bytes += nbytes
        self._memory.bytes += nbytes


class BodyReader:
    """Reads the bodies of all requests of a server."""

    def __init__(self, max_bytes: int, memory: BodyMemory, timeout: float, threads: Executor) -> None:
        """Create a reader.

        Args:
            max_bytes: Limit of one body.
            memory: Memory of all bodies.
            timeout: Seconds in which a body must arrive.
            threads: Parse large bodies.
        """
        self._max_bytes, self._memory, self._timeout, self._threads = max_bytes, memory, timeout, threads
        self._parsing = asyncio.Lock()

    async def read(
        self, chunks: AsyncIterator[bytes], content_length: int | None, parse: Callable[[bytearray], T]
    ) -> T:
        """Receive a body of the declared length, if it has one, and return what `parse` returns for it.

        Raises:
            BodyTimeoutError: the body did not arrive in time.
            BodyTooLargeError, BodyMemoryError, MalformedBodyError: as `receive`.
            PidError: as `parse`.
        """
        with self._memory.reserve(content_length or 0) as reservation:
            try:
                async with asyncio.timeout(self._timeout):
                    body = await receive(chunks, content_length, self._max_bytes, reservation)
            except TimeoutError:
                raise BodyTimeoutError(
                    f"The body took longer than {self._timeout:g} s to arrive; send it faster."
                ) from None
            if len(body) <= SMALL_BODY:
                return parse(body)
            async with self._parsing:  # one after the other, because parsing needs more than twice the memory of a body
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._threads, parse, body)


async def receive(
    chunks: AsyncIterator[bytes], content_length: int | None, limit: int, reservation: Reservation
) -> bytearray:
    """Receive a body of at most `limit` bytes, counting received bytes and not trusting Content-Length.

    Raises:
        BodyTooLargeError: the bytes received so far exceed the limit.
        BodyMemoryError: they do not fit into the memory of all bodies.
        MalformedBodyError: their number differs from Content-Length.
    """
    body = bytearray()
    async for chunk in chunks:
        if len(body) + len(chunk) > limit:
            raise too_large(limit)
        reservation.add(len(chunk))
        body += chunk
    if content_length is not None and content_length != len(body):
        raise MalformedBodyError(
            f"The body has {count_of(len(body), 'byte')} but Content-Length is {content_length}; they must match."
        )
    return body
