"""The tests that need a GPU, run by pytest as far as the installed packages allow."""

from __future__ import annotations

import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Failed, Finding, Measurement, Note, Skipped
from engines.benchmark.gpu_check.programs import run_program

HANG_SECONDS = 15  # of one test, after which the log shows where it is
STOP_SECONDS = 2.0  # before the part's deadline
TESTS = Path("tests", "engines")  # in a checkout
_OUTCOMES = ("failure", "error", "skipped")  # elements of a JUnit test case; without one it passed


def run_marked_tests(config: RunConfig, tests: Path = TESTS, marker: str = "gpu") -> Iterator[Finding]:
    """Run the tests with a marker and yield how many passed, and the name and reason of each that did not.

    Files whose imports fail are reported and left out: their packages may be missing on a rented machine.
    """
    if not tests.is_dir():
        yield Skipped(f"the directory {tests} does not exist; start gpu_check in the root of a checkout")
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(tests), "-m", marker, "--continue-on-collection-errors"]
        # If a test hangs, the log names it (-v), and shows where. Short tracebacks do not print tensors.
        command += ["-v", "--tb=short", "-o", f"faulthandler_timeout={HANG_SECONDS}", "-p", "no:cacheprovider"]
        status = run_program([*command, f"--junitxml={report}"], config.seconds_left - STOP_SECONDS)
        if not report.is_file():
            reason = "was stopped for lack of time" if status is None else f"exited with status {status}"
            yield Failed(f"pytest {reason} and wrote no report; the log names the last test")
            return
        cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314  written by pytest just now
    yield from _outcomes(cases)


def _outcomes(cases: list[ElementTree.Element]) -> Iterator[Finding]:
    counts = dict.fromkeys(("passed", *_OUTCOMES), 0)
    notes: list[Finding] = []
    for case in cases:
        child = next((child for child in case if child.tag in _OUTCOMES), None)
        outcome = "passed" if child is None else child.tag
        counts[outcome] += 1
        if child is None or outcome == "skipped":
            continue
        name, reason = f"{case.get('classname')}.{case.get('name')}".strip("."), _reason(child)
        missing = "ModuleNotFoundError" in (child.text or "")
        notes.append(Note(f"left out: {name}: {reason}") if missing else Failed(f"{name}: {reason}"))
    yield Measurement(counts)
    yield from notes


def _reason(element: ElementTree.Element) -> str:
    """Return the line that says why a test failed, or the exception that ended the import of a file."""
    lines = [line[1:].strip() for line in (element.text or "").splitlines() if line.startswith("E ")]
    lines = lines or [element.get("message") or "unknown"]
    return lines[-1 if element.tag == "error" else 0][:200]
