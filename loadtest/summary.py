"""From outcomes to numbers: percentiles, shares, goodput, and whether the scenario's thresholds hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.errors import ConfigError
from loadtest.generator import Outcome, Run
from loadtest.scenario import RequestClass, Scenario, Threshold
from loadtest.schedule import Capacity
from loadtest.scrape import Sample

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_MB = 1e6


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least `q` percent do not exceed (nearest rank); NaN of nothing."""
    if not values:
        return math.nan
    rank = max(1, math.ceil(len(values) * q / 100 - 1e-9))
    return sorted(values)[rank - 1]


@dataclass(frozen=True)
class ClassSummary:
    """One class of the mix, or all of them. Times in milliseconds, from the intended send time."""

    name: str
    sent: int
    in_time: int
    late: int  # whole answers after their deadline, and those the server gave up for theirs
    refused: int
    left: int
    errors: int
    latency_ms: dict[float, float]  # of whole answers, by percentile
    refusal_p99_ms: float
    goodput: float  # answers within their deadline a second

    @property
    def admitted(self) -> int:
        """Requests that were taken on and whose clients stayed."""
        return self.in_time + self.late + self.errors


@dataclass(frozen=True)
class Check:
    threshold: Threshold
    value: float
    passed: bool


@dataclass(frozen=True)
class Summary:
    total: ClassSummary
    classes: tuple[ClassSummary, ...]
    errors: dict[str, int]
    measures: dict[str, float]  # of the whole run
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def summarise(
    scenario: Scenario,
    capacity: Capacity,
    run: Run,
    samples: Sequence[Sample],
    baseline: Run | None = None,
    more: Mapping[str, float] | None = None,
) -> Summary:
    """Numbers of a run, without its warm-up, and `more` that thresholds may name.

    Raises ConfigError for a threshold on a measure that does not exist.
    """
    counted = [outcome for outcome in run.outcomes if outcome.at >= scenario.warm_up]
    total = _summary("all", run.outcomes, scenario)
    classes = tuple(
        _summary(kind.name, [o for o in run.outcomes if o.name == kind.name], scenario) for kind in scenario.mix
    )
    errors = Counter(outcome.error for outcome in counted if outcome.kind == "error")
    measures = {**_measures(scenario, capacity, run, samples, counted), **(more or {})}
    if baseline is not None:
        reference = [o for o in baseline.outcomes if o.at >= scenario.warm_up]
        measures["baseline_p99_ms"] = 1000 * percentile(_latencies(reference), 99)
        measures["p99_of_baseline"] = total.latency_ms[99.0] / measures["baseline_p99_ms"]
    kinds = {kind.name: kind for kind in scenario.mix}
    checks = []
    for threshold in scenario.thresholds:
        value = _measure(threshold, total, classes, measures, kinds, capacity)
        checks.append(Check(threshold, value, threshold.holds(value)))
    return Summary(total, classes, dict(errors), measures, tuple(checks))


_OF_CLASS: dict[str, Callable[[ClassSummary], float]] = {
    "p50_ms": lambda s: s.latency_ms[50.0],
    "p90_ms": lambda s: s.latency_ms[90.0],
    "p99_ms": lambda s: s.latency_ms[99.0],
    "p999_ms": lambda s: s.latency_ms[99.9],
    "refusal_p99_ms": lambda s: s.refusal_p99_ms,
    "goodput": lambda s: s.goodput,
    "errors": lambda s: float(s.errors),
    "late": lambda s: float(s.late),
    "refused": lambda s: float(s.refused),
    "in_time_of_admitted": lambda s: s.in_time / s.admitted if s.admitted else math.nan,
    "in_time_of_sent": lambda s: s.in_time / (s.sent - s.left) if s.sent > s.left else math.nan,
}


