"""Report of a soak test: results by kind, usage of the server, and the checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtest.soak.kinds import REJECTED, Kind
from loadtest.soak.sender import LEFT
from loadtest.soak.usage import Usage, median_usage

_WINDOW = 60.0  # seconds at the start and at the end whose medians are compared; at most a third of the run each

_MAX_REJECTED = 5.0  # percent; a server that rejects everything would not be tested


@dataclass(frozen=True)
class Check:
    """A measured value, which must not exceed its bound."""

    name: str
    value: float
    at_most: float

    @property
    def passed(self) -> bool:
        """True if the value is within the bound."""
        return self.value <= self.at_most

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.name} <= {self.at_most:g}: {self.value:.4g}"


@dataclass(frozen=True)
class SoakReport:
    """Everything that was observed."""

    kinds: Sequence[Kind]
    results: Mapping[str, Counter[str]]  # by the name of the kind
    duration: float  # seconds from the first request to the last
    seconds: float  # seconds from the first request to the last response
    cpu_seconds: float  # of the client
    lag_p99_ms: float  # time by which the client sent requests late
    before: Usage  # of the idle server, before and after the load
    after: Usage
    samples: Sequence[Usage]  # during the load
    metrics: Mapping[str, float]  # of the idle server after the load; they should be 0
    exit_status: int  # of the server after SIGTERM
    memory_bound_mb: float

    @property
    def requests(self) -> int:
        """Number of requests sent."""
        return sum(counts.total() for counts in self.results.values())

    @property
    def passed(self) -> bool:
        """True if every check holds."""
        return all(check.passed for check in self.checks())

    def unexpected(self) -> dict[str, dict[str, int]]:
        """Return the number of results by kind that the kind does not expect."""
        expected = {kind.name: (*kind.expected, REJECTED) if kind.expected else (LEFT,) for kind in self.kinds}
        found = {
            name: {result: count for result, count in counts.items() if result not in expected[name]}
            for name, counts in self.results.items()
        }
        return {name: counts for name, counts in found.items() if counts}

    def periods(self) -> dict[str, Usage]:
        """Return the usage before the load, the medians of its beginning and end, and the usage after it."""
        end = self.duration
        window = min(_WINDOW, end / 3)
        return {
            "before": self.before,
            f"first {window:.0f} s": median_usage(self.samples, 0.0, window),
            f"last {window:.0f} s": median_usage(self.samples, end - window, end),
            "after": self.after,
        }

    def checks(self) -> tuple[Check, ...]:
        """Return all checks."""
        _, first, last, _ = self.periods().values()
        threads = [usage.threads for usage in (self.before, *self.samples, self.after)]
        unexpected = sum(sum(counts.values()) for counts in self.unexpected().values())
        rejected = sum(counts[REJECTED] for counts in self.results.values())
        return (
            Check("unexpected results", unexpected, 0),
            Check("rejected, % of all requests", 100 * rejected / self.requests, _MAX_REJECTED),
            Check("growth of memory, MB", last.memory_mb - first.memory_mb, self.memory_bound_mb),
            Check("descriptors left open", self.after.descriptors - self.before.descriptors, 0),
            Check("threads, most minus fewest", max(threads) - min(threads), 0),
            *(Check(name, value, 0) for name, value in self.metrics.items()),
            Check("exit status", abs(self.exit_status), 0),
        )

    def table(self) -> str:
        """Return the report as text."""
        width = max(map(len, self.results))
        lines = [
            f"{self.requests} requests in {self.duration:.0f} s ({self.requests / self.duration:.0f} per second); "
            f"client: {100 * self.cpu_seconds / self.seconds:.0f} % of a core, lag {self.lag_p99_ms:.0f} ms (p99)",
            "",
        ]
        for name, counts in self.results.items():
            lines.append(f"{name:<{width}}  {', '.join(f'{n} x {r}' for r, n in counts.most_common())}")
        lines += ["", f"{'':10}  {'memory MB':>9}  {'descriptors':>11}  {'threads':>7}"]
        for name, usage in self.periods().items():
            lines.append(f"{name:10}  {usage.memory_mb:9.1f}  {usage.descriptors:11g}  {usage.threads:7g}")
        lines += ["", *(f"UNEXPECTED  {name}: {counts}" for name, counts in self.unexpected().items())]
        return "\n".join([*lines, *map(str, self.checks())])
