"""Percentiles, counts and thresholds of constructed outcomes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from loadtest.generator import Run
from loadtest.http_client import HttpExchange
from loadtest.outcome import PNG_END, Outcome, OutcomeKind, classify
from loadtest.scenario import Arrivals, RequestClass, Scenario, Threshold
from loadtest.schedule import Arrival, Capacity, Schedule
from loadtest.scrape import Sample, parse
from loadtest.summary import percentile, summarise
from server.scheduling.costs import Output

SIZE = Size(64, 64)
OUTPUT = Output("simulated", SIZE)
CAPACITY = Capacity({OUTPUT: SimulatedCost(step=0.25)})  # one decode per second
KIND = RequestClass(name="a", size=SIZE)
IN_TIME, LATE, REJECTED, DISCONNECTED, ERROR = OutcomeKind


def scenario(*thresholds: Threshold, **fields: object) -> Scenario:
    defaults: dict = {"duration": 10.0, "warm_up": 0.0, "arrivals": Arrivals(rate=1), "mix": (KIND,)}
    return Scenario(title="test", thresholds=thresholds, **{**defaults, **fields})


def run(*outcomes: Outcome) -> Run:
    return Run(Schedule((), 10.0), list(outcomes), wall_seconds=10.0, cpu_seconds=1.0)


def outcome(at: float, latency: float = 0.5, kind: OutcomeKind = IN_TIME) -> Outcome:
    return Outcome(at, "a", kind, lag=0.0, latency=latency, status=200)


def sample(at: float, **fields: float) -> Sample:
    return Sample(at, **{**dict.fromkeys(list(Sample.__dataclass_fields__)[1:], 0.0), **fields})


class TestPercentile:
    def test_a_percentile_is_the_nearest_rank(self):
        values = [float(i) for i in range(1, 101)]
        assert [percentile(values, q) for q in (50, 90, 99, 99.9, 100)] == [50, 90, 99, 100, 100]

    @pytest.mark.parametrize("count", [1, 2, 7, 100, 999])
    @pytest.mark.parametrize("q", [50.0, 90.0, 99.0, 99.9])
    def test_percentiles_agree_with_numpys_inverted_cdf(self, count: int, q: float):
        values = np.random.default_rng(count).random(count)
        assert percentile(list(values), q) == np.percentile(values, q, method="inverted_cdf")

    def test_a_percentile_without_values_is_nan(self):
        assert math.isnan(percentile([], 50))


class TestClassify:
    ARRIVAL = Arrival(1.0, KIND)

    def classified(self, deadline: float | None = None, **fields: object) -> Outcome:
        complete = {"status": 200, "sent": 11.0, "done": 12.0, "complete": True, "tail": PNG_END}
        return classify(self.ARRIVAL, HttpExchange(**{**complete, **fields}), 10.0, deadline)  # type: ignore[arg-type]

    def test_latency_counts_from_the_intended_send_time_even_if_the_request_was_sent_late(self):
        outcome = self.classified(sent=11.7)
        assert outcome.latency == pytest.approx(1.0)
        assert outcome.lag == pytest.approx(0.7)

    @pytest.mark.parametrize(
        ("kind", "fields"),
        [
            (IN_TIME, {}),
            (IN_TIME, {"deadline": 1.5}),
            (LATE, {"deadline": 0.5}),
            (LATE, {"status": 504}),
            (REJECTED, {"status": 429}),
            (DISCONNECTED, {"complete": False, "disconnected": True}),
            (ERROR, {"status": 503}),
            (ERROR, {"complete": False, "reason": "connection lost"}),
            (ERROR, {"tail": b"half an image"}),
            (ERROR, {"failed_parts": 1}),
            (LATE, {"deadline": 0.5, "complete": False}),  # cancelled at its deadline, during the response
            (ERROR, {"deadline": 1.5, "complete": False}),
            (ERROR, {"deadline": 0.5, "complete": False, "status": 0}),
        ],
    )
    def test_every_exchange_has_an_outcome(self, kind: OutcomeKind, fields: dict):
        outcome = self.classified(**fields)
        assert outcome.kind is kind
        assert bool(outcome.error) == (kind is ERROR)

    def test_a_response_that_was_cancelled_at_its_deadline_has_no_image(self):
        assert self.classified(deadline=0.5).has_image
        assert not self.classified(deadline=0.5, complete=False).has_image

    @pytest.mark.parametrize(("image_format", "tail"), [("png", PNG_END), ("jpeg", b"..\xff\xd9"), ("webp", b"..")])
    def test_the_end_of_an_image_depends_on_its_format(self, image_format: str, tail: bytes):
        arrival = Arrival(1.0, KIND.model_copy(update={"format": image_format}))
        exchange = HttpExchange(status=200, sent=11.0, done=12.0, complete=True, tail=tail)
        assert classify(arrival, exchange, 10.0, None).kind is IN_TIME
        truncated = classify(arrival, HttpExchange(status=200, done=12.0, complete=True, tail=b"half"), 10.0, None)
        assert truncated.kind is (IN_TIME if image_format == "webp" else ERROR)

    @pytest.mark.parametrize(
        ("kind", "fields"),
        [
            (DISCONNECTED, {"complete": False}),
            (IN_TIME, {}),  # nobody disconnected it
            (REJECTED, {"status": 429}),
            (ERROR, {"complete": False, "done": None}),  # no response within the time limit
        ],
    )
    def test_a_client_that_does_not_read_is_disconnected_by_the_server(self, kind: OutcomeKind, fields: dict):
        complete = {"status": 200, "sent": 11.0, "done": 42.0, "complete": True, "tail": PNG_END}
        arrival = Arrival(1.0, KIND.model_copy(update={"read_after": 30.0}))
        assert classify(arrival, HttpExchange(**{**complete, **fields}), 10.0, None).kind is kind


class TestSummary:
    def test_goodput_counts_responses_in_time_between_warm_up_and_end(self):
        outcomes = [outcome(0.0, 0.9), outcome(1.0, 1.5), outcome(8.0, 1.0), outcome(9.5, 1.0), outcome(5, 1, LATE)]
        summary = summarise(scenario(warm_up=2.0), CAPACITY, run(*outcomes), [])
        assert summary.total.goodput == pytest.approx(2 / 8)
        assert summary.measures["goodput_of_capacity"] == pytest.approx(2 / 8)

    def test_the_warm_up_does_not_count(self):
        summary = summarise(scenario(warm_up=2.0), CAPACITY, run(outcome(0.5, 9.0), outcome(3.0, 1.0)), [])
        assert summary.total.sent == 1
        assert summary.total.latency_ms[99.9] == pytest.approx(1000)

    def test_rejections_have_a_separate_percentile(self):
        outcomes = [outcome(1.0, 0.5), outcome(2.0, 0.01, REJECTED)]
        summary = summarise(scenario(), CAPACITY, run(*outcomes), [])
        assert summary.total.rejection_p99_ms == pytest.approx(10)
        assert summary.total.latency_ms[99.0] == pytest.approx(500)

    def test_wasted_steps_are_divided_by_the_number_of_disconnects(self):
        outcomes = [outcome(1.0), outcome(2.0, 0.1, DISCONNECTED), outcome(3.0, 0.1, DISCONNECTED)]
        summary = summarise(scenario(), CAPACITY, run(*outcomes), [sample(0, steps=10), sample(9, steps=17)])
        assert summary.measures["steps_per_left"] == pytest.approx((7 - 4) / 2)

    def test_the_p99_is_divided_by_that_of_the_baseline(self):
        summary = summarise(scenario(), CAPACITY, run(outcome(1, 1.2)), [], baseline=run(outcome(1, 1.0)))
        assert summary.measures["p99_of_baseline"] == pytest.approx(1.2)

    def test_a_threshold_may_be_for_the_requests_sent_after_a_time(self):
        outcomes = run(outcome(1.0, 3.0, LATE), outcome(4.0, 3.0, LATE), outcome(6.0), outcome(8.0))
        thresholds = [Threshold(measure="in_time_of_sent", since=since, at_least=0.9) for since in (None, 4, 5)]
        checks = summarise(scenario(*thresholds), CAPACITY, outcomes, []).checks
        assert [check.value for check in checks] == pytest.approx([0.5, 2 / 3, 1.0])
        assert "since 5 s" in str(checks[2].threshold)

    def test_a_measure_of_the_whole_run_has_no_other_beginning(self):
        with pytest.raises(ConfigError, match="Unknown measure answered"):
            summarise(scenario(Threshold(measure="answered", since=5, at_least=1)), CAPACITY, run(outcome(1.0)), [])

    def test_the_overrun_is_the_longest_time_by_which_an_image_was_late(self):
        kind = KIND.model_copy(update={"deadline_ms": 2000.0})
        expired = Outcome(4.0, "a", LATE, lag=0.0, latency=9.0, status=504, expired=True)
        outcomes = run(outcome(1.0, 0.5), outcome(2.0, 2.25, LATE), outcome(3.0, 2.125, LATE), expired)
        assert summarise(scenario(mix=(kind,)), CAPACITY, outcomes, []).total.overrun_max_ms == pytest.approx(250)
        assert math.isnan(summarise(scenario(), CAPACITY, outcomes, []).total.overrun_max_ms)

    def test_the_share_of_disconnected_requests_is_relative_to_the_accepted_ones(self):
        outcomes = run(
            outcome(1, kind=DISCONNECTED), outcome(2, kind=DISCONNECTED), outcome(3), outcome(4, 1, REJECTED)
        )
        threshold = Threshold(measure="disconnected_of_admitted", at_least=1)
        (check,) = summarise(scenario(threshold), CAPACITY, outcomes, []).checks
        assert check.value == pytest.approx(2 / 3)

    @pytest.mark.parametrize(
        ("threshold", "passed"),
        [
            (Threshold(measure="p50_ms", at_most=500), True),
            (Threshold(measure="p99_ms", of="a", at_most=499), False),
            (Threshold(measure="p99_services", of="a", at_most=0.5), True),
            (Threshold(measure="in_time_of_admitted", at_least=0.5), True),
            (Threshold(measure="errors", at_most=0), False),
            (Threshold(measure="refusal_p99_ms", at_most=20), False),  # no request was rejected, so the measure is NaN
        ],
    )
    def test_thresholds_are_checked(self, threshold: Threshold, passed: bool):
        outcomes = run(outcome(1.0), Outcome(2.0, "a", ERROR, 0.0, 0.1, error="status 500"))
        summary = summarise(scenario(threshold), CAPACITY, outcomes, [])
        assert summary.passed == passed
        assert summary.errors == {"status 500": 1}

    def test_an_unknown_measure_is_named(self):
        with pytest.raises(ConfigError, match="Unknown measure beauty"):
            summarise(scenario(Threshold(measure="beauty", at_least=1)), CAPACITY, run(outcome(1.0)), [])


def test_a_metric_is_summed_over_its_labels():
    text = '# HELP x\npid_images_total{format="png"} 3.0\npid_images_total{format="webp"} 2.0\npid_queue_images 7.0\n'
    scraped = parse(text, at=1.5)
    assert (scraped.at, scraped.images, scraped.queue_images, scraped.steps) == (1.5, 5, 7, 0)


def test_prompts_are_cached_unless_they_needed_the_text_encoder():
    text = 'pid_prompts_total{{source="memory"}} {}\npid_prompts_total{{source="encoder"}} {}\n'
    samples = [parse(text.format(*counts), at) for at, counts in enumerate([(10, 5), (12, 8), (16, 10)])]
    assert (samples[2].prompts, samples[2].encoded_prompts) == (26, 10)
    assert summarise(scenario(), CAPACITY, run(outcome(1.0)), samples).measures["cached_prompts"] == pytest.approx(
        6 / 11
    )
    assert math.isnan(summarise(scenario(), CAPACITY, run(outcome(1.0)), samples[:1]).measures["cached_prompts"])
