"""The whole run decided beforehand: who sends what, when, and who leaves. Nothing here knows of answers."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.random import Generator

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from loadtest.scenario import Arrivals, RequestClass, Scenario

MOST_REQUESTS = 200_000  # in one run, so that a slip in a scenario ends in a sentence


@dataclass(frozen=True)
class Capacity:
    """What the devices can do, from their cost table."""

    costs: Mapping[Size, SimulatedCost]
    devices: int = 1

    def service(self, kind: RequestClass) -> float:
        """Device seconds of one request. Raises ConfigError for a size without a cost."""
        cost = self.costs.get(kind.size)
        if cost is None:
            known = ", ".join(map(str, self.costs))
            raise ConfigError(f"The class {kind.name} asks for {kind.size}; the server decodes {known}.")
        return kind.images * cost.service(kind.steps)

    def rate(self, mix: tuple[RequestClass, ...]) -> float:
        """Requests of this mix a second that keep every device busy."""
        total = sum(kind.share for kind in mix)
        mean = sum(kind.share * self.service(kind) for kind in mix) / total
        if mean <= 0:
            raise ConfigError("The cost table says that decoding takes no time; give a rate instead of a load.")
        return self.devices / mean

    def deadline(self, kind: RequestClass) -> float | None:
        """Seconds from the intended send time."""
        if kind.deadline_services is not None:
            return kind.deadline_services * self.service(kind)
        return None if kind.deadline_ms is None else kind.deadline_ms / 1000


@dataclass(frozen=True)
class Arrival:
    """One request to be sent."""

    at: float  # seconds after the start: the intended send time
    kind: RequestClass
    leaves_after: float | None = None  # seconds after `at`; None stays
    leaves_streaming: bool = False


@dataclass(frozen=True)
class Schedule:
    arrivals: tuple[Arrival, ...]
    duration: float
    rate: float = field(default=0.0)  # requests a second on average, as asked for

    def without_leavers(self) -> Schedule:
        """The same requests at the same times, less those whose clients leave."""
        stay = tuple(a for a in self.arrivals if a.leaves_after is None and not a.leaves_streaming)
        return Schedule(stay, self.duration, self.rate)


def make_schedule(scenario: Scenario, capacity: Capacity) -> Schedule:
    """Draw a run from the scenario's seed. Raises ConfigError."""
    generator = np.random.default_rng(scenario.seed)
    arrivals, duration, mix = scenario.arrivals, scenario.duration, scenario.mix
    if arrivals.process == "replay":
        assert arrivals.trace is not None  # noqa: S101  the scenario was checked
        times, kinds = read_trace(arrivals.trace, mix, duration)
        rate = len(times) / duration
    else:
        begin, end = _rates(arrivals, mix, capacity)
        rate = (begin + end) / 2
        if rate * duration > MOST_REQUESTS:
            raise ConfigError(f"The scenario would send {rate * duration:.0f} requests; the limit is {MOST_REQUESTS}.")
        times = draw_times(arrivals, begin, end, duration, generator)
        kinds = [None] * len(times)
    shares = np.array([kind.share for kind in mix])
    drawn = generator.choice(len(mix), len(times), p=shares / shares.sum())
    chosen = (kind or mix[index] for kind, index in zip(kinds, drawn, strict=True))
    planned = (_arrival(at, kind, capacity, generator) for at, kind in zip(times, chosen, strict=True))
    return Schedule(tuple(planned), duration, rate)


def draw_times(arrivals: Arrivals, begin: float, end: float, duration: float, generator: Generator) -> list[float]:
    """Intended send times in [0, duration), rising; `begin` and `end` are requests a second, equal but for a ramp."""
    match arrivals.process:
        case "uniform":
            return [float(at) for at in np.arange(0, duration, 1 / begin)]
        case "burst":
            starts = np.arange(0, duration, arrivals.burst / begin)
            return [float(at) for at in np.repeat(starts, arrivals.burst)]
        case "ramp":
            # Thinning: Poisson arrivals at the highest rate, each kept with the probability that the ramp has there.
            highest = max(begin, end)
            times = _poisson(highest, duration, generator)
            rates = begin + (end - begin) * times / duration
            return [float(at) for at in times[generator.random(len(times)) < rates / highest]]
        case _:
            return [float(at) for at in _poisson(begin, duration, generator)]


def read_trace(
    path: Path, mix: tuple[RequestClass, ...], duration: float
) -> tuple[list[float], list[RequestClass | None]]:
    """Times and classes of a recorded trace (CSV with the columns at and, optionally, class) up to `duration`."""
    by_name = {kind.name: kind for kind in mix}
    times, kinds = [], []
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                times.append(float(row["at"]))
                kinds.append(by_name[row["class"]] if row.get("class") else None)
    except OSError as error:
        raise ConfigError(f"The trace {path} cannot be read: {error.strerror}.") from None
    except KeyError as error:
        raise ConfigError(f"The trace {path} needs a column at, and classes of the mix; {error} is missing.") from None
    except (ValueError, TypeError):
        raise ConfigError(f"The trace {path} has a time that is not a number, after row {len(times)}.") from None
    within = sorted((pair for pair in zip(times, kinds, strict=True) if 0 <= pair[0] < duration), key=lambda p: p[0])
    if not within or len(within) > MOST_REQUESTS:
        raise ConfigError(f"The trace {path} has {len(within)} requests in the run's {duration:g} s.")
    return [at for at, _ in within], [kind for _, kind in within]


def _poisson(rate: float, duration: float, generator: Generator) -> np.ndarray:
    """Given their number, the arrivals of a Poisson process are uniform and independent."""
    return np.sort(generator.uniform(0, duration, generator.poisson(rate * duration)))


def _rates(arrivals: Arrivals, mix: tuple[RequestClass, ...], capacity: Capacity) -> tuple[float, float]:
    def rate(rate: float | None, load: float | None) -> float | None:
        return load * capacity.rate(mix) if load is not None else rate

    begin = rate(arrivals.rate, arrivals.load)
    assert begin is not None  # noqa: S101  the scenario was checked
    end = rate(arrivals.to_rate, arrivals.to_load) if arrivals.process == "ramp" else begin
    return begin, end or begin


def _arrival(at: float, kind: RequestClass, capacity: Capacity, generator: Generator) -> Arrival:
    leaves, share = generator.random() < kind.leaving, generator.random()
    if leaves and kind.leaves == "streaming":
        return Arrival(at, kind, leaves_streaming=True)
    if leaves:
        return Arrival(at, kind, leaves_after=share * kind.patience_services * capacity.service(kind))
    return Arrival(at, kind)
