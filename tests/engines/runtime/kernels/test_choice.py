"""Choice between implementations, with results and durations that are given."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from engines.accuracy import relative_error
from engines.errors import ConfigError
from engines.runtime.kernels.choice import Candidate, Failed, Operation, choose
from tests.engines.runtime.kernels.by_name import timer

EXACT = torch.ones(4)


def failing(error: Exception, own: bool = False) -> Candidate:
    """Return an implementation that raises."""

    def run() -> Tensor:
        raise error

    return Candidate(run, lambda: None, 0.01, own)


def operation(installed: list[str], **results: Tensor | Candidate) -> Operation:
    """Return an operation whose implementations have these results; they append their names when installed.

    Those whose names begin with "own" are kernels of this project.
    """

    def candidate(name: str, result: Tensor | Candidate) -> Candidate:
        if isinstance(result, Candidate):
            return result
        return Candidate(lambda: result, lambda: installed.append(name), 0.01, name.startswith("own"))

    candidates: Mapping[str, Candidate] = {name: candidate(name, result) for name, result in results.items()}
    return Operation("sum", "4 numbers", 3, 32, candidates, lambda result: relative_error(result, EXACT))


def test_the_fastest_is_installed():
    installed: list[str] = []
    (choice,) = choose([operation(installed, a=EXACT, b=EXACT, c=EXACT)], timer(3.0, 1.0, 2.0))
    assert choice.chosen == "b"
    assert installed == ["b"]
    assert str(choice) == "sum, 4 numbers: a 3e+03 ms, b 1e+03 ms, c 2e+03 ms; using b"


@pytest.mark.parametrize(("seconds", "chosen"), [(0.98, "a"), (0.96, "b")])
def test_the_first_is_preferred_if_the_difference_is_noise(seconds: float, chosen: str):
    (choice,) = choose([operation([], a=EXACT, b=EXACT)], timer(1.0, seconds))
    assert choice.chosen == chosen


@pytest.mark.parametrize("factor", [1.02, 0.98, math.nan, math.inf])
def test_wrong_results_are_not_used_however_fast(factor: float):
    (choice,) = choose([operation([], a=EXACT, b=factor * EXACT)], timer(1.0, 0.1))
    assert choice.chosen == "a"
    assert "b 100 ms but wrong (error" in str(choice)


def test_an_error_within_the_limit_is_correct():
    (choice,) = choose([operation([], a=EXACT, b=1.009 * EXACT)], timer(1.0, 0.1))
    assert choice.chosen == "b"


@pytest.mark.parametrize(("error", "chosen"), [(0.009, "own"), (0.02, "a"), (math.nan, "a")])
def test_a_kernel_that_fails_a_second_check_is_not_used(error: float, chosen: str):
    own = Candidate(lambda: EXACT, lambda: None, 0.01, own=True, check=lambda: error)
    (choice,) = choose([operation([], a=EXACT, own=own)], timer(1.0, 0.1))
    assert choice.chosen == chosen
    assert choice.measured["own"].error == pytest.approx(error, nan_ok=True)


def test_wrong_results_of_all_are_an_error():
    installed: list[str] = []
    with pytest.raises(ConfigError, match="computes wrong results on this device: sum, 4 numbers"):
        choose([operation(installed, a=2 * EXACT, b=failing(RuntimeError("no")))], timer(1.0))
    assert not installed


class OutOfSharedMemoryError(Exception):
    """As Triton's, which has no base in common with those of PyTorch."""


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel"), OutOfSharedMemoryError("shared memory"), torch.OutOfMemoryError("full")]
)
def test_an_implementation_that_fails_is_dropped_with_one_line(error: Exception, caplog: pytest.LogCaptureFixture):
    failed = failing(error, own=True)
    with caplog.at_level(logging.WARNING):
        (choice,) = choose([operation([], own_1=failed, own_2=failed, b=EXACT)], timer(1.0))
    assert choice.chosen == "b"
    assert choice.results["own_1"] == Failed(f"{type(error).__name__}: {error}")
    assert "own_1 not usable, own_2 not usable, b 1e+03 ms; using b" in str(choice)
    assert caplog.messages == [f"sum, 4 numbers: not usable: own_1; own_2: {type(error).__name__}: {error}"]


class InductorError(Exception):
    """As that of torch.compile."""


InductorError.__module__ = "torch._inductor.exc"


def test_a_failure_of_the_compiler_is_not_mistaken_for_a_missing_kernel():
    """The warm-up tries again without the compiler's cache."""
    with pytest.raises(InductorError):
        choose([operation([], a=failing(InductorError("no space")), b=EXACT)], timer(1.0))
    (choice,) = choose([operation([], own=failing(InductorError("no space"), own=True), b=EXACT)], timer(1.0))
    assert choice.chosen == "b"


def test_nothing_is_installed_if_the_device_supports_nothing():
    installed: list[str] = []
    (choice,) = choose([operation(installed, a=failing(RuntimeError("no")))], timer())
    assert choice.chosen is None
    assert not installed
    assert str(choice).endswith("a not usable; using the default of PyTorch")


def test_a_broken_device_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """The next call of CUDA fails, whatever the kernel raised."""

    def broken() -> None:
        raise torch.AcceleratorError("illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(torch.AcceleratorError):
        choose([operation([], own=failing(RuntimeError("launch failed"), own=True), b=EXACT)], timer(1.0))


def test_only_wrong_kernels_of_this_project_leave_the_default_of_pytorch():
    installed: list[str] = []
    (choice,) = choose([operation(installed, a=failing(RuntimeError("no")), own=2 * EXACT)], timer(1.0))
    assert choice.chosen is None
    assert not installed


def test_the_choices_are_one_log_record_with_one_line_per_operation(caplog: pytest.LogCaptureFixture):
    """The server limits how often a line may log."""
    with caplog.at_level(logging.INFO):
        choices = choose([operation([], a=EXACT), operation([], b=EXACT)], timer(1.0, 1.0))
    (message,) = caplog.messages
    assert message.splitlines() == [str(choice) for choice in choices]
