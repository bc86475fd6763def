"""Faults under load: how what was seen is judged, and a short run on servers of their own processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.faults import FaultResult, Watch, judge_fault, measures
from loadtest.generator import Failure, Outcome
from loadtest.scenario import Fault
from loadtest.scrape import Sample, continuous

STAYS, ENDS = Fault(fault="fail-step"), Fault(fault="poison-device", exits=1)
REFUSED = Failure(1.0, 1.1, 503)
CUT = Failure(1.0, 1.1, 0, "connection lost: closed by the server")


def outcome(*failures: Failure, at: float = 1.0, kind: str = "in time") -> Outcome:
    return Outcome(at, "a", kind, lag=0.0, latency=2.0, status=200, failures=failures)  # type: ignore[arg-type]


def watch(*probes: tuple[int, int], exit_status: int | None = None, then: tuple[int, int] | None = None) -> Watch:
    seen = Watch()
    for at, probe in enumerate(probes):
        seen.saw(*probe, float(at))
    seen.exit = exit_status
    if then is not None:
        seen.saw(*then, 99.0)
    return seen


def ended(**changes: object) -> Watch:
    return watch(*([(200, 200)] * 3), (503, 503), **{"exit_status": 1, "then": (200, 200), **changes})  # type: ignore[arg-type]


class TestJudge:
    def test_a_fault_that_the_process_survives(self):
        result = judge_fault(STAYS, [outcome(Failure(1.0, 1.1, 500)), outcome()], watch((200, 200), (200, 200)))
        assert (result.sent, result.met, result.served, result.unanswered) == (2, 1, 1, 0)
        assert result.failures == {"status 500": 1}
        assert result.recovery_seconds == pytest.approx(1.9)
        assert result.as_promised

    def test_a_fault_that_ends_the_process(self):
        result = judge_fault(ENDS, [outcome(REFUSED)], ended())
        assert result.states == ("live, ready", "not live, not ready")
        assert (result.exit, result.as_promised) == (1, True)

    @pytest.mark.parametrize(
        ("fault", "seen"),
        [
            (STAYS, ended()),
            (STAYS, watch((200, 200), (200, 503), (200, 200))),
            (ENDS, watch((200, 200))),
            (ENDS, ended(exit_status=0)),
            (ENDS, ended(then=(200, 503))),
            (ENDS, ended(then=None)),
            (ENDS, watch((200, 200), exit_status=1, then=(200, 200))),  # nobody was told before it ended
        ],
    )
    def test_another_state_than_was_promised(self, fault: Fault, seen: Watch):
        assert not judge_fault(fault, [outcome(REFUSED)], seen).as_promised

    def test_an_attempt_without_an_answer_counts_while_the_process_was_live(self):
        assert judge_fault(STAYS, [outcome(CUT)], watch((200, 200))).unanswered == 1
        late = Failure(3.5, 3.6, 0, CUT.reason)
        assert judge_fault(ENDS, [outcome(CUT), outcome(late)], ended()).unanswered == 1

    def test_an_answer_broken_off_and_a_connection_refused_are_not_without_an_answer(self):
        failures = Failure(1.0, 1.1, 200, CUT.reason), Failure(1.0, 1.1, 0, "no connection: Connection refused")
        result = judge_fault(STAYS, [outcome(*failures)], watch((200, 200)))
        assert result.unanswered == 0
        assert set(result.failures) == {"status 200, broken off", "no connection: Connection refused"}

    def test_what_never_recovers_shows(self):
        lost = judge_fault(STAYS, [outcome(REFUSED, kind="error")], watch((200, 200)))
        unmet = judge_fault(STAYS, [outcome()], watch((200, 200)))
        values = measures([lost, unmet])
        assert (values["faults_met"], values["recovered"], values["recovery_s"]) == (0.5, 0.0, math.inf)
        assert "served again never" in str(lost)


def test_counters_go_on_where_a_replaced_process_left_them():
    def sample(steps: float, cpu: float, queue: float) -> Sample:
        return Sample(0.0, queue, 0.0, steps, steps, steps, steps, 0.0, 0.0, cpu)

    joined = continuous([sample(10, 5, 3), sample(20, 6, 4), sample(1, 2, 0), sample(5, 3, 1)])
    assert [s.steps for s in joined] == [10, 20, 21, 25]
    assert [s.cpu_seconds for s in joined] == [5, 6, 8, 9]
    assert [s.queue_images for s in joined] == [3, 4, 0, 1]


def test_a_short_run_finds_every_promise_kept(tmp_path: Path):
    """Two faults, one that the process survives and one that it does not, on real processes under load."""
    table = {
        "name": "small",
        "estimated": True,
        "source": "",
        "costs": {"64x64": {"condition": 0.001, "step": 0.005, "finish": 0.001}},
    }
    (tmp_path / "table.json").write_text(json.dumps(table))
    (tmp_path / "faults.toml").write_text("""
title = "Short"
duration = 4
warm_up = 0
timeout = 60
retry = true
flags = ["--fail-grace", "0.3"]
[arrivals]
rate = 15
[[mix]]
name = "small"
size = "64x64"
[[faults]]
fault = "die-in-encoder=2@5"
[[faults]]
fault = "poison-device@20"
exits = 1
[[thresholds]]
measure = "faults_met"
at_least = 1
[[thresholds]]
measure = "errors"
at_most = 0
[[thresholds]]
measure = "unanswered"
at_most = 0
[[thresholds]]
measure = "recovered"
at_least = 1
[[thresholds]]
measure = "states_as_promised"
at_least = 1
""")
    arguments = ["--simulate", str(tmp_path / "table.json"), "--scenario", str(tmp_path / "faults.toml")]
    status = main([*arguments, "--output", str(tmp_path)])
    document = json.loads((tmp_path / "report.json").read_text())
    faults = [FaultResult(**fault) for fault in document["faults"]]
    assert status == 0, document["summary"]["checks"]
    assert [fault.exit for fault in faults] == [None, 1]
    assert sum(faults[0].failures.values()) == 2  # refused, or broken off where the answer had begun
    assert all(outcome["kind"] == "in time" for outcome in document["outcomes"])
