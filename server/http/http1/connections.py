"""The open connections of a server: their limit and their counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from server.metrics import Metrics
from server.settings import Settings

RESERVE = 32  # connections over the limit that are still served, for probes


class Evictable(Protocol):
    """A connection that can be aborted."""

    def abort(self, reason: str) -> None:
        """Abort the connection and count `reason`."""


class Connections:
    """The open connections. Once the limit is reached, a new one replaces the one that has been idle longest.

    Idle means that no request is in progress: the connection waits for the head of a request, or lingers after its last
    response.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: set[Evictable] = set()
        self._idle: OrderedDict[Evictable, None] = OrderedDict()

    def add(self, connection: Evictable) -> int:
        """Add a connection; return by how many the limit is exceeded, at most 0 unless all others are in use."""
        if len(self._open) >= self._limit and self._idle:
            oldest = next(iter(self._idle))
            self.remove(oldest)
            oldest.abort("evicted")
        self._open.add(connection)
        return len(self._open) - self._limit

    def remove(self, connection: Evictable) -> None:
        """Remove a connection; no effect if it has been removed."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def set_idle(self, connection: Evictable, idle: bool) -> None:
        """Record that a connection is idle from now on, or in use."""
        if not idle:
            self._idle.pop(connection, None)
        elif connection in self._open:
            self._idle.setdefault(connection)

    def idle(self) -> int:
        """Return the number of idle connections. May be called from any thread."""
        return len(self._idle)

    def active(self) -> int:
        """Return the number of connections with a request in progress. May be called from any thread."""
        return max(0, len(self._open) - len(self._idle))


@dataclass(frozen=True)
class HttpContext:
    """What the connections of a server share."""

    settings: Settings
    metrics: Metrics
    connections: Connections
    max_wire_bytes: int  # of a chunked body with its framing
    is_draining: Callable[[], bool]
