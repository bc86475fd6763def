"""Run the parts one after another, each in its own process, and keep the report up to date."""

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engines.benchmark.gpu_check import report
from engines.benchmark.gpu_check.carry import missing_packages
from engines.benchmark.gpu_check.config import Part, RunConfig
from engines.benchmark.gpu_check.findings import Failed, Finding, Origin, Result, Skipped, from_row, to_row
from engines.benchmark.gpu_check.origin import describe_origin
from engines.errors import ConfigError, PidError

COMMAND = (sys.executable, "-m", "engines.benchmark.gpu_check")
POLL_SECONDS = 2.0  # interval at which the report shows what a running part has found
KILL_SECONDS = 5.0  # time for killed processes to disappear; one that hangs in a device driver may never do
_KILL_POLL_SECONDS = 0.01

_ORIGIN = "origin"  # key of a child's first row; no measurement has a column of this name

Publish = Callable[[Result], None]  # called with what an unfinished part has found so far
PartRunner = Callable[[Part, RunConfig, float, Publish], Result]  # the float is the part's time limit in seconds


def run_parts(
    parts: Sequence[Part],
    config: RunConfig,
    out: Path,
    seconds: float,
    run_part: PartRunner,
    *,
    earlier: Mapping[str, Result] | None = None,
    known: Sequence[Part] = (),
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Result]:
    """Run `parts` within `seconds` in total.

    Each part may use its budget and what earlier parts have not used of theirs. Budgets grow in proportion if `seconds`
    is more than their sum. If it is less, the last parts do not run: less time would be of no use to most.

    Writes the report to `out` after each part, and whenever a part has found something new.

    Args:
        parts: The parts to run.
        config: Options of all parts.
        out: Directory of the report, which exists.
        seconds: Time limit of all parts together.
        run_part: Runs one part.
        earlier: Results to keep in the report. Those of parts that run now are replaced.
        known: The parts that `earlier` may have results of.
        clock: Returns the time in seconds.

    Returns:
        The results of `parts`.
    """
    started = clock()
    header = report.header(config)
    kept = dict(earlier or {})
    results: dict[str, Result] = {}

    def publish(name: str, result: Result) -> None:
        results[name] = result
        report.write(out, header, known or parts, kept | results)

    if kept:
        report.write(out, header, known or parts, kept)
    growth = max(1.0, seconds / (sum(part.seconds for part in parts) or 1))
    allowed = 0.0
    for part in parts:
        allowed = min(seconds, allowed + part.seconds * growth)
        limit = allowed - (clock() - started)
        report_progress(f"{part.title} …")
        publish(part.name, _run(part, config, limit, run_part, lambda result, name=part.name: publish(name, result)))  # type: ignore[misc]
        report_progress(f"  {report.summary(results[part.name])}")
    return results


def _run(part: Part, config: RunConfig, limit: float, run_part: PartRunner, publish: Publish) -> Result:
    """Run a part, unless it does not apply here."""
    if part.only_on_cuda and not config.on_cuda:
        return Result("skipped", 0.0, (Skipped("runs on CUDA only"),))
    if missing := missing_packages(part.requires):
        text = f"needs {', '.join(missing)}; gpu_check --carry prints how to bring what is missing"
        return Result("skipped", 0.0, (Skipped(text),))
    return run_part(part, config, limit, publish) if limit > 0 else Result("out of time", 0.0)


