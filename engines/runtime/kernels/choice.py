"""Choice between implementations of an operation: the fastest one that is correct, by measurement on the device."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engines.accuracy import largest
from engines.errors import ConfigError
from engines.runtime.compiler_errors import explain, failed_to_compile, reached_recompile_limit
from engines.runtime.kernels.timing import Timer

log = logging.getLogger(__name__)

MIN_GAIN = 0.03  # of the time; smaller differences are noise


@dataclass(frozen=True)
class Candidate:
    """One implementation of an operation.

    Attributes:
        run: Computes the operation once, on inputs of its real shape.
        install: Makes the decoder use it.
        max_error: The largest error of a correct result.
        own: Whether it is a kernel of this project, not PyTorch's.
        check: Returns the error on a second, smaller input, where a mistake is not averaged away.
    """

    run: Callable[[], Tensor]
    install: Callable[[], None]
    max_error: float
    own: bool = False
    check: Callable[[], float] | None = None


@dataclass(frozen=True)
class Operation:
    """Work that has several implementations, on inputs of one shape.

    Attributes:
        name: What is computed.
        shape: The inputs, for people.
        flops: Floating-point operations of the matrix products, attentions and convolutions in it.
        nbytes: Bytes that it has to read and write at least, each value once.
        candidates: Implementations by name. Among those whose times hardly differ, the first one is preferred.
        error: Returns the relative error of a result.
    """

    name: str
    shape: str
    flops: int
    nbytes: int
    candidates: Mapping[str, Candidate]
    error: Callable[[Tensor], float]


@dataclass(frozen=True)
class Measured:
    """Duration of an implementation, and the error of its result, or that of its second check if it is larger."""

    seconds: float
    error: float
    correct: bool

    def __str__(self) -> str:
        return f"{1000 * self.seconds:.3g} ms" + ("" if self.correct else f" but wrong (error {self.error:.2g})")


@dataclass(frozen=True)
class Failed:
    """Why an implementation cannot be used: mostly because the device does not support it."""

    reason: str

    def __str__(self) -> str:
        return "not usable"


@dataclass(frozen=True)
class Choice:
    """Measurements of the implementations of an operation; see `Operation`."""

    name: str
    shape: str
    flops: int
    nbytes: int
    results: Mapping[str, Measured | Failed]

    @property
    def measured(self) -> Mapping[str, Measured]:
        """The implementations that could be measured."""
        return {name: result for name, result in self.results.items() if isinstance(result, Measured)}

    @property
    def chosen(self) -> str | None:
        """Name of the fastest correct implementation, or of an earlier one that is hardly slower; None without any."""
        seconds = {name: result.seconds for name, result in self.measured.items() if result.correct}
        limit = min(seconds.values(), default=0) / (1 - MIN_GAIN)
        return next((name for name in seconds if seconds[name] <= limit), None)

    def __str__(self) -> str:
        results = ", ".join(f"{name} {result}" for name, result in self.results.items())
        return f"{self.name}, {self.shape}: {results}; using {self.chosen or 'the default of PyTorch'}"


@torch.no_grad()
def choose(operations: Iterable[Operation], timer: Timer) -> tuple[Choice, ...]:
    """Measure the implementations of every operation, and install the chosen ones.

    If none can be used, nothing is installed for this operation, and PyTorch's default remains. The choices are logged,
    and also why a kernel of this project cannot be used.

    Args:
        operations: The operations. Each is created when the one before it is done.
        timer: Runs a function several times and returns the duration of one run in seconds.

    Raises:
        ConfigError: No implementation is correct, and one of PyTorch's computes wrong results.
        torch.AcceleratorError: The device is broken.
        Exception: PyTorch cannot compile one of its implementations; see `failed_to_compile`.
    """
    choices = tuple(map(partial(_choose, timer), operations))
    if choices:
        log.info("%s", "\n".join(map(str, choices)))  # one record: the server limits how often a line may log
    return choices


def _choose(timer: Timer, operation: Operation) -> Choice:
    candidates = operation.candidates
    results = {name: _measure(operation, candidate, timer) for name, candidate in candidates.items()}
    choice = Choice(operation.name, operation.shape, operation.flops, operation.nbytes, results)
    failures = defaultdict(list)
    for name, result in results.items():
        if isinstance(result, Failed) and candidates[name].own:
            failures[result.reason].append(name)
    for reason, names in failures.items():
        log.warning("%s, %s: not usable: %s: %s", choice.name, choice.shape, "; ".join(names), reason)
    if choice.chosen is not None:
        candidates[choice.chosen].install()
    elif any(not candidates[name].own for name in choice.measured):
        raise ConfigError(f"PyTorch computes wrong results on this device: {choice}. Update PyTorch.")
    return choice


def _measure(operation: Operation, candidate: Candidate, timer: Timer) -> Measured | Failed:
    try:
        error = operation.error(candidate.run())  # the first run also compiles, and allocates workspaces
        if candidate.check is not None:
            error = largest((error, candidate.check()))
        return Measured(timer(candidate.run), error, error <= candidate.max_error)  # false for NaN
    except Exception as error:  # Triton's have no common base
        if reached_recompile_limit(error) or (not candidate.own and failed_to_compile(error)):
            raise
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # fails if the device is broken; a lack of memory or a failed capture passes
            torch.cuda.empty_cache()
        return Failed(explain(error))
