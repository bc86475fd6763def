"""What a load test does: arrivals, a mix of requests, the server's flags and the thresholds, read from TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engines.errors import ConfigError
from engines.size import Size

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def _parse_size(value: Any) -> Any:
    return Size.parse(value) if isinstance(value, str) else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Arrivals(_Section):
    """When requests are sent. The mean rate is `rate`, or `load` times what the devices can do."""

    process: Literal["poisson", "uniform", "burst", "ramp", "replay"] = "poisson"
    rate: Positive | None = None  # requests a second
    load: Positive | None = None  # share of capacity; 5 is five times what the devices can do
    to_rate: Positive | None = None  # ramp: the rate at the end
    to_load: Positive | None = None
    burst: Annotated[int, Field(ge=1)] = 1  # burst: requests sent at once
    trace: Path | None = None  # replay: CSV with columns at (seconds) and, optionally, class; relative to the scenario

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.process == "replay":
            if self.trace is None:
                raise ValueError("a replay needs a trace")
        elif (self.rate is None) == (self.load is None):
            raise ValueError("arrivals need a rate or a load, one of them")
        if self.process == "ramp" and (self.to_rate is None) == (self.to_load is None):
            raise ValueError("a ramp needs to_rate or to_load")
        return self


class RequestClass(_Section):
    """One kind of request in the mix."""

    name: str
    share: Positive = 1.0  # of all requests, relative to the other classes
    size: Annotated[Size, BeforeValidator(_parse_size)] = Size(2048, 2048)
    priority: Literal["interactive", "standard", "batch"] = "standard"
    images: Annotated[int, Field(ge=1, le=64)] = 1
    steps: Annotated[int, Field(ge=1, le=4)] = 4
    deadline_ms: Positive | None = None
    deadline_services: Positive | None = None  # deadline in multiples of the request's own service time
    leaving: Share = 0.0  # share of clients that leave before they have their answer
    leaves: Literal["waiting", "streaming"] = "waiting"  # before the answer's first byte, or after it
    patience_services: Positive = 1.0  # those that leave while waiting do so within this many service times
    read_rate: Positive | None = None  # bytes a second that the client reads; as fast as it can if absent

    @model_validator(mode="after")
    def _one_deadline(self) -> Self:
        if self.deadline_ms is not None and self.deadline_services is not None:
            raise ValueError("a class has deadline_ms or deadline_services, not both")
        return self


class Threshold(_Section):
    """What a measure must be for the run to pass."""

    measure: str
    of: str | None = None  # a class of the mix; all of them together if absent
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a threshold has at_least or at_most, one of them")
        return self

    def holds(self, value: float) -> bool:
        """Whether `value` passes; a measure without a value (NaN) never does."""
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{self.measure}{f' of {self.of}' if self.of else ''} {bound}"


class RollingRestart(_Section):
    """Two servers behind nginx; each in turn is drained and replaced, seconds after the start."""

    at: tuple[Positive, ...] = (10.0,)


class Fault(_Section):
    """A fault that the server is started with, and what is promised of its process then."""

    fault: str  # as the server's --faults takes it
    exits: int | None = None  # the status it ends with, once it was not live any more; None: it stays live and ready


class Scenario(_Section):
    title: str
    about: str = ""
    duration: Positive = 60.0  # seconds during which requests are sent
    warm_up: Annotated[float, Field(ge=0)] = 2.0  # seconds at the start that do not count
    timeout: Positive = 120.0  # seconds after which a client gives an answer up: an error
    seed: int = 1
    arrivals: Arrivals
    mix: Annotated[tuple[RequestClass, ...], Field(min_length=1)]
    baseline: bool = False  # run first without the requests whose clients leave, for comparison
    retry: bool = False  # clients send again what was refused or failed, when Retry-After says
    rolling_restart: RollingRestart | None = None
    faults: tuple[Fault, ...] = ()  # each for an equal part of the duration, on a server of its own
    flags: tuple[str, ...] = ()  # of the server that --simulate starts
    thresholds: tuple[Threshold, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [kind.name for kind in self.mix]
        if len(set(names)) < len(names):
            raise ValueError("two classes of the mix share a name")
        for threshold in self.thresholds:
            if threshold.of is not None and threshold.of not in names:
                raise ValueError(f"the threshold on {threshold.measure} names no class of the mix: {threshold.of}")
        if self.faults and (self.rolling_restart or self.baseline):
            raise ValueError("faults go with neither a rolling restart nor a baseline")
        if self.warm_up >= self.duration:
            raise ValueError("the warm-up is as long as the whole run")
        return self


def load_scenario(path: Path, duration: float | None = None) -> Scenario:
    """Read a scenario; `duration` in seconds replaces its own. Raises ConfigError, one sentence."""
    try:
        fields = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"The scenario {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"The scenario {path} is not TOML: {error}.") from None
    if duration is not None:
        fields["duration"] = duration
        fields["warm_up"] = min(fields.get("warm_up", 2.0), duration / 4)
    try:
        scenario = Scenario.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {f'{where}: ' if where else ''}{reason[0].lower()}{reason[1:]}.") from None
    trace = scenario.arrivals.trace
    if trace is None:
        return scenario
    found = scenario.arrivals.model_copy(update={"trace": path.parent / trace})
    return scenario.model_copy(update={"arrivals": found})
