"""Run the parts one after another, each in its own process, and write the report after each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from engines.benchmark.compare import report_progress
from engines.benchmark.gpu_check import report
from engines.benchmark.gpu_check.config import Part, RunConfig
from engines.benchmark.gpu_check.findings import Failed, Finding, Result, Skipped, from_row
from engines.errors import ConfigError, PidError

COMMAND = (sys.executable, "-m", "engines.benchmark.gpu_check")

PartRunner = Callable[[Part, RunConfig, float], Result]  # the float is the part's time limit in seconds


def run_parts(
    parts: Sequence[Part], config: RunConfig, out: Path, seconds: float, run_part: PartRunner
) -> dict[str, Result]:
    """Run `parts` within `seconds` in total, divided in proportion to their budgets.

    Writes gpu_check.json and gpu_check.md to `out` after each part. Raises ConfigError if `out` cannot be created.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot create the --out directory {out}: {error.strerror}.") from error
    started = time.monotonic()
    header = report.header(config)
    results: dict[str, Result] = {}
    per_budgeted_second = seconds / sum(part.seconds for part in parts)
    allowed = 0.0
    for part in parts:
        allowed += part.seconds * per_budgeted_second
        limit = allowed - (time.monotonic() - started)
        report_progress(f"{part.title} …")
        results[part.name] = run_part(part, config, limit) if limit > 0 else Result("out of time", 0)
        report_progress(f"  {report.summary(results[part.name])}")
        header["seconds"] = f"{time.monotonic() - started:.0f}"
        report.write(out, header, parts, results)
    return results


def run_in_process(part: Part, config: RunConfig, seconds: float) -> Result:
    """Run a part in this process. Its time limit is only advisory."""
    started = time.monotonic()
    findings: list[Finding] = []
    collect(part, replace(config, deadline=started + seconds), findings.append)
    return Result.of(findings, time.monotonic() - started)


class IsolatedRunner:
    """Run each part in its own process, so that a broken device or a hang does not affect the other parts.

    A part that exceeds its time limit is killed; its findings up to then are kept. The output of a part that fails is
    kept in `<part>.log`.
    """

    def __init__(self, out: Path, command: Sequence[str] = COMMAND) -> None:
        """`command` starts a process that accepts the arguments of this program."""
        self._out, self._command = out, command

    def __call__(self, part: Part, config: RunConfig, seconds: float) -> Result:
        """Run `part` for at most `seconds`."""
        log = self._out / f"{part.name}.log"
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows"
            rows.touch()
            code = self._run([*self._command, *self._arguments(part, config, seconds, rows)], log, seconds)
            # The last line is incomplete if the process was killed while it wrote.
            findings = [from_row(json.loads(line)) for line in rows.read_text().splitlines() if line.endswith("}")]
        elapsed = time.monotonic() - started
        if code is None:
            return Result("out of time", elapsed, tuple(findings))
        if code:
            findings.append(Failed(f"the process exited with status {code}, see {log.name}"))
        result = Result.of(findings, elapsed)
        if result.status != "failed":
            log.unlink()
        return result

    def _arguments(self, part: Part, config: RunConfig, seconds: float, rows: Path) -> list[str]:
        arguments = ["--out", str(self._out), "--child", part.name, str(rows), "--seconds", str(seconds)]
        arguments += ["--device", str(config.device), "--vectors", str(config.vectors)]
        arguments += ["--small"] if config.small else []
        arguments += ["--bundle", str(config.bundle)] if config.bundle else []
        return arguments

    @staticmethod
    def _run(command: Sequence[str], log: Path, seconds: float) -> int | None:
        """Return the exit status, or None if the process was still running after `seconds`."""
        with log.open("w") as output:
            # A new session, so that killing its group also ends what it starts, such as the compiler's workers.
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)  # noqa: S603
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def collect(part: Part, config: RunConfig, write: Callable[[Finding], object]) -> None:
    """Run a part and pass its findings to `write`. An exception becomes a `Failed` finding."""
    if part.only_on_cuda and config.device.type != "cuda":
        write(Skipped(f"{part.title} runs on CUDA only"))
        return
    try:
        for finding in part.run(config):
            write(finding)
    except PidError as error:
        cause = f" ({str(error.__cause__).splitlines()[0]})" if str(error.__cause__ or "") else ""
        write(Failed(f"{error}{cause}"))
    except Exception as error:  # the remaining parts must still run
        traceback.print_exc()
        write(Failed(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
