"""The cost table: estimates follow the observations, and nothing observed makes them wrong for long."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.size import Size
from server.errors import QueueFullError
from server.images.encoder import Encoding
from server.images.formats import OUTPUT_FORMATS
from server.scheduling.costs import PNG_FAST, CostTable, Output
from server.scheduling.jobs import Job, Limits, Priority
from server.scheduling.scheduler import Scheduler

SMALL, LARGE = Output("flux", Size(2048, 2048)), Output("flux", Size(4096, 4096))
BASELINE = {"condition": 0.02, "step": 0.05, "finish": 0.01, "encode": 0.1}


def cost_table() -> CostTable:
    """Return the table after a warm-up that measured BASELINE, and four times as much for LARGE."""
    table = CostTable()
    for (stage, seconds), (size, factor) in itertools.product(BASELINE.items(), ((SMALL, 1), (LARGE, 4))):
        table.measure(stage, size, factor * seconds, encoding=PNG_FAST if stage == "encode" else "")  # type: ignore[arg-type]
    return table


class TestWarmUp:
    def test_the_lowest_measurement_counts(self):
        table = CostTable()
        for seconds in (4.0, 1.0, 1.2):
            table.measure("step", SMALL, seconds)
        assert table.step(SMALL) == table.baseline.step(SMALL) == 1.0

    def test_an_unmeasured_batch_is_assumed_to_gain_nothing(self):
        table = CostTable()
        table.measure("step", SMALL, 2.0)
        assert table.step(SMALL, 3) == 6.0

    def test_an_unknown_size_is_scaled_by_area_from_the_nearest_known_one(self):
        table = CostTable()
        table.measure("finish", SMALL, 1.0)
        assert table.finish(LARGE) == 4.0
        assert CostTable().finish(LARGE) == 0.0

    def test_every_encoding_has_a_cost_after_the_warm_up(self):
        table = cost_table()
        encodings = [Encoding(x, compression) for x in OUTPUT_FORMATS for compression in ("fast", "best", "none")]
        costs = {encoding.kind: table.encode(SMALL, encoding.kind) for encoding in encodings}
        assert all(costs.values())
        assert costs["png-none"] < costs[PNG_FAST] < costs["webp"] < costs["png-best"]


class TestObservations:
    def test_the_estimate_follows_a_lasting_change(self):
        table, now = cost_table(), 0.0
        for seconds in (0.5, 0.05, 0.02):
            for _ in range(60):
                now += seconds
                table.advance(now)
                table.observe("step", SMALL, seconds, now)
            assert table.step(SMALL) == pytest.approx(seconds, rel=0.05)

    def test_an_outlier_counts_as_at_most_twice_the_estimate(self):
        table = cost_table()
        for now in range(3):
            table.observe("step", SMALL, 0.05, float(now))
        table.observe("step", SMALL, 20.0, 3.0)
        assert table.step(SMALL) < 0.07

    def test_a_cost_of_zero_can_grow(self):
        table = CostTable()
        table.measure("step", SMALL, 0.0)
        for number in range(100):
            table.observe("step", SMALL, 0.01, 0.001 * number)
        assert table.step(SMALL) > 0.005

    def test_encodings_do_not_affect_each_other(self):
        table = cost_table()
        before = table.encode(SMALL)
        table.observe("encode", SMALL, 3.0, 0.0, encoding="png-best")
        assert table.encode(SMALL) == before
        assert table.encode(SMALL, "png-best") == 3.0

    def test_the_first_observation_replaces_a_derived_cost(self):
        table = cost_table()
        derived = table.encode(SMALL, "webp")
        table.observe("encode", SMALL, 10 * derived, 0.0, encoding="webp")
        assert table.encode(SMALL, "webp") == pytest.approx(10 * derived)
        table.observe("encode", SMALL, 100 * derived, 0.0, encoding="webp")
        assert table.encode(SMALL, "webp") < 20 * derived

    def test_without_observations_the_estimate_returns_to_the_baseline(self):
        table = cost_table()
        for number in range(20):
            table.observe("step", SMALL, 1.0, 0.1 * number)
        assert table.step(SMALL) > 0.3
        table.advance(60.0)
        assert table.step(SMALL) == pytest.approx(0.05, rel=0.01)

    def test_regular_observations_keep_the_estimate_however_slow_the_stage_is(self):
        """A stage of 30 s is observed every 30 s, which must not count as time without observations."""
        table = CostTable()
        table.measure("step", SMALL, 20.0)
        for number in range(30):
            table.advance(30.0 * number)
            table.observe("step", SMALL, 30.0, 30.0 * number)
        assert table.step(SMALL) == pytest.approx(30.0, rel=0.05)


class TestBaseline:
    def test_slow_observations_do_not_raise_it(self):
        table = cost_table()
        for number in range(100):
            table.observe("step", SMALL, 5.0, 0.1 * number)
        assert table.baseline.step(SMALL) == 0.05

    def test_one_fast_observation_hardly_lowers_it_and_many_do(self):
        table = CostTable()
        table.measure("step", SMALL, 3.0)  # a warm-up that something disturbed
        table.observe("step", SMALL, 0.05, 0.0)
        table.advance(100.0)
        assert table.baseline.step(SMALL) > 2.5
        for number in range(50):
            table.observe("step", SMALL, 0.05, 100.0 + number)
        assert table.baseline.step(SMALL) < 0.1

    def test_after_fast_observations_it_returns_to_the_warm_up_measurement(self):
        table = cost_table()
        for number in range(100):
            table.observe("encode", SMALL, 0.01, 0.1 * number, encoding=PNG_FAST)  # flat images
        for number in range(100):
            table.observe("encode", SMALL, 0.2, 10 + 0.1 * number, encoding=PNG_FAST)
        assert table.baseline.encode(SMALL) == pytest.approx(0.1, rel=0.01)


ENCODINGS = (PNG_FAST, "png-best", "webp")
KEYS = [*itertools.product(("condition", "step", "finish"), (SMALL, LARGE), ("",))]
KEYS += itertools.product(("encode",), (SMALL, LARGE), ENCODINGS)
SECONDS = st.floats(0, 1e6, allow_nan=False)
OBSERVATIONS = st.lists(st.tuples(st.sampled_from(KEYS), SECONDS, SECONDS, st.integers(1, 20)), max_size=15)


class TestNothingLocksRequestsOut:
    """After any observations, requests whose deadline the baseline allows are accepted again."""

    @staticmethod
    def server(observations) -> tuple[Scheduler, float]:
        """Return an idle server after each of (key, seconds, gap, repetitions)."""
        table, now = cost_table(), 0.0
        for (stage, size, encoding), seconds, gap, repetitions in observations:
            for _ in range(repetitions):
                now += gap
                table.advance(now)
                table.observe(stage, size, seconds, now, encoding=encoding)
        limits = Limits(slots=1, shares=(1.0, 0.9, 0.5))
        return Scheduler(table, limits, {"gpu": {SMALL: 1, LARGE: 1}}), now

    @staticmethod
    def possible(s: Scheduler, now: float, size: Size, encoding: str, priority: Priority) -> Job:
        """Return a job whose deadline is as short as the baseline allows."""
        needed = s.costs.baseline.decode(size, encoding) * (1 + s.limits.prediction_margin)
        return Job(size, (0, 1, 2, 3), priority, now + needed + 1e-5, "", encoding, payload=None)

    @given(OBSERVATIONS, st.sampled_from([SMALL, LARGE]), st.sampled_from(ENCODINGS), st.sampled_from(list(Priority)))
    @settings(deadline=None, max_examples=300)
    def test_an_idle_server_accepts_them_at_once(self, observations, size, encoding, priority):
        s, now = self.server(observations)
        s.admit([self.possible(s, now, size, encoding, priority)], now)
        assert s.queued() == 1

    @given(OBSERVATIONS, st.sampled_from(ENCODINGS))
    @settings(deadline=None, max_examples=300)
    def test_a_server_with_other_traffic_accepts_them_within_a_bounded_time(self, observations, encoding):
        """The device always holds an image of another size, so that no request is accepted as a probe."""
        s, now = self.server(observations)
        for stage in ("condition", "step", "finish"):
            for _ in range(300):  # the traffic corrects its own estimates
                s.costs.observe(stage, LARGE, 4 * BASELINE[stage], now)
        s.admit([Job(LARGE, (0, 1, 2, 3), payload=None)], now)
        s.plan("gpu", now)
        later = now + 300
        s.costs.observe("step", LARGE, 4 * BASELINE["step"], later)
        s.expire(later)
        needed = 2 * (s.costs.image(LARGE, True, 4) + s.costs.baseline.decode(SMALL, encoding))
        s.admit([Job(SMALL, (0, 1, 2, 3), Priority.STANDARD, later + needed, "", encoding, payload=None)], later)
        assert s.queued() == 1

    def test_only_one_request_probes_at_a_time_and_it_endangers_only_itself(self):
        table = cost_table()
        for number in range(60):
            table.observe("step", SMALL, 5.0, 0.01 * number)
        s = Scheduler(table, Limits(slots=1), {"gpu": {SMALL: 1, LARGE: 1}})
        probe = self.possible(s, 0.6, SMALL, PNG_FAST, Priority.STANDARD)
        s.admit([probe], 0.6)
        with pytest.raises(QueueFullError):
            s.admit([self.possible(s, 0.6, SMALL, PNG_FAST, Priority.STANDARD)], 0.6)
        predicted = (1 + s.limits.prediction_margin) * table.decode(SMALL)
        other = Job(SMALL, (0, 1, 2, 3), Priority.STANDARD, 0.6 + predicted + 1e-5, payload=None)
        s.admit([other], 0.6)
        assert s.plan("gpu", 0.6).batch == (other,)

    def test_a_probe_corrects_the_estimate(self):
        table = cost_table()
        for number in range(60):
            table.observe("step", SMALL, 5.0, 0.01 * number)
        for number in range(100):
            table.observe("step", SMALL, 0.05, 0.6 + 0.05 * number)
        assert table.step(SMALL) == pytest.approx(0.05, rel=0.05)

    def test_a_batch_size_that_was_once_slow_forms_again(self):
        table = CostTable()
        for stage in ("condition", "finish"):
            table.measure(stage, SMALL, 0.0)  # type: ignore[arg-type]
        table.measure("encode", SMALL, 0.0, encoding=PNG_FAST)
        for batch in (1, 2):
            table.measure("step", SMALL, 1.0, batch)
        s = Scheduler(table, Limits(slots=2), {"gpu": {SMALL: 2}})
        table.observe("step", SMALL, 1000.0, 0.0, batch=2)
        table.observe("step", SMALL, 1000.0, 0.0, batch=2)
        for now, batch in ((0.0, 1), (60.0, 2)):
            jobs = [Job(SMALL, (0,), payload=None) for _ in range(2)]
            s.admit(jobs, now)
            plan = s.plan("gpu", now)
            assert len(plan.batch) == batch
            s.stepped(plan.batch, now)
            s.stepped(s.plan("gpu", now).batch, now)
