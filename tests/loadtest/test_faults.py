"""Faults under load: the evaluation of observations, and a short run against real server processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.faults import Watch, evaluate_fault, measures
from loadtest.outcome import Failure, Outcome, OutcomeKind
from loadtest.scenario import Fault
from loadtest.scrape import Sample, continuous

SURVIVED, FATAL = Fault(fault="fail-step"), Fault(fault="poison-device", exits=1)
UNAVAILABLE = Failure(1.0, 1.1, 503)
LOST = Failure(1.0, 1.1, 0, "connection lost: closed by the server")


def outcome(*failures: Failure, at: float = 1.0, kind: OutcomeKind = OutcomeKind.IN_TIME) -> Outcome:
    return Outcome(at, "a", kind, lag=0.0, latency=2.0, status=200, failures=failures)


def watch(*probes: tuple[int, int], exit_status: int | None = None, then: tuple[int, int] | None = None) -> Watch:
    observed = Watch()
    for at, probe in enumerate(probes):
        observed.record(*probe, float(at))
    observed.exit = exit_status
    if then is not None:
        observed.record(*then, 99.0)
    return observed


def exited(**changes: object) -> Watch:
    """Observations of a process that turned unhealthy, exited with 1 and was replaced by a healthy one."""
    return watch(*([(200, 200)] * 3), (503, 503), **{"exit_status": 1, "then": (200, 200), **changes})  # type: ignore[arg-type]


class TestEvaluation:
    def test_a_survived_fault_is_as_expected(self):
        result = evaluate_fault(SURVIVED, [outcome(Failure(1.0, 1.1, 500)), outcome()], watch((200, 200), (200, 200)))
        assert (result.sent, result.affected, result.recovered, result.unanswered) == (2, 1, 1, 0)
        assert result.failures == {"status 500": 1}
        assert result.recovery_seconds == pytest.approx(1.9)
        assert result.as_expected

    def test_a_fatal_fault_is_as_expected(self):
        result = evaluate_fault(FATAL, [outcome(UNAVAILABLE)], exited())
        assert result.states == ("live, ready", "not live, not ready")
        assert (result.exit, result.as_expected) == (1, True)

    def test_a_stall_is_expected_only_before_a_step_that_hangs(self):
        stalled = watch((200, 200), (200, 503), (503, 503), exit_status=1, then=(200, 200))
        hang = Fault(fault="hang-step", exits=1, stalls=True)
        assert evaluate_fault(hang, [outcome(UNAVAILABLE)], stalled).as_expected
        assert not evaluate_fault(hang, [outcome(UNAVAILABLE)], exited()).as_expected
        assert not evaluate_fault(FATAL, [outcome(UNAVAILABLE)], stalled).as_expected

    @pytest.mark.parametrize(
        ("fault", "observed"),
        [
            (SURVIVED, exited()),
            (SURVIVED, watch((200, 200), (200, 503), (200, 200))),
            (FATAL, watch((200, 200))),
            (FATAL, exited(exit_status=0)),
            (FATAL, exited(then=(200, 503))),
            (FATAL, exited(then=None)),
            (FATAL, watch((200, 200), exit_status=1, then=(200, 200))),  # no probe saw it unhealthy
        ],
    )
    def test_unexpected_states_are_detected(self, fault: Fault, observed: Watch):
        assert not evaluate_fault(fault, [outcome(UNAVAILABLE)], observed).as_expected

    def test_an_attempt_without_a_response_counts_only_while_the_process_was_live(self):
        assert evaluate_fault(SURVIVED, [outcome(LOST)], watch((200, 200))).unanswered == 1
        late = Failure(3.5, 3.6, 0, LOST.reason)
        assert evaluate_fault(FATAL, [outcome(LOST), outcome(late)], exited()).unanswered == 1

    def test_truncated_responses_and_refused_connections_do_not_count_as_unanswered(self):
        failures = Failure(1.0, 1.1, 200, LOST.reason), Failure(1.0, 1.1, 0, "no connection: Connection refused")
        result = evaluate_fault(SURVIVED, [outcome(*failures)], watch((200, 200)))
        assert result.unanswered == 0
        assert set(result.failures) == {"status 200, truncated", "no connection: Connection refused"}

    def test_a_missing_recovery_is_reported(self):
        lost = evaluate_fault(SURVIVED, [outcome(UNAVAILABLE, kind=OutcomeKind.ERROR)], watch((200, 200)))
        unaffected = evaluate_fault(SURVIVED, [outcome()], watch((200, 200)))
        values = measures([lost, unaffected])
        assert (values["faults_met"], values["recovered"], values["recovery_s"]) == (0.5, 0.0, math.inf)
        assert "no recovery" in str(lost)


def test_counters_continue_after_a_process_was_replaced():
    def sample(steps: float, cpu: float, queue: float) -> Sample:
        return Sample(0.0, queue, 0.0, steps, steps, steps, steps, 0.0, 0.0, cpu)

    joined = continuous([sample(10, 5, 3), sample(20, 6, 4), sample(1, 2, 0), sample(5, 3, 1)])
    assert [s.steps for s in joined] == [10, 20, 21, 25]
    assert [s.cpu_seconds for s in joined] == [5, 6, 8, 9]
    assert [s.queue_images for s in joined] == [3, 4, 0, 1]


@pytest.mark.slow  # starts three servers
def test_a_short_run_meets_every_threshold(small_table: Path, tmp_path: Path):
    """Two faults on real processes under load: one that the process survives and a fatal one."""
    (tmp_path / "faults.toml").write_text("""
title = "Short"
duration = 4
warm_up = 0
timeout = 60
retry = true
flags = ["--failure-exit-delay", "0.3"]
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
    arguments = ["--simulate", str(small_table), "--scenario", str(tmp_path / "faults.toml")]
    status = main([*arguments, "--output", str(tmp_path)])
    document = json.loads((tmp_path / "report.json").read_text())
    survived, fatal = document["faults"]
    assert status == 0, document["summary"]["checks"]
    assert (survived["exit"], fatal["exit"]) == (None, 1)
    assert sum(survived["failures"].values()) == 2  # status 500, or truncated if the response had begun
    assert all(outcome["kind"] == "in time" for outcome in document["outcomes"])
