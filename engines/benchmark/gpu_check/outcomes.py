"""Pytest plugin that writes the outcome of each test to a file as soon as it is known, one JSON object per line.

A run that is killed for lack of time thus keeps the outcomes of the tests that have ended.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    import pytest

Outcome = Literal["passed", "failure", "error", "skipped"]
OUTCOMES: tuple[Outcome, ...] = ("passed", "failure", "error", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file."""
    parser.addoption("--outcomes", type=Path, help="file to append the outcomes to")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to record."""
    file = config.getoption("--outcomes").open("a", buffering=1)  # line-buffered
    config.pluginmanager.register(_Recorder(file))


class _Recorder:
    def __init__(self, file: TextIO) -> None:
        self._file = file

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write("error", report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self._write("skipped", report)
        elif report.failed:
            self._write("failure" if report.when == "call" else "error", report)
        elif report.when == "call":
            self._write("passed", report)

    def _write(self, outcome: Outcome, report: pytest.CollectReport | pytest.TestReport) -> None:
        print(json.dumps({"test": report.nodeid, "outcome": outcome, "text": report.longreprtext}), file=self._file)


def read_outcomes(path: Path) -> list[dict[str, Any]]:
    """Return what was recorded; the last line is incomplete if pytest was killed while it wrote it."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
