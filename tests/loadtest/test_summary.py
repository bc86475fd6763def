"""Percentiles, shares and thresholds, from outcomes made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost
from loadtest.generator import Outcome, Run, judge
from loadtest.http_client import HttpExchange
from loadtest.scenario import Arrivals, RequestClass, Scenario, Threshold
from loadtest.schedule import Arrival, Capacity, Schedule
from loadtest.scrape import Sample, parse
from loadtest.summary import percentile, summarise

SIZE = (64, 64)
CAPACITY = Capacity({SIZE: SimulatedCost(step=0.25)})  # one decode a second
KIND = RequestClass(name="a", size=SIZE)
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def scenario(*thresholds: Threshold, **fields: object) -> Scenario:
    defaults: dict = {"duration": 10.0, "warm_up": 0.0, "arrivals": Arrivals(rate=1), "mix": (KIND,)}
    return Scenario(title="test", thresholds=thresholds, **{**defaults, **fields})


def run(*outcomes: Outcome) -> Run:
    return Run(Schedule((), 10.0), list(outcomes), wall_seconds=10.0, cpu_seconds=1.0)


def answer(at: float, latency: float = 0.5, kind: str = "in time") -> Outcome:
    return Outcome(at, "a", kind, lag=0.0, latency=latency, status=200)  # type: ignore[arg-type]


def sample(at: float, **fields: float) -> Sample:
    return Sample(at, **{**dict.fromkeys(list(Sample.__dataclass_fields__)[1:], 0.0), **fields})


class TestPercentile:
    def test_it_is_the_nearest_rank(self):
        values = [float(i) for i in range(1, 101)]
        assert [percentile(values, q) for q in (50, 90, 99, 99.9, 100)] == [50, 90, 99, 100, 100]

    @pytest.mark.parametrize("count", [1, 2, 7, 100, 999])
    @pytest.mark.parametrize("q", [50.0, 90.0, 99.0, 99.9])
    def test_it_agrees_with_numpys_inverted_cdf(self, count: int, q: float):
        values = np.random.default_rng(count).random(count)
        assert percentile(list(values), q) == np.percentile(values, q, method="inverted_cdf")

    def test_of_nothing_there_is_none(self):
        assert math.isnan(percentile([], 50))


class TestJudge:
    ARRIVAL = Arrival(1.0, KIND)

    def judged(self, deadline: float | None = None, **fields: object) -> Outcome:
        whole = {"status": 200, "sent": 11.0, "done": 12.0, "complete": True, "tail": PNG_END}
        return judge(self.ARRIVAL, HttpExchange(**{**whole, **fields}), 10.0, deadline)  # type: ignore[arg-type]

    def test_latency_counts_from_the_intended_time_however_late_it_was_sent(self):
        outcome = self.judged(sent=11.7)
        assert outcome.latency == pytest.approx(1.0)
        assert outcome.lag == pytest.approx(0.7)

    @pytest.mark.parametrize(
        ("kind", "fields"),
        [
            ("in time", {}),
            ("in time", {"deadline": 1.5}),
            ("late", {"deadline": 0.5}),
            ("late", {"status": 504}),
            ("refused", {"status": 429}),
            ("left", {"complete": False, "left": True}),
            ("error", {"status": 503}),
            ("error", {"complete": False, "reason": "connection lost"}),
            ("error", {"tail": b"half an image"}),
            ("error", {"failed_parts": 1}),
        ],
    )
    def test_every_end_has_a_name(self, kind: str, fields: dict):
        outcome = self.judged(**fields)
        assert outcome.kind == kind
        assert bool(outcome.error) == (kind == "error")


class TestSummary:
    def test_goodput_is_what_ended_in_time_between_warm_up_and_the_end(self):
        outcomes = [answer(0.0, 0.9), answer(1.0, 1.5), answer(8.0, 1.0), answer(9.5, 1.0), answer(5, 1, "late")]
        summary = summarise(scenario(warm_up=2.0), CAPACITY, run(*outcomes), [])
        assert summary.total.goodput == pytest.approx(2 / 8)
        assert summary.measures["goodput_of_capacity"] == pytest.approx(2 / 8)

    def test_the_warm_up_does_not_count(self):
        summary = summarise(scenario(warm_up=2.0), CAPACITY, run(answer(0.5, 9.0), answer(3.0, 1.0)), [])
        assert summary.total.sent == 1
        assert summary.total.latency_ms[99.9] == pytest.approx(1000)

    def test_refusals_have_percentiles_of_their_own(self):
        outcomes = [answer(1.0, 0.5), answer(2.0, 0.01, "refused")]
        summary = summarise(scenario(), CAPACITY, run(*outcomes), [])
        assert summary.total.refusal_p99_ms == pytest.approx(10)
        assert summary.total.latency_ms[99.0] == pytest.approx(500)

    def test_what_was_spent_on_those_who_left(self):
        outcomes = [answer(1.0), answer(2.0, 0.1, "left"), answer(3.0, 0.1, "left")]
        summary = summarise(scenario(), CAPACITY, run(*outcomes), [sample(0, steps=10), sample(9, steps=17)])
        assert summary.measures["steps_per_left"] == pytest.approx((7 - 4) / 2)

    def test_a_baseline_is_compared_by_its_p99(self):
        summary = summarise(scenario(), CAPACITY, run(answer(1, 1.2)), [], baseline=run(answer(1, 1.0)))
        assert summary.measures["p99_of_baseline"] == pytest.approx(1.2)

    @pytest.mark.parametrize(
        ("threshold", "passed"),
        [
            (Threshold(measure="p50_ms", at_most=500), True),
            (Threshold(measure="p99_ms", of="a", at_most=499), False),
            (Threshold(measure="p99_services", of="a", at_most=0.5), True),
            (Threshold(measure="in_time_of_admitted", at_least=0.5), True),
            (Threshold(measure="errors", at_most=0), False),
            (Threshold(measure="refusal_p99_ms", at_most=20), False),  # there was none, so nothing is proven
        ],
    )
    def test_thresholds(self, threshold: Threshold, passed: bool):
        outcomes = run(answer(1.0), Outcome(2.0, "a", "error", 0.0, 0.1, error="status 500"))
        summary = summarise(scenario(threshold), CAPACITY, outcomes, [])
        assert summary.passed == passed
        assert summary.errors == {"status 500": 1}

    def test_a_measure_that_does_not_exist_is_named(self):
        with pytest.raises(ConfigError, match="no measure beauty"):
            summarise(scenario(Threshold(measure="beauty", at_least=1)), CAPACITY, run(answer(1.0)), [])


def test_a_scrape_sums_over_labels():
    text = '# HELP x\npid_images_total{format="png"} 3.0\npid_images_total{format="webp"} 2.0\npid_queue_images 7.0\n'
    scraped = parse(text, at=1.5)
    assert (scraped.at, scraped.images, scraped.queue_images, scraped.steps) == (1.5, 5, 7, 0)
