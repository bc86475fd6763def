"""Summary of a run: percentiles, counts, goodput, and whether the scenario's thresholds hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.errors import ConfigError
from loadtest.generator import Run
from loadtest.outcome import Outcome, OutcomeKind
from loadtest.scenario import Scenario, Threshold
from loadtest.schedule import Capacity
from loadtest.scrape import Sample

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_MB = 1e6


def percentile(values: Sequence[float], q: float) -> float:
    """Return the smallest value that at least `q` percent do not exceed (nearest rank); NaN for no values."""
    if not values:
        return math.nan
    rank = max(1, math.ceil(len(values) * q / 100 - 1e-9))
    return sorted(values)[rank - 1]


@dataclass(frozen=True)
class ClassSummary:
    """Results of one request class, or of all of them. Times are milliseconds from the intended send time."""

    name: str
    sent: int
    in_time: int
    late: int  # complete responses after their deadline, and requests that the server cancelled at theirs
    rejected: int
    disconnected: int
    errors: int
    latency_ms: dict[float, float]  # of complete responses, by percentile
    overrun_max_ms: float  # longest time from a deadline to the end of a complete response; negative if none was late
    rejection_p99_ms: float
    goodput: float  # responses in time per second

    @property
    def admitted(self) -> int:
        """Number of requests that were admitted and whose clients did not disconnect."""
        return self.in_time + self.late + self.errors


@dataclass(frozen=True)
class Check:
    """A threshold and the value that was measured."""

    threshold: Threshold
    value: float
    passed: bool


@dataclass(frozen=True)
class Summary:
    """Results of a run without its warm-up."""

    total: ClassSummary
    classes: tuple[ClassSummary, ...]
    errors: dict[str, int]  # number of errors by reason
    measures: dict[str, float]  # measures of the whole run
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if every threshold holds."""
        return all(check.passed for check in self.checks)


def summarise(
    scenario: Scenario,
    capacity: Capacity,
    run: Run,
    samples: Sequence[Sample],
    baseline: Run | None = None,
    more: Mapping[str, float] | None = None,
) -> Summary:
    """Summarise a run and check the scenario's thresholds.

    Args:
        scenario: The scenario that was run.
        capacity: Capacity of the devices.
        run: The outcomes.
        samples: Metrics scraped during the run.
        baseline: Run to compare the 99th percentile with.
        more: Further measures that thresholds may name.

    Raises:
        ConfigError: A threshold names an unknown measure.
    """
    counted = [outcome for outcome in run.outcomes if outcome.at >= scenario.warm_up]
    total, *classes = _class_summaries(scenario, capacity, run)
    errors = Counter(outcome.error for outcome in counted if outcome.kind is OutcomeKind.ERROR)
    measures = {
        **_load_measures(scenario, capacity, run, counted),
        **_generator_measures(run),
        **_server_measures(scenario, run, samples),
        **(more or {}),
    }
    if baseline is not None:
        reference = [o for o in baseline.outcomes if o.at >= scenario.warm_up]
        measures["baseline_p99_ms"] = 1000 * percentile(_latencies(reference), 99)
        measures["p99_of_baseline"] = total.latency_ms[99.0] / measures["baseline_p99_ms"]
    services = {kind.name: capacity.service(kind) for kind in scenario.mix}
    checks = []
    for threshold in scenario.thresholds:
        summaries = (total, *classes)
        if threshold.since is not None:
            summaries = _class_summaries(scenario, capacity, run, threshold.since)
        value = _value(threshold, summaries, services, measures)
        checks.append(Check(threshold, value, threshold.holds(value)))
    return Summary(total, tuple(classes), dict(errors), measures, tuple(checks))


# Names are those of thresholds in scenario files.
_CLASS_MEASURES: dict[str, Callable[[ClassSummary], float]] = {
    "p50_ms": lambda s: s.latency_ms[50.0],
    "p90_ms": lambda s: s.latency_ms[90.0],
    "p99_ms": lambda s: s.latency_ms[99.0],
    "p999_ms": lambda s: s.latency_ms[99.9],
    "refusal_p99_ms": lambda s: s.rejection_p99_ms,
    "goodput": lambda s: s.goodput,
    "errors": lambda s: float(s.errors),
    "late": lambda s: float(s.late),
    "refused": lambda s: float(s.rejected),
    "overrun_max_ms": lambda s: s.overrun_max_ms,
    "disconnected_of_admitted": lambda s: (
        s.disconnected / (s.admitted + s.disconnected) if s.admitted + s.disconnected else math.nan
    ),
    "in_time_of_admitted": lambda s: s.in_time / s.admitted if s.admitted else math.nan,
    "in_time_of_sent": lambda s: s.in_time / (s.sent - s.disconnected) if s.sent > s.disconnected else math.nan,
}


def _value(
    threshold: Threshold,
    summaries: Sequence[ClassSummary],
    services: Mapping[str, float],
    measures: Mapping[str, float],
) -> float:
    """Return the value of the threshold's measure.

    Args:
        threshold: The threshold.
        summaries: Results of all requests, then those of each class.
        services: Service time of each class, in seconds.
        measures: Measures of the whole run.
    """
    total, *classes = summaries
    summary = total if threshold.of is None else next(s for s in classes if s.name == threshold.of)
    if threshold.measure == "p99_services" and threshold.of is not None:
        return summary.latency_ms[99.0] / 1000 / services[threshold.of]
    if threshold.measure in _CLASS_MEASURES:
        return _CLASS_MEASURES[threshold.measure](summary)
    if threshold.of is None and threshold.since is None and threshold.measure in measures:
        return measures[threshold.measure]
    known = ", ".join([*_CLASS_MEASURES, "p99_services", *measures])
    raise ConfigError(f"Unknown measure {threshold.measure}; use one of {known}.")


