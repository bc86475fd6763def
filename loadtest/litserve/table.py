"""Results of the comparison with LitServe, and their presentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OURS, BARE = "this server", "bare server"

# Published keys of litserve.json that differ from the names of the fields.
KEYS = {"response": "answers"}


@dataclass(frozen=True)
class Measured:
    """Results of one server for one kind of response. Times are in milliseconds."""

    server: str
    response: str  # "encoded" for each request, or "pre-encoded"
    rounds: int
    throughput: float  # responses per second, median of the rounds
    throughput_range: tuple[float, float]  # minimum and maximum
    server_ms: float  # server CPU time per response at full throughput, median of the rounds
    client_ms: float  # client CPU time per response
    megabytes: float  # per response
    at_half_load: int  # number of responses measured at half of the throughput of the same round
    p50_ms: float  # latency at half load, over all rounds
    p99_ms: float
    beyond_encoding_ms: float  # p99 minus the time of one encoding on an idle thread
    errors: int


def table(measured: Sequence[Measured]) -> str:
    """Return the results as text, with ratios to the faster LitServe."""
    lines = [
        f"{'response':12} {'server':22} {'per second':>10} {'min, max':>13} {'cpu ms':>7} {'client':>7} {'MB':>5} "
        f"{'p50 ms':>7} {'p99 ms':>7} {'of':>6}"
    ]
    lines += map(_row, measured)
    lines += (
        _ratios([m for m in measured if m.response == name]) for name in dict.fromkeys(m.response for m in measured)
    )
    return "\n".join(lines)


def _row(m: Measured) -> str:
    minimum, maximum = m.throughput_range
    errors = f"  {m.errors} errors" if m.errors else ""
    return (
        f"{m.response:12} {m.server:22} {m.throughput:10.1f} {minimum:6.1f} {maximum:6.1f} {m.server_ms:7.1f} "
        f"{m.client_ms:7.1f} {m.megabytes:5.1f} {m.p50_ms:7.1f} {m.p99_ms:7.1f} {m.at_half_load:6}{errors}"
    )


def _ratios(measured: Sequence[Measured]) -> str:
    """Compare the servers, all for the same kind of response."""
    ours, bare = (next(m for m in measured if m.server == name) for name in (OURS, BARE))
    litserve = [m for m in measured if m not in (ours, bare)]
    throughput = max(m.throughput for m in litserve)
    lowest = min(litserve, key=lambda m: m.p99_ms)
    return (
        f"{ours.response}: {ours.throughput / throughput:.2f} times LitServe's throughput; p99 at half load "
        f"{ours.beyond_encoding_ms:.1f} ms beyond one encoding, {ours.p99_ms - bare.p99_ms:+.1f} ms compared with the "
        f"{BARE} at the same load; LitServe's {lowest.beyond_encoding_ms:.1f} ms beyond one encoding"
    )
