"""The tests that need a GPU, run by pytest as far as the installed packages and the time allow."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engines.benchmark.gpu_check import outcomes
from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Failed, Finding, Measurement, Note, Skipped
from engines.benchmark.gpu_check.programs import run_program

HANG_SECONDS = 15  # of one test, after which the log shows where it is
STOP_SECONDS = 5.0  # before the part's deadline; processes on a GPU do not end at once
TESTS = Path("tests", "engines")  # in a checkout
_ROOT = Path(__file__).parents[3]
_COMPLETE = (0, 1)  # exit statuses of pytest: all tests passed, some failed


def run_marked_tests(config: RunConfig, tests: Path = TESTS, marker: str = "gpu") -> Iterator[Finding]:
    """Run the tests with a marker and yield how many passed, and the name and reason of each that did not.

    Files whose imports fail are reported and left out: their packages may be missing on a rented machine. If the time
    is up, the result has the tests that have ended.
    """
    if not tests.is_dir():
        yield Skipped(f"the directory {tests} does not exist; start gpu_check in the root of a checkout")
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes"
        file.touch()
        command = [sys.executable, "-m", "pytest", str(tests), "-m", marker, "--continue-on-collection-errors"]
        # If a test hangs, the log names it (-v), and shows where. Short tracebacks do not print tensors.
        command += ["-v", "--tb=short", "-o", f"faulthandler_timeout={HANG_SECONDS}"]
        command += ["-o", "faulthandler_exit_on_timeout=false", "-p", "no:cacheprovider"]
        command += ["-p", outcomes.__name__, f"--outcomes={file}"]
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))  # for the plugin
        status = run_program(command, config.seconds_left - STOP_SECONDS, os.environ | {"PYTHONPATH": path})
        yield from _findings(outcomes.read_outcomes(file))
    if status is None:
        yield Note("stopped for lack of time: further tests have not run; the log names the last one")
    elif status not in _COMPLETE:
        yield Failed(f"pytest exited with status {status}; the log names the last test")


def _findings(found: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    counts = Counter(one["outcome"] for one in found)
    yield Measurement({outcome: counts[outcome] for outcome in outcomes.OUTCOMES})
    for one in found:
        if one["outcome"] in ("failure", "error"):
            text = f"{one['test']}: {_reason(one['outcome'], one['text'])}"
            yield Note(f"left out: {text}") if "ModuleNotFoundError" in one["text"] else Failed(text)


def _reason(outcome: str, text: str) -> str:
    """Return the line that says why a test failed, or the exception that ended the import of a file."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = lines or text.splitlines() or ["unknown"]
    return lines[-1 if outcome == "error" else 0][:200]
