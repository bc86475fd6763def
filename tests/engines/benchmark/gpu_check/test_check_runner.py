"""Parts in their own processes: time limits, failures, and the report while they run."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from engines.benchmark.gpu_check import __main__ as gpu_check
from engines.benchmark.gpu_check import runner
from engines.benchmark.gpu_check.config import Part, RunConfig
from engines.benchmark.gpu_check.findings import Failed, Finding, Measurement, Note, Result
from engines.benchmark.gpu_check.runner import IsolatedRunner, Publish, process_age, run_in_process, run_parts
from tests.engines.benchmark.gpu_check.parts import CONFIG, fake_part, ignore, measured
from tests.waiting import until


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class TestIsolatedParts:
    """Child processes run a small script, because importing torch takes seconds."""

    def child(self, folder: Path, script: str, clock: Callable[[], float] = time.monotonic) -> IsolatedRunner:
        path = folder / "child.py"
        path.write_text(f"import json, os, sys, time\nrows = sys.argv[sys.argv.index('--child') + 2]\n{script}\n")
        return IsolatedRunner(folder, [sys.executable, "-S", str(path)], clock)

    def run_until(self, condition: Callable[[], bool], folder: Path, script: str, publish: Publish = ignore) -> Result:
        """Run a child whose time is up as soon as `condition` is true."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "POLL_SECONDS", 0.05)
            clock = lambda: 1000.0 if condition() else 0.0  # noqa: E731
            return self.child(folder, script, clock)(fake_part("part"), CONFIG, 600, publish)

    def test_findings_and_their_origin_come_from_a_child_process(self, tmp_path: Path):
        script = """open(rows, 'a').write('{"origin": {"device": "x"}}\\n{"a": 1}\\n{"note": "text"}\\n{"unfini')"""
        result = self.child(tmp_path, script)(fake_part("part"), CONFIG, 60, ignore)
        assert (result.status, result.findings) == ("done", (Measurement({"a": 1}), Note("text")))
        assert result.origin == {"device": "x"}

    @pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, bundle=Path("b"), vectors=Path("v"), commit="c")])
    def test_a_child_gets_the_options_of_its_parent(self, tmp_path: Path, config: RunConfig):
        arguments = tmp_path / "arguments.json"
        run_child = self.child(tmp_path, f"json.dump(sys.argv[1:], open({str(arguments)!r}, 'w'))")
        run_child(fake_part("part"), config, 60, ignore)
        received: list[RunConfig] = []

        def receive(config: RunConfig) -> Iterator[Finding]:
            received.append(config)
            yield Note("received")

        rows = tmp_path / "rows"
        command = json.loads(arguments.read_text())
        command[command.index("--child") + 2] = str(rows)  # the parent has removed its own file
        assert gpu_check.main(command, {"first": [Part("part", "Part", 1, receive)]}) == 0
        origin, finding = map(json.loads, rows.read_text().splitlines())
        assert origin["origin"]["device"] == "cpu"
        assert finding == {"note": "received"}
        assert 0 < received[0].seconds_left <= 60
        assert replace(received[0], deadline=config.deadline) == config

    def test_a_part_that_exceeds_its_time_is_stopped_and_keeps_what_it_found(self, tmp_path: Path):
        script = """open(rows, 'a').write('{"a": 1}\\n'); time.sleep(600)"""
        seen: list[Result] = []
        result = self.run_until(lambda: bool(seen and seen[-1].findings), tmp_path, script, seen.append)
        assert result.status == "out of time"
        assert result.findings == (Measurement({"a": 1}),)

    def test_programs_that_a_part_started_end_with_it(self, tmp_path: Path):
        child = "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
        script = (
            "import subprocess\n"
            f"subprocess.Popen([sys.executable, '-c', 'import os, sys, time; {child}', {str(tmp_path / 'pid')!r}])\n"
            "time.sleep(600)"
        ).replace("'w'", '"w"')
        file = tmp_path / "pid"
        self.run_until(lambda: file.exists() and bool(file.read_text()), tmp_path, script)
        pid = int(file.read_text())
        until(lambda: has_ended(pid))

    def test_the_report_shows_what_a_running_part_has_found(self, tmp_path: Path):
        seen: list[Result] = []
        script = """open(rows, 'a').write('{"a": 1}\\n'); time.sleep(600)"""
        self.run_until(lambda: bool(seen and seen[-1].findings), tmp_path, script, seen.append)
        assert seen[-1].findings == (Measurement({"a": 1}),)
        assert {result.status for result in seen} == {"unfinished"}

    def test_a_process_that_dies_is_a_failure(self, tmp_path: Path):
        run_child = self.child(tmp_path, "sys.stderr.write('out of memory'); sys.exit(1)")
        result = run_child(fake_part("part"), CONFIG, 60, ignore)
        assert result.status == "failed"
        assert result.findings == (Failed("the process exited with status 1, see gpu_check.log"),)

    def test_the_output_of_all_parts_is_in_one_file(self, tmp_path: Path):
        run_child = self.child(tmp_path, "print('from', sys.argv[sys.argv.index('--child') + 1])")
        for name in ("first", "second"):
            run_child(fake_part(name), CONFIG, 60, ignore)
        lines = (tmp_path / "gpu_check.log").read_text().splitlines()
        assert lines == ["== first", "from first", "== second", "from second"]


