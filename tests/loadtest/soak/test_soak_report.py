"""Checks and table of the soak test, from constructed observations."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest

from engines.errors import ConfigError
from loadtest.soak.kinds import CLOSED, Behaviour, Kind
from loadtest.soak.report import SoakReport
from loadtest.soak.usage import Usage, median_usage, read_usage

KINDS = (Kind("good", 1, b"", ("200",)), Kind("leaving", 1, b"", (), Behaviour.ABORT))
IDLE = Usage(0.0, 100.0, 7, 9)
REPORT = SoakReport(
    kinds=KINDS,
    results={"good": Counter({"200": 95, "429": 1}), "leaving": Counter({"left": 4})},
    duration=300.0,
    seconds=305.0,
    cpu_seconds=30.5,
    lag_p99_ms=1.0,
    before=IDLE,
    after=IDLE,
    samples=[Usage(float(second), 100 + second / 30, 20, 9) for second in range(305)],
    metrics={"undelivered bytes": 0.0},
    exit_status=0,
    memory_bound_mb=16.0,
)


def failed(report: SoakReport) -> list[str]:
    return [check.name for check in report.checks() if not check.passed]


def test_a_run_without_growth_passes():
    assert failed(REPORT) == []
    assert REPORT.passed
    assert REPORT.requests == 100


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"results": {"good": Counter({"500": 1})}}, "unexpected results"),
        ({"results": {"good": Counter({CLOSED: 1})}}, "unexpected results"),
        ({"results": {"leaving": Counter({"200": 1})}}, "unexpected results"),
        ({"results": {"good": Counter({"200": 9, "429": 1})}}, "rejected, % of all requests"),
        ({"memory_bound_mb": 7.0}, "growth of memory, MB"),
        ({"after": replace(IDLE, descriptors=8)}, "descriptors left open"),
        ({"after": replace(IDLE, threads=10)}, "threads, most minus fewest"),
        ({"samples": [*REPORT.samples, Usage(306.0, 100.0, 20, 8)]}, "threads, most minus fewest"),
        ({"metrics": {"undelivered bytes": 1.0}}, "undelivered bytes"),
        ({"exit_status": -9}, "exit status"),
    ],
)
def test_each_check_can_fail(changes: dict, name: str):
    report = replace(REPORT, **changes)
    assert failed(report) == [name]
    assert not report.passed
    assert f"FAIL  {name}" in report.table()


def test_the_first_minute_is_compared_with_the_last_one_of_the_load():
    periods = REPORT.periods()
    assert list(periods) == ["before", "first 60 s", "last 60 s", "after"]
    assert periods["last 60 s"].memory_mb - periods["first 60 s"].memory_mb == pytest.approx(240 / 30)


def test_the_periods_of_a_short_run_do_not_overlap():
    assert list(replace(REPORT, duration=30.0).periods())[1:3] == ["first 10 s", "last 10 s"]


def test_the_table_has_every_kind_and_names_unexpected_results():
    table = replace(REPORT, results={"good": Counter({"200": 5, "500": 2})}).table()
    assert "5 x 200, 2 x 500" in table
    assert "UNEXPECTED  good: {'500': 2}" in table


class TestUsage:
    def test_the_usage_of_this_process_includes_a_new_descriptor(self):
        before = read_usage(os.getpid())
        with open(os.devnull) as file:
            after = read_usage(os.getpid())
            assert file
        assert before.memory_mb > 1
        assert before.threads >= 1
        assert after.descriptors == before.descriptors + 1

    def test_a_process_that_does_not_exist_is_an_error(self):
        with pytest.raises(ConfigError, match="may have exited"):
            read_usage(2**22 + 1)  # above the largest process id of Linux

    def test_medians_are_those_of_the_period(self):
        samples = [Usage(float(at), memory, 1, 1) for at, memory in enumerate((1.0, 5.0, 2.0, 99.0))]
        assert median_usage(samples, 0.0, 3.0).memory_mb == 2.0
