"""prometheus.js, which reads the text format of Prometheus."""

from __future__ import annotations

import math

import httpx
import pytest
from playwright.sync_api import Error
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.clients.playground.conftest import Evaluate

pytestmark = pytest.mark.clients

SUMS = """({ Scrape }, text) => {
    const scrape = new Scrape(text, 0);
    return [...scrape.samples.keys()].map((name) => [name, scrape.select(name).length, scrape.sum(name)]);
}"""
QUANTILE = """({ Scrape, quantile }, [before, after, q]) =>
    quantile(q, new Scrape(before, 0), new Scrape(after, 1), "latency")"""
RATE = """({ Scrape, rate }, [before, after]) =>
    rate(new Scrape(before, 10), new Scrape(after, 12), "events_total", { code: "429" })"""


def test_the_metrics_of_a_server_have_the_same_sums_as_in_the_official_parser(in_module: Evaluate, simulated: str):
    text = httpx.get(f"{simulated}/metrics").text
    values: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name, []).append(sample.value)
    found = {name: (count, total) for name, count, total in in_module("prometheus.js", SUMS, text)}
    assert found == {name: (len(each), pytest.approx(sum(each))) for name, each in values.items()}


@pytest.mark.parametrize("value", ["plain", 'a "quote"', "back\\slash", "two\nlines", "\\n", "x} 1, y={", "", "ü"])
def test_labels_keep_their_values(in_module: Evaluate, value: str):
    registry = CollectorRegistry()
    Gauge("g", "text", ("first", "second"), registry=registry).labels(value, "2").set(1)
    labels = in_module(
        "prometheus.js",
        "({ Scrape }, text) => new Scrape(text, 0).select('g').map(({ labels }) => labels)",
        generate_latest(registry).decode(),
    )
    assert labels == [{"first": value, "second": "2"}]


@pytest.mark.parametrize("value", [0.0, -1.5, 1e-9, 2.5e20, math.inf, -math.inf, math.nan])
def test_special_values_are_read(in_module: Evaluate, value: float):
    registry = CollectorRegistry()
    Gauge("g", "text", registry=registry).set(value)
    text = generate_latest(registry).decode()
    found = in_module("prometheus.js", "({ Scrape }, text) => new Scrape(text, 0).select('g')[0].value", text)
    assert found == pytest.approx(value, nan_ok=True)


def test_spaces_time_stamps_and_final_commas_are_accepted(in_module: Evaluate):
    text = '# TYPE g gauge\n\ng { a="1", b = "2", } 3 1700000000000\ng{}\t4\n'
    found = in_module("prometheus.js", "({ Scrape }, text) => new Scrape(text, 0).samples.get('g')", text)
    assert found == [{"labels": {"a": "1", "b": "2"}, "value": 3}, {"labels": {}, "value": 4}]


@pytest.mark.parametrize("text", ["<html>", "g{a=1} 2", 'g{a="1"', "g one", "g"])
def test_other_text_is_an_error(in_module: Evaluate, text: str):
    with pytest.raises(Error, match="SyntaxError"):
        in_module("prometheus.js", SUMS, text)


def histogram(*observations: float) -> str:
    registry = CollectorRegistry()
    metric = Histogram("latency", "text", buckets=(1, 2, 4), registry=registry)
    for value in observations:
        metric.observe(value)
    return generate_latest(registry).decode()


@pytest.mark.parametrize(
    ("q", "before", "after", "expected"),
    [
        (0.5, (), (0.5, 0.5, 1.5, 1.5), 1.0),  # the upper bound of the first bucket
        (0.75, (), (0.5, 0.5, 1.5, 1.5), 1.5),  # half of the second bucket
        (0.5, (), (3.0,), 3.0),  # half of a bucket with empty ones below it
        (0.5, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 3.0), 3.0),  # earlier observations do not count
        (0.99, (), (9.0,), 4.0),  # above all bounds
        (0.5, (0.5, 0.5), (0.5, 0.5), math.nan),  # no observations
        (0.5, (0.5, 0.5), (3.0,), 3.0),  # the server was restarted
    ],
)
def test_quantiles_are_those_of_prometheus(
    in_module: Evaluate, q: float, before: tuple[float, ...], after: tuple[float, ...], expected: float
):
    found = in_module("prometheus.js", QUANTILE, [histogram(*before), histogram(*after), q])
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("first", "last", "expected"), [(5, 9, 2), (5, 5, 0), (5, 4, 2)])
def test_a_rate_is_per_second_and_counts_from_zero_after_a_restart(
    in_module: Evaluate, first: int, last: int, expected: float
):
    texts = [f'events_total{{code="429"}} {count}\nevents_total{{code="200"}} 50\n' for count in (first, last)]
    assert in_module("prometheus.js", RATE, texts) == expected
