"""The live figures of the playground."""

from __future__ import annotations

import re

import httpx
import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

pytestmark = pytest.mark.clients

METRICS = "**/metrics"
HIDE = """(state) => {
    Object.defineProperty(document, "visibilityState", { configurable: true, get: () => state });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


def figure(page: Page, title: str, line: str) -> Locator:
    """Return the element with the number of a line."""
    article = page.get_by_role("article").filter(has=page.get_by_role("heading", name=title, exact=True))
    return article.locator("dl > div").filter(has_text=line).locator("dd")


def decode(url: str, **options: object) -> int:
    latent = np.zeros((16, 16, 16), np.float16)
    query = {"shape": "16,16,16", "dtype": "float16", **options}
    return httpx.post(f"{url}/decode", params=query, content=latent.tobytes(), timeout=60).status_code


def count_scrapes(page: Page) -> list[str]:
    """Return a list that grows with each request for the metrics."""
    scrapes: list[str] = []
    page.on("request", lambda request: scrapes.append(request.url) if request.url.endswith("/metrics") else None)
    return scrapes


def test_they_follow_the_load(page: Page, simulated: str):
    page.goto(simulated)
    expect(figure(page, "Goodput", "on time")).to_have_text("0/s")
    expect(figure(page, "Latency", "p50")).to_have_text("–")
    expect(figure(page, "Memory", "used")).to_have_text(re.compile(r"^[\d.]+\s(MB|GB)$"))
    assert decode(simulated) == 200
    expect(figure(page, "Goodput", "on time")).to_have_text(re.compile(r"^0\.\d+/s$"))
    expect(figure(page, "Latency", "p50")).to_have_text(re.compile(r"^\d+\sms$"))
    expect(figure(page, "Images", "waiting")).to_have_text("0")
    expect(figure(page, "Predicted wait", "per device")).to_have_text("0 s")
    expect(figure(page, "Rejections", "status 429")).to_have_text("0/s")


def test_rejections_do_not_count_as_latency(page: Page, simulated: str):
    """A rejection lasts a hundredth of a decode."""
    page.goto(simulated)
    expect(figure(page, "Latency", "p50")).to_have_text("–")
    assert [decode(simulated, deadline_ms=1) for _ in range(3)] == [422] * 3
    scrapes = count_scrapes(page)
    while len(scrapes) < 3:
        page.wait_for_timeout(100)
    expect(figure(page, "Latency", "p50")).to_have_text("–")


def test_a_hidden_page_sends_no_requests(page: Page, simulated: str):
    page.goto(simulated)
    expect(figure(page, "Goodput", "on time")).to_have_text("0/s")
    page.evaluate(HIDE, "hidden")
    page.wait_for_timeout(500)  # a request may be open
    scrapes = count_scrapes(page)
    page.wait_for_timeout(3000)
    assert scrapes == []
    page.evaluate(HIDE, "visible")
    with page.expect_request(METRICS):
        pass


def test_after_errors_the_page_waits_longer_and_recovers(page: Page, simulated: str):
    page.clock.install()
    page.goto(simulated)
    status = page.locator("#figures").get_by_role("status")
    expect(figure(page, "Goodput", "on time")).to_have_text("0/s")
    expect(status).to_be_empty()

    page.route(METRICS, lambda route: route.abort())
    scrapes = count_scrapes(page)
    for _ in range(60):
        page.clock.run_for(1000)
        page.wait_for_timeout(20)  # requests end in real time
    expect(status).to_contain_text("cannot be reached")
    assert 2 <= len(scrapes) <= 12

    page.unroute(METRICS)
    page.clock.run_for(60_000)
    expect(status).to_be_empty()


def test_a_proxy_that_does_not_forward_the_metrics_is_explained(page: Page, simulated: str):
    page.route(METRICS, lambda route: route.fulfill(status=404, content_type="text/html", body="<h1>Not Found</h1>"))
    page.goto(simulated)
    status = page.locator("#figures").get_by_role("status")
    expect(status).to_have_text("/metrics is not available. Not Found")


def test_changing_numbers_are_not_announced(page: Page, simulated: str):
    page.goto(simulated)
    expect(figure(page, "Goodput", "on time")).to_have_text("0/s")
    live = "[aria-live]:not([aria-live=off]), [role=status], [role=alert], [role=log]"
    assert page.locator(f"#figures :is({live}) dd").count() == 0
    assert page.locator("#figures .chart:not([aria-hidden=true])").count() == 0
