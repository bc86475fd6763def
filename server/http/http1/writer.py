"""Writing to a client that may read slowly or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.settings import READ_RATE_WINDOW

_CHECKS = 10  # per window


class Writer:
    """Writes to a transport and reports a client that reads too slowly.

    Time counts only while bytes wait for the client; time during which the application has nothing to send does not.
    """

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        loop: asyncio.AbstractEventLoop,
        timeout: float,
        min_rate: float,
        on_slow: Callable[[str], None],
    ) -> None:
        """Wrap `transport`.

        Args:
            transport: Transport to write to.
            loop: Its event loop.
            timeout: Seconds that one response may wait for the client.
            min_rate: Bytes per second that the client must read, measured over `READ_RATE_WINDOW`.
            on_slow: Called with the name of the limit that the client has exceeded.
        """
        self._transport, self._loop = transport, loop
        self._timeout, self._min_rate, self._on_slow = timeout, min_rate, on_slow
        self._written = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._check: asyncio.TimerHandle | None = None
        self._interval = min(READ_RATE_WINDOW, timeout) / _CHECKS
        self._waited = self._last_check = self._window_start = 0.0
        self._window_flushed = 0

    def begin_response(self) -> None:
        """Start to count the time of a response."""
        self._waited = 0.0

    def write(self, data: bytes) -> None:
        """Write without waiting."""
        was_empty = not self._transport.get_write_buffer_size()
        self._transport.write(data)
        self._written += len(data)
        if was_empty and self._transport.get_write_buffer_size():
            self._last_check = self._window_start = self._loop.time()
            self._window_flushed = self._flushed()
            if self._check is None:
                self._check = self._loop.call_later(self._interval, self._on_check)

    async def drain(self) -> None:
        """Wait until the client has read most of what was written, or has disconnected."""
        await self._writable.wait()

    def pause(self) -> None:
        """Make `drain` wait; called when the transport's buffer is full."""
        self._writable.clear()

    def resume(self) -> None:
        """End the waits of `drain`; called when the buffer has room again, and when the connection is lost."""
        self._writable.set()

    def close(self) -> None:
        """End all waits and checks."""
        self.resume()
        if self._check is not None:
            self._check.cancel()
            self._check = None

    def _flushed(self) -> int:
        return self._written - self._transport.get_write_buffer_size()

    def _on_check(self) -> None:
        self._check = None
        if not self._transport.get_write_buffer_size():
            return
        now = self._loop.time()
        self._waited += now - self._last_check
        self._last_check = now
        if self._waited >= self._timeout:
            self._on_slow("response-timeout")
            return
        if now - self._window_start >= READ_RATE_WINDOW:
            if self._flushed() - self._window_flushed < self._min_rate * (now - self._window_start):
                self._on_slow("read-rate")
                return
            self._window_start, self._window_flushed = now, self._flushed()
        self._check = self._loop.call_later(self._interval, self._on_check)
