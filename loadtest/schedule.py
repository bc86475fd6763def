"""The request schedule, drawn in advance from the scenario's seed: what is sent, when, and which clients disconnect.

It does not depend on responses.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.random import Generator

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost
from loadtest.scenario import Arrivals, RequestClass, Scenario
from server.scheduling.costs import Output

MAX_REQUESTS = 200_000  # per run; a typing error in a scenario should not fill the memory


@dataclass(frozen=True)
class Capacity:
    """Capacity of the devices, from the costs of their decoders and sizes."""

    costs: Mapping[Output, SimulatedCost]
    devices: int = 1

    def output(self, kind: RequestClass) -> Output:
        """Return the decoder and size of a class; if it names no decoder, the only one of its size.

        Raises:
            ConfigError: No decoder is known for the class, or more than one.
        """
        found = [output for output in self.costs if output.size == kind.size and kind.decoder in (None, output.decoder)]
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(output.decoder for output in found)
            raise ConfigError(f"The class {kind.name} has to name a decoder for {kind.size}: {names} support it.")
        needed = str(kind.size) if kind.decoder is None else str(Output(kind.decoder, kind.size))
        known = ", ".join(map(str, self.costs))
        raise ConfigError(f"The class {kind.name} needs {needed}, but the server has {known}.")

    def service(self, kind: RequestClass) -> float:
        """Return the device seconds of one request.

        Raises:
            ConfigError: As for `output`.
        """
        return kind.images * self.costs[self.output(kind)].service(kind.steps)

    def rate(self, mix: tuple[RequestClass, ...]) -> float:
        """Return the requests per second of this mix that keep every device busy.

        Raises:
            ConfigError: The capacity is unlimited because decoding costs no time.
        """
        total = sum(kind.share for kind in mix)
        mean = sum(kind.share * self.service(kind) for kind in mix) / total
        if mean <= 0:
            raise ConfigError("The capacity is unlimited because decoding costs no time; set a rate instead of a load.")
        return self.devices / mean

    def deadline(self, kind: RequestClass) -> float | None:
        """Return the deadline in seconds after the intended send time, or None."""
        if kind.deadline_services is not None:
            return kind.deadline_services * self.service(kind)
        return None if kind.deadline_ms is None else kind.deadline_ms / 1000


@dataclass(frozen=True)
class Arrival:
    """One scheduled request."""

    at: float  # intended send time, in seconds after the start
    kind: RequestClass
    disconnect_after: float | None = None  # seconds after `at`; None waits for the response
    disconnect_streaming: bool = False
    new_prompt: int = 0  # number of a prompt that no other request has; 0: none, or the one that the class repeats


@dataclass(frozen=True)
class Schedule:
    """Scheduled requests, in order of their send times, and classes that are sent in closed loops."""

    arrivals: tuple[Arrival, ...]
    duration: float  # seconds
    rate: float = 0.0  # mean requests per second, as configured
    loops: tuple[RequestClass, ...] = ()  # with `clients` clients each, from the start to `duration`

    def without_disconnects(self) -> Schedule:
        """Return the schedule without the requests whose clients disconnect."""
        kept = tuple(a for a in self.arrivals if a.disconnect_after is None and not a.disconnect_streaming)
        return replace(self, arrivals=kept)


def make_schedule(scenario: Scenario, capacity: Capacity) -> Schedule:
    """Draw a schedule from the scenario's seed.

    Raises:
        ConfigError: The scenario does not fit the devices, has too many requests, or its trace is invalid.
    """
    generator = np.random.default_rng(scenario.seed)
    arrivals, duration, mix = scenario.arrivals, scenario.duration, scenario.open_mix
    if arrivals.process == "replay":
        assert arrivals.trace is not None  # noqa: S101  validated by Arrivals
        times, kinds = read_trace(arrivals.trace, mix, duration)
        rate = len(times) / duration
    else:
        begin, end = _rates(arrivals, mix, capacity)
        rate = (begin + end) / 2
        if rate * duration > MAX_REQUESTS:
            raise ConfigError(
                f"The scenario has {rate * duration:.0f} requests, but the limit is {MAX_REQUESTS}; "
                "lower its rate or duration."
            )
        times = draw_times(arrivals, begin, end, duration, generator)
        kinds = [None] * len(times)
    shares = np.array([kind.share for kind in mix])
    drawn = generator.choice(len(mix), len(times), p=shares / shares.sum())
    chosen = (kind or mix[index] for kind, index in zip(kinds, drawn, strict=True))
    scheduled = tuple(_arrival(at, kind, capacity, generator) for at, kind in zip(times, chosen, strict=True))
    loops = tuple(kind for kind in scenario.mix if kind.clients is not None)
    return Schedule(_with_prompts(scheduled, generator), duration, rate, loops)


def draw_times(arrivals: Arrivals, begin: float, end: float, duration: float, generator: Generator) -> list[float]:
    """Draw intended send times in [0, duration), ascending.

    Args:
        arrivals: The arrival process.
        begin: Requests per second at the start.
        end: Requests per second at the end; differs from `begin` only for a ramp.
        duration: Seconds.
        generator: Source of randomness.
    """
    match arrivals.process:
        case "uniform":
            return [float(at) for at in np.arange(0, duration, 1 / begin)]
        case "burst":
            starts = np.arange(0, duration, arrivals.burst / begin)
            return [float(at) for at in np.repeat(starts, arrivals.burst)]
        case "ramp":
            # Thinning: draw Poisson arrivals at the highest rate and keep each with probability rate / highest.
            highest = max(begin, end)
            times = _poisson(highest, duration, generator)
            rates = begin + (end - begin) * times / duration
            return [float(at) for at in times[generator.random(len(times)) < rates / highest]]
        case _:
            return [float(at) for at in _poisson(begin, duration, generator)]


def read_trace(
    path: Path, mix: tuple[RequestClass, ...], duration: float
) -> tuple[list[float], list[RequestClass | None]]:
    """Read the send times and classes of a recorded trace, up to `duration` seconds.

    The trace is a CSV file with the column `at`, in seconds, and, optionally, `class`.

    Raises:
        ConfigError: The file cannot be read or is not a valid trace.
    """
    by_name = {kind.name: kind for kind in mix}
    times, kinds = [], []
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                times.append(float(row["at"]))
                kinds.append(by_name[row["class"]] if row.get("class") else None)
    except OSError as error:
        raise ConfigError(f"Cannot read the trace {path}: {error.strerror}.") from None
    except KeyError as error:
        raise ConfigError(f"The trace {path} has no column or no class of the mix named {error}.") from None
    except (ValueError, TypeError):
        raise ConfigError(f"The trace {path} has an invalid time in row {len(times) + 1}.") from None
    within = sorted((pair for pair in zip(times, kinds, strict=True) if 0 <= pair[0] < duration), key=lambda p: p[0])
    if not within or len(within) > MAX_REQUESTS:
        raise ConfigError(
            f"The trace {path} has {len(within)} requests within {duration:g} s; the run needs 1 to {MAX_REQUESTS}."
        )
    return [at for at, _ in within], [kind for _, kind in within]


def _poisson(rate: float, duration: float, generator: Generator) -> np.ndarray:
    """Draw a Poisson process: given their number, its arrivals are uniform and independent."""
    return np.sort(generator.uniform(0, duration, generator.poisson(rate * duration)))


def _rates(arrivals: Arrivals, mix: tuple[RequestClass, ...], capacity: Capacity) -> tuple[float, float]:
    """Return the requests per second at the start and at the end."""

    def rate(rate: float | None, load: float | None) -> float | None:
        return load * capacity.rate(mix) if load is not None else rate

    begin = rate(arrivals.rate, arrivals.load)
    assert begin is not None  # noqa: S101  validated by Arrivals
    end = rate(arrivals.to_rate, arrivals.to_load) if arrivals.process == "ramp" else begin
    return begin, end or begin


def _arrival(at: float, kind: RequestClass, capacity: Capacity, generator: Generator) -> Arrival:
    disconnects, share = generator.random() < kind.disconnect_share, generator.random()
    if disconnects and kind.disconnect_phase == "streaming":
        return Arrival(at, kind, disconnect_streaming=True)
    if disconnects:
        return Arrival(at, kind, disconnect_after=share * kind.patience_services * capacity.service(kind))
    return Arrival(at, kind)


def _with_prompts(arrivals: tuple[Arrival, ...], generator: Generator) -> tuple[Arrival, ...]:
    """Choose the arrivals that have a new prompt, and number them."""
    draws = generator.random(len(arrivals))
    return tuple(
        replace(arrival, new_prompt=number) if draw < (arrival.kind.new_prompts or 0.0) else arrival
        for number, (arrival, draw) in enumerate(zip(arrivals, draws, strict=True), start=1)
    )
