"""What `loadtest.litserve.__main__` measured of each server, and how it says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OURS, FLOOR = "this server", "nothing but the answer"


@dataclass(frozen=True)
class Measured:
    """One server with one kind of answer: medians of its rounds, latencies of all of them. Times in milliseconds."""

    server: str
    answers: str
    rounds: int
    throughput: float  # answers a second
    throughput_range: tuple[float, float]
    server_ms: float  # processor time of an answer at full throughput
    client_ms: float
    megabytes: float  # of one answer
    at_half_load: int  # answers, at half of the throughput of the same round
    p50_ms: float
    p99_ms: float
    beyond_encoding_ms: float  # p99 less what one encoding takes on an idle thread
    errors: int


def table(measured: Sequence[Measured]) -> str:
    """Numbers and ratios as text; ratios against the faster LitServe."""
    lines = [
        f"{'answers':12} {'server':22} {'per second':>10} {'least, most':>13} {'cpu ms':>7} {'client':>7} {'MB':>5} "
        f"{'p50 ms':>7} {'p99 ms':>7} {'of':>6}"
    ]
    lines += [
        f"{m.answers:12} {m.server:22} {m.throughput:10.1f} {m.throughput_range[0]:6.1f} {m.throughput_range[1]:6.1f} "
        f"{m.server_ms:7.1f} {m.client_ms:7.1f} {m.megabytes:5.1f} {m.p50_ms:7.1f} {m.p99_ms:7.1f} {m.at_half_load:6}"
        + (f"  {m.errors} errors" if m.errors else "")
        for m in measured
    ]
    for answers in dict.fromkeys(m.answers for m in measured):
        ours, floor = (next(m for m in measured if (m.answers, m.server) == (answers, name)) for name in (OURS, FLOOR))
        others = [m for m in measured if m.answers == answers and m not in (ours, floor)]
        best, quickest = max(others, key=lambda m: m.throughput), min(others, key=lambda m: m.p99_ms)
        lines.append(
            f"{answers}: {ours.throughput / best.throughput:.2f} times LitServe's throughput; p99 at half load "
            f"{ours.beyond_encoding_ms:.1f} ms beyond one encoding, {ours.p99_ms - floor.p99_ms:+.1f} ms beside "
            f"{FLOOR} at the same load; LitServe's {quickest.beyond_encoding_ms:.1f} ms beyond one encoding"
        )
    return "\n".join(lines)
