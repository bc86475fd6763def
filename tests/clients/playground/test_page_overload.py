"""The overload test of the playground, on a simulated device."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Locator, Page, Route, expect

from loadtest.scrape import read_metrics
from tests.clients.playground.conftest import CAPACITY, Evaluate

pytestmark = pytest.mark.clients

REJECTIONS = 'pid_requests_total{code="429",decoder="simulated",protocol="decode"}'
RUN = """async ({ OpenLoop }, { rate, seconds, connections, milliseconds }) => {
    const send = () => new Promise((resolve) => setTimeout(() => resolve("onTime"), milliseconds));
    const loop = new OpenLoop({ rate, seconds, connections, send });
    await loop.run();
    return { sent: loop.sent, elapsed: loop.elapsed, ...loop.times };
}"""


def cost(stage: str, seconds: float, batch: int = 1, decoder: str = "a") -> dict[str, Any]:
    return {
        "stage": stage,
        "decoder": decoder,
        "size": [64, 64],
        "tile": None,
        "batch": batch,
        "encoding": "",
        "seconds": seconds,
    }


INFO = {
    "costs": [
        {"stage": "caption", "decoder": None, "size": None, "tile": None, "batch": 1, "encoding": "", "seconds": 9},
        *(cost(stage, 0.01, decoder="b") for stage in ("condition", "step", "finish")),
        cost("condition", 0.1),
        cost("step", 0.2),
        cost("finish", 0.1),
        cost("step", 0.3, batch=2),
        cost("step", 0.7, batch=3),
    ]
}


def open_page(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#overload-facts")).not_to_be_empty()


def start_button(page: Page) -> Locator:
    return page.locator("#overload-start")


def choose_load(page: Page, factor: float) -> None:
    page.get_by_role("slider", name="Load").fill(str(factor))


def start(page: Page) -> None:
    start_button(page).click()
    expect(start_button(page)).to_have_text("Stop", timeout=30_000)


def totals(page: Page) -> dict[str, str]:
    """Return the table of totals once the run has ended."""
    expect(start_button(page)).to_have_text("Start", timeout=60_000)
    rows = page.locator("#overload-totals tr")
    return {row.locator("th").inner_text(): row.locator("td").inner_text() for row in rows.all()}


def number(text: str) -> float:
    return float(text.split()[0])


def rejections(url: str) -> float:
    return read_metrics(httpx.get(f"{url}/metrics").text)[REJECTIONS]


def test_goodput_stays_near_the_capacity_at_five_times_the_load(page: Page, simulated: str):
    open_page(page, simulated)
    choose_load(page, 5)
    before = rejections(simulated)
    with page.expect_response(lambda response: response.status == 429) as rejected:
        start(page)
    latent = np.zeros((16, 16, 16), np.float16)
    query = {"shape": "16,16,16", "dtype": "float16"}
    own = httpx.post(f"{simulated}/decode", params=query, content=latent.tobytes(), timeout=60)
    found = totals(page)

    assert int(rejected.value.headers["retry-after"]) >= 1
    # The page measures the capacity, which is lower on a busy machine.
    assert number(found["Share of the capacity"]) >= 60
    assert 3 * CAPACITY * 20 < number(found["Sent"]) <= 5.05 * CAPACITY * 20
    assert number(found["Rejected"]) == rejections(simulated) - before > number(found["On time"])
    assert number(found["Last Retry-After"]) >= 1
    assert number(found["Failed"]) == 0
    assert own.status_code == 200, own.text  # while the load has the priority batch
    expect(page.locator("#overload-status")).to_contain_text("were rejected")


def test_below_the_capacity_nothing_is_rejected(page: Page, simulated: str):
    open_page(page, simulated)
    choose_load(page, 0.5)
    expect(page.locator("#overload-rate")).to_contain_text("0.5 × the capacity")
    start(page)
    expect(page.locator("[data-total=onTime]")).to_have_text(re.compile(r"^1\d$"))
    start_button(page).click()
    found = totals(page)
    assert found["Rejected"] == found["Failed"] == "0"
    assert found["Last Retry-After"] == "–"


def test_stop_ends_the_run(page: Page, simulated: str):
    open_page(page, simulated)
    choose_load(page, 5)
    start(page)
    start_button(page).click()
    assert number(totals(page)["Sent"]) < 5 * CAPACITY * 10


def test_failures_are_counted_with_their_reason(page: Page, simulated: str):
    problem = {"type": "about:blank", "status": 503, "code": "device-lost", "detail": "A device failed."}

    def fail(route: Route) -> None:
        route.fulfill(status=503, content_type="application/problem+json", body=json.dumps(problem))

    open_page(page, simulated)
    page.route(re.compile(r"/decode\?"), fail)
    choose_load(page, 0.5)
    start(page)
    start_button(page).click()
    found = totals(page)
    assert found["On time"] == "0"
    assert found["Failed"] == found["Sent"] != "0"
    expect(page.locator("#overload-status")).to_contain_text("A device failed.")


def test_a_server_that_cannot_be_reached_is_reported(page: Page, simulated: str):
    open_page(page, simulated)
    page.route("**/info", lambda route: route.abort())
    start_button(page).click()
    expect(page.locator("#overload-status")).to_contain_text("cannot be reached")
    expect(start_button(page)).to_be_enabled()
    page.unroute("**/info")
    start(page)
    start_button(page).click()
    assert number(totals(page)["Sent"]) > 0


def test_the_rate_follows_from_the_capacity(page: Page, simulated: str):
    page.route("**/metrics", lambda route: route.fulfill(status=404))  # as behind many proxies
    open_page(page, simulated)
    facts, rate = page.locator("#overload-facts"), page.locator("#overload-rate")
    capacity = float(re.findall(r"^Capacity: ([\d.]+)\simages/s on 1 device", facts.inner_text())[0])
    assert 0 < capacity <= CAPACITY  # the server measures its costs, which a busy machine increases
    choose_load(page, 4)
    expect(rate).to_have_text(re.compile(r"^4 × the capacity: [\d.]+/s$"))
    assert float(rate.inner_text().split(": ")[1][:-2]) == pytest.approx(4 * capacity, abs=0.8)  # both are rounded


def test_the_capacity_is_that_of_the_best_batch_size(in_module: Evaluate):
    capacity = "({ capacity }, info) => capacity(info, { decoder: 'a', size: [64, 64] })"
    assert in_module("capacity.js", capacity, INFO | {"devices": 1}) == pytest.approx(2 / (2 * 0.2 + 4 * 0.3))
    assert in_module("capacity.js", capacity, INFO | {"devices": 3}) == pytest.approx(6 / (2 * 0.2 + 4 * 0.3))
    decode = "({ decodeSeconds }, info) => decodeSeconds(info, { decoder: 'a', size: [64, 64] })"
    assert in_module("capacity.js", decode, INFO) == pytest.approx(0.2 + 4 * 0.2)


def test_requests_are_due_at_a_fixed_rate(in_module: Evaluate):
    run = in_module("load.js", RUN, {"rate": 20, "seconds": 1, "connections": 20, "milliseconds": 300})
    assert run["offered"] == pytest.approx([index / 20 for index in range(20)])
    assert run["sent"] == len(run["onTime"]) == 20
    assert run["elapsed"] >= 0.95 + 0.3  # the last one is awaited


def test_requests_without_a_free_connection_are_counted_as_not_sent(in_module: Evaluate):
    run = in_module("load.js", RUN, {"rate": 20, "seconds": 1, "connections": 2, "milliseconds": 2000})
    assert run["sent"] == len(run["onTime"]) == 2
    assert len(run["unsent"]) == 18
    assert len(run["offered"]) == 20