def report_progress(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def run_in_process(part: Part, config: RunConfig, seconds: float, publish: Publish) -> Result:
    """Run a part in this process. Its time limit is only advisory."""
    started = time.monotonic()
    findings: list[Finding] = []
    collect(part, replace(config, deadline=started + seconds), findings.append)
    return Result.of(findings, time.monotonic() - started, describe_origin(config))


class IsolatedRunner:
    """Run each part in its own process, so that a broken device or a hang does not affect the other parts.

    A part that exceeds its time limit is killed; its findings up to then are kept. The output of all parts is appended
    to gpu_check.log.
    """

    def __init__(
        self, out: Path, command: Sequence[str] = COMMAND, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`command` starts a process that accepts the arguments of this program."""
        self._out, self._command, self._clock = out, command, clock

    def __call__(self, part: Part, config: RunConfig, seconds: float, publish: Publish) -> Result:
        """Run `part` for at most `seconds`."""
        started = self._clock()
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows"
            rows.touch()

            def on_progress() -> None:
                origin, findings = _read_rows(rows)
                publish(Result("unfinished", self._clock() - started, tuple(findings), origin))

            command = [*self._command, *self._arguments(part, config, seconds, rows)]
            code = self._execute(part, command, started + seconds, on_progress)
            origin, findings = _read_rows(rows)
        elapsed = self._clock() - started
        if code is None:
            return Result("out of time", elapsed, tuple(findings), origin)
        if code:
            findings.append(Failed(f"the process exited with status {code}, see {report.LOG_NAME}"))
        return Result.of(findings, elapsed, origin)

    def _arguments(self, part: Part, config: RunConfig, seconds: float, rows: Path) -> list[str]:
        arguments = ["--out", str(self._out), "--child", part.name, str(rows), "--seconds", str(seconds)]
        arguments += ["--device", str(config.device), "--vectors", str(config.vectors)]
        arguments += ["--small"] if config.small else []
        arguments += ["--bundle", str(config.bundle)] if config.bundle else []
        arguments += ["--commit", config.commit] if config.commit else []
        return arguments

    def _execute(
        self, part: Part, command: Sequence[str], deadline: float, on_progress: Callable[[], None]
    ) -> int | None:
        """Return the exit status, or None if the process was still running at `deadline`."""
        with (self._out / report.LOG_NAME).open("a") as log:
            print(f"== {part.name}", file=log, flush=True)
            # A new session, so that killing its group also ends what it starts: compiler workers, a server.
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603
            try:
                while (left := deadline - self._clock()) > 0:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(min(left, POLL_SECONDS))
                    on_progress()
                return None
            finally:
                _kill_group(process)


def _kill_group(leader: subprocess.Popen[bytes]) -> None:
    """Kill the leader of a process group and what it started, and wait until their memory on the device is free."""
    deadline = time.monotonic() + KILL_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
        while time.monotonic() < deadline:
            leader.poll()  # a leader that is not waited for would stay in the group
            os.killpg(leader.pid, 0)
            time.sleep(_KILL_POLL_SECONDS)


def run_child(part: Part, config: RunConfig, rows: Path) -> None:
    """Run one part and append its origin and findings to a file, one JSON object per line."""
    with rows.open("a", buffering=1) as file:  # line-buffered: findings survive if this process is killed
        print(json.dumps({_ORIGIN: describe_origin(config)}), file=file)
        collect(part, config, lambda finding: print(json.dumps(to_row(finding)), file=file))


def _read_rows(path: Path) -> tuple[Origin, list[Finding]]:
    """Read what a child has written; the last line is incomplete if it was killed meanwhile."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    origin: Origin = rows.pop(0)[_ORIGIN] if rows and _ORIGIN in rows[0] else {}
    return origin, [from_row(row) for row in rows]


def collect(part: Part, config: RunConfig, write: Callable[[Finding], object]) -> None:
    """Run a part and pass its findings to `write`. An exception becomes a `Failed` finding."""
    try:
        for finding in part.run(config):
            write(finding)
    except PidError as error:
        cause = f" ({str(error.__cause__).splitlines()[0]})" if str(error.__cause__ or "") else ""
        write(Failed(f"{error}{cause}"))
    except Exception as error:  # the remaining parts must still run
        traceback.print_exc()
        write(Failed(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))


def make_directory(path: Path) -> None:
    """Create the directory of the report. Raises ConfigError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot create the --out directory {path}: {error.strerror}.") from error


def process_age() -> float:
    """Return the seconds since this process was started, such as those of importing PyTorch; 0 except on Linux."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return max(0.0, since_boot - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