def test_no_part_starts_when_the_time_is_used_up(tmp_path: Path):
    def never(part: Part, config: RunConfig, seconds: float, publish: Publish) -> Result:
        raise AssertionError

    results = run_parts([fake_part("first"), fake_part("second")], CONFIG, tmp_path, 0.0, never)
    assert [result.status for result in results.values()] == ["out of time"] * 2
    assert "out of time" in (tmp_path / "gpu_check.md").read_text()


def test_unused_time_goes_to_later_parts(tmp_path: Path):
    limits: list[float] = []

    def quick(part: Part, config: RunConfig, seconds: float, publish: Publish) -> Result:
        limits.append(seconds)
        return Result("done", 0.0)

    run_parts([fake_part("first"), fake_part("second")], CONFIG, tmp_path, 1000.0, quick)
    assert limits == pytest.approx([500, 1000], abs=50)


def test_if_the_time_is_short_the_first_parts_have_all_of_theirs(tmp_path: Path):
    limits: dict[str, float] = {}
    now = 0.0

    def slow(part: Part, config: RunConfig, seconds: float, publish: Publish) -> Result:
        nonlocal now
        limits[part.name] = seconds
        now += seconds
        return Result("out of time", seconds)

    parts = [fake_part(name) for name in ("first", "second", "third")]
    results = run_parts(parts, CONFIG, tmp_path, 150.0, slow, clock=lambda: now)
    assert limits == {"first": 100, "second": 50}
    assert [result.status for result in results.values()] == ["out of time"] * 3


def test_unfinished_results_are_in_the_report(tmp_path: Path):
    def publishing(part: Part, config: RunConfig, seconds: float, publish: Publish) -> Result:
        publish(Result("unfinished", 1.0, (Measurement({"a": 1}),)))
        written = json.loads((tmp_path / "gpu_check.json").read_text())
        assert written["parts"]["part"]["status"] == "unfinished"
        assert written["parts"]["part"]["rows"] == [{"a": 1}]
        return Result("done", 2.0)

    results = run_parts([fake_part("part")], CONFIG, tmp_path, 1000.0, publishing)
    assert results["part"].status == "done"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"only_on_cuda": True}, "runs on CUDA only"),
        ({"requires": ("json", "no_such_package")}, "needs no_such_package; gpu_check --carry prints how"),
    ],
)
def test_parts_that_cannot_run_here_are_skipped(tmp_path: Path, fields: dict, reason: str):
    results = run_parts([fake_part("part", **fields)], CONFIG, tmp_path, 100.0, run_in_process)
    assert results["part"].status == "skipped"
    assert reason in (tmp_path / "gpu_check.md").read_text()


def test_a_part_in_this_process_gets_its_deadline():
    def left(config: RunConfig) -> Iterator[Finding]:
        yield Measurement({"left": config.seconds_left})

    result = run_in_process(Part("part", "Part", 1, left), CONFIG, 30, ignore)
    (row,) = measured(list(result.findings))
    assert 0 < row["left"] <= 30
    assert result.origin["device"] == "cpu"


def test_the_age_of_a_process_grows():
    before = process_age()
    time.sleep(0.05)
    assert before < process_age() < 100_000