def _measure(
    threshold: Threshold,
    total: ClassSummary,
    classes: Sequence[ClassSummary],
    measures: dict[str, float],
    kinds: dict[str, RequestClass],
    capacity: Capacity,
) -> float:
    summary = next((s for s in classes if s.name == threshold.of), total)
    if threshold.measure == "p99_services" and threshold.of is not None:
        return summary.latency_ms[99.0] / 1000 / capacity.service(kinds[threshold.of])
    if threshold.measure in _OF_CLASS:
        return _OF_CLASS[threshold.measure](summary)
    if threshold.of is None and threshold.measure in measures:
        return measures[threshold.measure]
    known = ", ".join([*_OF_CLASS, "p99_services", *measures])
    raise ConfigError(f"There is no measure {threshold.measure} here; there are {known}.")


def _summary(name: str, everything: Sequence[Outcome], scenario: Scenario) -> ClassSummary:
    outcomes = [outcome for outcome in everything if outcome.at >= scenario.warm_up]
    counts = Counter(outcome.kind for outcome in outcomes)
    latencies = _latencies(outcomes)
    refusals = [o.latency for o in outcomes if o.kind == "refused" and o.latency is not None]
    return ClassSummary(
        name=name,
        sent=len(outcomes),
        in_time=counts["in time"],
        late=counts["late"],
        refused=counts["refused"],
        left=counts["left"],
        errors=counts["error"],
        latency_ms={q: 1000 * percentile(latencies, q) for q in PERCENTILES},
        refusal_p99_ms=1000 * percentile(refusals, 99),
        goodput=sum(_good(outcome, scenario) for outcome in everything) / (scenario.duration - scenario.warm_up),
    )


def _latencies(outcomes: Sequence[Outcome]) -> list[float]:
    return [o.latency for o in outcomes if o.kind in ("in time", "late") and not o.expired and o.latency is not None]


def _good(outcome: Outcome, scenario: Scenario) -> bool:
    """In time, and finished between warm-up and the end of the load, sent in that time or not: neither the queue
    filling up nor its tail count as throughput."""
    return outcome.kind == "in time" and scenario.warm_up <= outcome.end < scenario.duration


def _measures(
    scenario: Scenario, capacity: Capacity, run: Run, samples: Sequence[Sample], counted: Sequence[Outcome]
) -> dict[str, float]:
    """What is said of the run as a whole; NaN where it cannot be told."""
    window = scenario.duration - scenario.warm_up
    service = {kind.name: capacity.service(kind) for kind in scenario.mix}
    busy = sum(service[o.name] for o in run.outcomes if _good(o, scenario))
    lags = [outcome.lag for outcome in run.outcomes]
    within = [s for s in samples if scenario.warm_up <= s.at < scenario.duration]
    halves = within[len(within) // 4 : len(within) // 2], within[3 * len(within) // 4 :]
    middle, end = (float(np.median([s.memory_bytes for s in half])) if half else math.nan for half in halves)
    first, last = (samples[0], samples[-1]) if samples else (None, None)
    batches = last.batch_count - first.batch_count if first and last else 0.0
    left = sum(outcome.kind == "left" for outcome in run.outcomes)
    return {
        "rate": len(counted) / window,
        "goodput_of_capacity": busy / window / capacity.devices,
        "answered": sum(o.kind != "error" or o.status > 0 for o in counted) / max(1, len(counted)),
        "memory_growth_mb": (end - middle) / _MB,
        "mean_batch": (last.batch_sum - first.batch_sum) / batches if first and last and batches else math.nan,
        "steps_per_left": _wasted_steps(run, scenario, samples) / left if left else math.nan,
        "lag_p99_ms": 1000 * percentile(lags, 99),
        "lag_max_ms": 1000 * max(lags, default=math.nan),
        "generator_cpu": run.cpu_seconds / run.wall_seconds if run.wall_seconds else math.nan,
        "server_cpu": (last.cpu_seconds - first.cpu_seconds) / (last.at - first.at)
        if first and last and last.at > first.at
        else math.nan,
    }


def _wasted_steps(run: Run, scenario: Scenario, samples: Sequence[Sample]) -> float:
    """Steps taken on images that nobody got, by the server's count less those of all whole answers."""
    if not samples:
        return math.nan
    steps = {kind.name: kind.images * kind.steps for kind in scenario.mix}
    delivered = sum(steps[o.name] for o in run.outcomes if o.status == 200 and o.kind in ("in time", "late"))
    return samples[-1].steps - samples[0].steps - delivered
