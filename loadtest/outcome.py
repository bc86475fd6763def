"""Outcomes of requests: how each one ended, as its client saw it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.http_client import HttpExchange
from loadtest.schedule import Arrival

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk of every PNG
_ENDS = {"png": PNG_END, "jpeg": b"\xff\xd9"}  # last bytes, by format; other formats have no end marker
NO_CONNECTION = "no connection"  # how the reason of an attempt begins that never reached the server


class OutcomeKind(enum.StrEnum):
    """Kind of outcome. The values are those of report.json."""

    IN_TIME = "in time"
    LATE = "late"
    REJECTED = "refused"
    DISCONNECTED = "left"
    ERROR = "error"

    @property
    def label(self) -> str:
        """The kind in the words of the tables."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class Failure:
    """A failed attempt that the client retried. Times are seconds after the start of the run."""

    sent: float
    ended: float
    status: int = 0  # HTTP status; 0 if no response began
    reason: str = ""  # why the response is incomplete; empty if it is complete


@dataclass(frozen=True)
class Outcome:
    """The end of one request. Times are seconds after the start of the run."""

    at: float  # intended send time
    name: str  # name of the request class
    kind: OutcomeKind
    lag: float  # seconds from the intended to the actual send time, caused by the generator
    latency: float | None = None  # seconds from the intended send time to the last byte; None without a response
    first_byte: float | None = None  # seconds from the intended send time
    status: int = 0
    size: int = 0  # bytes of the response body
    error: str = ""
    expired: bool = False  # admitted, then cancelled by the server because the deadline passed
    failures: tuple[Failure, ...] = ()  # attempts before the last one

    @property
    def end(self) -> float:
        """Time of the last byte."""
        return self.at + (self.latency or 0.0)

    @property
    def has_image(self) -> bool:
        """True if the client received a complete response, in time or late."""
        return self.kind in (OutcomeKind.IN_TIME, OutcomeKind.LATE) and not self.expired and self.latency is not None


def classify(
    arrival: Arrival, exchange: HttpExchange, began: float, deadline: float | None, failures: Sequence[Failure] = ()
) -> Outcome:
    """Classify a finished request.

    Args:
        arrival: The request as scheduled.
        exchange: Its last HTTP exchange.
        began: Start of the run on `time.perf_counter`.
        deadline: Seconds after the intended send time, or None.
        failures: The attempts before the last one.
    """
    start = began + arrival.at
    sent = began + failures[0].sent if failures else exchange.sent
    latency = None if exchange.done is None else exchange.done - start
    kind, error = _kind(arrival, exchange, latency, deadline)
    return Outcome(
        at=arrival.at,
        name=arrival.kind.name,
        kind=kind,
        lag=max(0.0, sent - start) if sent else 0.0,
        latency=latency,
        first_byte=None if exchange.first_byte is None else exchange.first_byte - start,
        status=exchange.status,
        size=exchange.size,
        error=error,
        expired=kind is OutcomeKind.LATE and (exchange.status == 504 or not exchange.complete),
        failures=tuple(failures),
    )


def _kind(
    arrival: Arrival, exchange: HttpExchange, latency: float | None, deadline: float | None
) -> tuple[OutcomeKind, str]:
    """Return the kind of outcome and, for errors, the reason."""
    if exchange.disconnected:
        return OutcomeKind.DISCONNECTED, ""
    if not exchange.complete and exchange.done is not None:
        if arrival.kind.read_after is not None:
            return OutcomeKind.DISCONNECTED, ""  # by the server, as it should
        if exchange.status == 200 and deadline is not None and latency is not None and latency >= deadline:
            return OutcomeKind.LATE, ""  # the server cancelled it during the response, which has no other sign
    error = _error(arrival, exchange)
    if error:
        return OutcomeKind.ERROR, error
    if exchange.status == 429:
        return OutcomeKind.REJECTED, ""
    if exchange.status == 504 or (deadline is not None and latency is not None and latency > deadline):
        return OutcomeKind.LATE, ""
    return OutcomeKind.IN_TIME, ""


def _error(arrival: Arrival, exchange: HttpExchange) -> str:
    if not exchange.complete:
        return exchange.reason or "incomplete response"
    if exchange.status in (429, 504):
        return ""
    if exchange.status != 200:
        return f"status {exchange.status}"
    if exchange.failed_parts:
        return "an image of a multipart response failed"
    if arrival.kind.images == 1 and not exchange.tail.endswith(_ENDS.get(arrival.kind.format, b"")):
        return "the image is truncated"
    return ""