def _class_summaries(
    scenario: Scenario, capacity: Capacity, run: Run, since: float | None = None
) -> tuple[ClassSummary, ...]:
    """Summarise all requests, then each class, sent from `since` on; by default, from the end of the warm-up."""
    begin = scenario.warm_up if since is None else since
    deadlines = {kind.name: capacity.deadline(kind) for kind in scenario.mix}
    parts = {"all": run.outcomes} | {
        kind.name: [o for o in run.outcomes if o.name == kind.name] for kind in scenario.mix
    }
    return tuple(_class_summary(name, part, deadlines, begin, scenario.duration) for name, part in parts.items())


def _class_summary(
    name: str, everything: Sequence[Outcome], deadlines: Mapping[str, float | None], begin: float, end: float
) -> ClassSummary:
    outcomes = [outcome for outcome in everything if outcome.at >= begin]
    counts = Counter(outcome.kind for outcome in outcomes)
    latencies = _latencies(outcomes)
    overruns = [
        o.latency - deadline
        for o in outcomes
        if o.has_image and o.latency is not None and (deadline := deadlines[o.name]) is not None
    ]
    rejections = [o.latency for o in outcomes if o.kind is OutcomeKind.REJECTED and o.latency is not None]
    return ClassSummary(
        name=name,
        sent=len(outcomes),
        in_time=counts[OutcomeKind.IN_TIME],
        late=counts[OutcomeKind.LATE],
        rejected=counts[OutcomeKind.REJECTED],
        disconnected=counts[OutcomeKind.DISCONNECTED],
        errors=counts[OutcomeKind.ERROR],
        latency_ms={q: 1000 * percentile(latencies, q) for q in PERCENTILES},
        overrun_max_ms=1000 * max(overruns, default=math.nan),
        rejection_p99_ms=1000 * percentile(rejections, 99),
        goodput=sum(_is_good(outcome, begin, end) for outcome in everything) / (end - begin),
    )


def _latencies(outcomes: Sequence[Outcome]) -> list[float]:
    return [o.latency for o in outcomes if o.has_image and o.latency is not None]


def _is_good(outcome: Outcome, begin: float, end: float) -> bool:
    """Return whether a response counts towards goodput: in time, and finished between `begin` and `end` of the load.

    When it was sent does not matter, so neither the queue that fills at the start nor the one that drains at the end
    counts as throughput.
    """
    return outcome.kind is OutcomeKind.IN_TIME and begin <= outcome.end < end


def _load_measures(scenario: Scenario, capacity: Capacity, run: Run, counted: Sequence[Outcome]) -> dict[str, float]:
    """Return the measures of the load and of the responses to it."""
    window = scenario.duration - scenario.warm_up
    service = {kind.name: capacity.service(kind) for kind in scenario.mix}
    good_seconds = sum(service[o.name] for o in run.outcomes if _is_good(o, scenario.warm_up, scenario.duration))
    responses = sum(o.kind is not OutcomeKind.ERROR or o.status > 0 for o in counted)
    return {
        "rate": len(counted) / window,
        "goodput_of_capacity": good_seconds / window / capacity.devices,
        "answered": responses / max(1, len(counted)),
    }


def _generator_measures(run: Run) -> dict[str, float]:
    """Return the measures of the load generator itself."""
    lags = [outcome.lag for outcome in run.outcomes]
    return {
        "lag_p99_ms": 1000 * percentile(lags, 99),
        "lag_max_ms": 1000 * max(lags, default=math.nan),
        "generator_cpu": run.cpu_seconds / run.wall_seconds if run.wall_seconds else math.nan,
    }


def _server_measures(scenario: Scenario, run: Run, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the measures of the server process, from its metrics; NaN without enough samples."""
    measures = dict.fromkeys(
        ("memory_growth_mb", "mean_batch", "steps_per_left", "server_cpu", "cached_prompts"), math.nan
    )
    if not samples:
        return measures
    first, last = samples[0], samples[-1]
    measures["memory_growth_mb"] = _memory_growth(scenario, samples) / _MB
    batches = last.batch_count - first.batch_count
    if batches:
        measures["mean_batch"] = (last.batch_sum - first.batch_sum) / batches
    prompts = last.prompts - first.prompts
    if prompts:
        measures["cached_prompts"] = 1 - (last.encoded_prompts - first.encoded_prompts) / prompts
    disconnected = sum(outcome.kind is OutcomeKind.DISCONNECTED for outcome in run.outcomes)
    if disconnected:
        measures["steps_per_left"] = _wasted_steps(run, scenario, samples) / disconnected
    if last.at > first.at:
        measures["server_cpu"] = (last.cpu_seconds - first.cpu_seconds) / (last.at - first.at)
    return measures


def _memory_growth(scenario: Scenario, samples: Sequence[Sample]) -> float:
    """Return the growth of the median memory from the second quarter of the run to the last, in bytes."""
    within = [s for s in samples if scenario.warm_up <= s.at < scenario.duration]
    quarters = within[len(within) // 4 : len(within) // 2], within[3 * len(within) // 4 :]
    middle, end = (float(np.median([s.memory_bytes for s in part])) if part else math.nan for part in quarters)
    return end - middle


def _wasted_steps(run: Run, scenario: Scenario, samples: Sequence[Sample]) -> float:
    """Return the number of steps spent on images that no client received."""
    steps = {kind.name: kind.images * kind.steps for kind in scenario.mix}
    received = (OutcomeKind.IN_TIME, OutcomeKind.LATE)
    delivered = sum(steps[o.name] for o in run.outcomes if o.status == 200 and o.kind in received)
    return samples[-1].steps - samples[0].steps - delivered
