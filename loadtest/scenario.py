"""Scenarios, read from TOML: arrivals, request classes, decoders and flags of the server, faults, thresholds."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engines.errors import ConfigError
from engines.size import Size
from loadtest.cost_tables import SimulatedDecoder
from server.images.formats import ImageFormat

SCENARIOS = Path(__file__).parent / "scenarios"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def _parse_size(value: Any) -> Any:
    return Size.parse(value) if isinstance(value, str) else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Arrivals(_Section):
    """The arrival process. The mean rate is `rate`, or `load` times the capacity of the devices."""

    process: Literal["poisson", "uniform", "burst", "ramp", "replay"] = "poisson"
    rate: Positive | None = None  # requests per second
    load: Positive | None = None  # multiple of the capacity
    to_rate: Positive | None = None  # ramp: rate at the end
    to_load: Positive | None = None
    burst: Annotated[int, Field(ge=1)] = 1  # burst: requests sent at the same time
    trace: Path | None = None  # replay: CSV file with the columns at (seconds) and, optionally, class

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.process == "replay":
            if self.trace is None:
                raise ValueError("process replay requires a trace")
        elif (self.rate is None) == (self.load is None):
            raise ValueError("set exactly one of rate and load")
        if self.process == "ramp" and (self.to_rate is None) == (self.to_load is None):
            raise ValueError("process ramp requires exactly one of to_rate and to_load")
        return self


class RequestClass(_Section):
    """One class of requests in the mix."""

    name: str
    share: Positive = 1.0  # weight relative to the other classes that follow the arrivals
    clients: Annotated[int, Field(ge=1)] | None = None  # closed loop: clients that send one request after another
    key: str | None = None  # name of the API key
    decoder: str | None = None  # name; None: the only decoder of this size
    size: Annotated[Size, BeforeValidator(_parse_size)] = Size(2048, 2048)
    priority: Literal["interactive", "standard", "batch"] = "standard"
    images: Annotated[int, Field(ge=1, le=64)] = 1
    steps: Annotated[int, Field(ge=1, le=4)] = 4
    format: ImageFormat = "png"
    compression: Literal["fast", "best", "none"] = "fast"
    quality: Annotated[int, Field(ge=1, le=100)] | None = None  # None: the server's default
    deadline_ms: Positive | None = None
    deadline_services: Positive | None = None  # deadline in multiples of the service time
    disconnect_share: Share = Field(0.0, validation_alias=AliasChoices("disconnect_share", "leaving"))
    disconnect_phase: Literal["waiting", "streaming"] = Field(
        "waiting", validation_alias=AliasChoices("disconnect_phase", "leaves")
    )  # before or after the first byte of the response
    patience_services: Positive = 1.0  # clients that disconnect while waiting do so within this many service times
    read_rate: Positive | None = None  # bytes per second that the client reads; unlimited by default
    read_after: Positive | None = None  # seconds during which the client reads nothing; the server should disconnect it
    new_prompts: Share | None = None  # share of the requests with a new prompt, others repeat one; None: no prompts

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.deadline_ms is not None and self.deadline_services is not None:
            raise ValueError("set deadline_ms or deadline_services, not both")
        if self.clients is not None and self.disconnect_share:
            raise ValueError("clients and disconnect_share cannot be combined")
        if self.clients is not None and self.new_prompts is not None:
            raise ValueError("clients and new_prompts cannot be combined")
        return self


class Threshold(_Section):
    """A bound on a measure that the run must meet to pass."""

    measure: str
    of: str | None = None  # name of a request class; all classes by default
    since: Positive | None = None  # only requests sent this many seconds after the start, or later, count
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("set exactly one of at_least and at_most")
        return self

    def holds(self, value: float) -> bool:
        """Return whether `value` meets the bound. NaN, a measure without data, never does."""
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        of, since = f" of {self.of}" if self.of else "", f" since {self.since:g} s" if self.since else ""
        return f"{self.measure}{of}{since} {bound}"


class RollingRestart(_Section):
    """Two servers behind nginx, drained and replaced in turn, `at` seconds after the start."""

    at: tuple[Positive, ...] = (10.0,)


class Pause(_Section):
    """Time during which the server process is stopped (SIGSTOP), in seconds after the start."""

    at: Positive
    seconds: Positive

    @property
    def end(self) -> float:
        """Time at which the process is continued."""
        return self.at + self.seconds


class Fault(_Section):
    """A fault to inject into the server, and how its process is expected to react."""

    fault: str  # in the syntax of the server's --faults
    exits: int | None = None  # expected exit status, after the process was not live; None: stays live and ready
    stalls: bool = False  # expected to be live but not ready before it is not live


class Scenario(_Section):
    """A load test."""

    title: str
    about: str = ""
    duration: Positive = 60.0  # seconds during which requests are sent
    warm_up: Annotated[float, Field(ge=0)] = 2.0  # seconds at the start that do not count
    timeout: Positive = 120.0  # seconds after which a request without a complete response is an error
    seed: int = 1
    arrivals: Arrivals
    mix: Annotated[tuple[RequestClass, ...], Field(min_length=1)]
    baseline: bool = False  # first run the same load without the clients that disconnect, for comparison
    retry: bool = False  # clients resend rejected and failed requests, after Retry-After
    rolling_restart: RollingRestart | None = None
    pauses: tuple[Pause, ...] = ()  # in the order of their times
    faults: tuple[Fault, ...] = ()  # each on a separate server, for an equal part of the duration
    decoders: tuple[SimulatedDecoder, ...] = ()  # of the server that --simulate starts; by default a single one
    flags: tuple[str, ...] = ()  # flags of that server
    thresholds: tuple[Threshold, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [kind.name for kind in self.mix]
        if len(set(names)) < len(names):
            raise ValueError("two classes of the mix have the same name")
        for threshold in self.thresholds:
            if threshold.of is not None and threshold.of not in names:
                raise ValueError(f"the threshold on {threshold.measure} is for an unknown class: {threshold.of}")
        if not self.open_mix:
            raise ValueError("at least one class of the mix must follow the arrivals, without clients")
        closed_loop = len(self.open_mix) < len(self.mix)
        if self.faults and (self.rolling_restart or self.baseline or self.pauses or closed_loop):
            raise ValueError("faults cannot be combined with a rolling restart, a baseline, pauses or clients")
        if self.pauses and self.rolling_restart:
            raise ValueError("pauses cannot be combined with a rolling restart")
        return self

    @model_validator(mode="after")
    def _within_duration(self) -> Self:
        if self.warm_up >= self.duration:
            raise ValueError("warm_up must be shorter than duration")
        moments = [*(pause.end for pause in self.pauses), *(t.since for t in self.thresholds if t.since is not None)]
        if max(moments, default=0.0) >= self.duration:
            raise ValueError("pauses and the times of thresholds must be within duration")
        if any(a.end > b.at for a, b in itertools.pairwise(self.pauses)):
            raise ValueError("each pause must begin after the end of the one before it")
        if any((kind.read_after or 0.0) >= self.timeout for kind in self.mix):
            raise ValueError("read_after must be shorter than timeout")
        return self

    @property
    def open_mix(self) -> tuple[RequestClass, ...]:
        """The classes that follow the arrivals; the others are sent in closed loops."""
        return tuple(kind for kind in self.mix if kind.clients is None)

    @property
    def key_names(self) -> tuple[str, ...]:
        """The names of the API keys of the mix, without repetition."""
        return tuple(dict.fromkeys(kind.key for kind in self.mix if kind.key is not None))

    @property
    def server_flags(self) -> list[str]:
        """The flags of the server that --simulate starts, including those for its decoders."""
        decoders = [flag for decoder in self.decoders for flag in ("--simulated-decoder", str(decoder))]
        return [*self.flags, *decoders]


def scenario_names() -> list[str]:
    """Return the names of the shipped scenarios, sorted."""
    return sorted(path.stem for path in SCENARIOS.glob("*.toml"))


def find_scenario(name: str) -> Path:
    """Return the path of a shipped scenario by its name, e.g. steady, or `name` itself as a path."""
    shipped = SCENARIOS / f"{name}.toml"
    return shipped if shipped.is_file() else Path(name)


def load_scenario(path: Path, duration: float | None = None) -> Scenario:
    """Read a scenario from a TOML file.

    Args:
        path: The file. A trace is looked up relative to it.
        duration: Seconds, replaces the scenario's own duration and shortens its warm-up to a quarter of it.

    Raises:
        ConfigError: The file cannot be read, is not TOML or is not a valid scenario.
    """
    try:
        fields = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read the scenario {path}: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"The scenario {path} is not valid TOML: {error}.") from None
    if duration is not None:
        fields["duration"] = duration
        fields["warm_up"] = min(fields.get("warm_up", 2.0), duration / 4)
    try:
        scenario = Scenario.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None
    if scenario.arrivals.trace is None:
        return scenario
    trace = path.parent / scenario.arrivals.trace
    return scenario.model_copy(update={"arrivals": scenario.arrivals.model_copy(update={"trace": trace})})


def _first_problem(error: ValidationError) -> str:
    """Return the first problem as one sentence with the path of the field, e.g. `arrivals.rate`."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    return f"{f'{where}: ' if where else ''}{reason[0].lower()}{reason[1:]}."
