"""axe-core finds no serious fault in the states of the page, in both themes, on a wide screen and on a phone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, Route, expect

from tests.clients.playground.actions import open_page, run
from tests.clients.playground.conftest import NewPage
from tests.programs import NODE_SCRIPTS

pytestmark = pytest.mark.clients

AXE = NODE_SCRIPTS.parent / "axe-core/axe.min.js"
RUN = """async () => {
    const { violations } = await axe.run({ resultTypes: ["violations"] });
    return violations.map(({ id, impact, nodes }) => [impact, id, nodes.map(({ target }) => target.join(" "))]);
}"""
SCREENS = {
    "wide": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}

Check = Callable[[], None]


@pytest.fixture(params=["light", "dark"])
def theme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=SCREENS)
def visitor(request: pytest.FixtureRequest, new_page: NewPage, theme: str) -> Page:
    """An empty page."""
    return new_page(color_scheme=theme, reduced_motion="reduce", **SCREENS[request.param])


@pytest.fixture
def check(visitor: Page) -> Check:
    """Return a function that asserts that the page is accessible now."""

    def assert_accessible() -> None:
        visitor.evaluate(AXE.read_text())
        assert visitor.evaluate(RUN) == []

    return assert_accessible


def test_before_and_after_a_decode(visitor: Page, demo: str, check: Check):
    open_page(visitor, demo)
    expect(visitor.locator("#overload-facts")).not_to_be_empty()
    check()
    run(visitor)
    expect(visitor.locator("#timing")).to_be_visible()
    visitor.locator("#overload details summary").click()
    check()


def test_with_a_choice_of_decoders(visitor: Page, several: str, check: Check):
    open_page(visitor, several)
    expect(visitor.locator("#decoder")).to_be_visible()
    check()


def test_during_a_decode_and_with_an_error(visitor: Page, demo: str, check: Check):
    problem = {"status": 429, "code": "queue-full", "detail": "The queue is full.", "request_id": "r-17"}
    waiting: list[Route] = []
    open_page(visitor, demo)
    visitor.route(re.compile(r"/decode\?"), lambda route: waiting.append(route))
    visitor.get_by_role("button", name="Decode").click()
    expect(visitor.get_by_role("button", name="Cancel")).to_be_visible()
    check()
    (request,) = waiting
    request.fulfill(
        status=429,
        headers={"Retry-After": "60"},
        content_type="application/problem+json",
        body=json.dumps(problem),
    )
    expect(visitor.locator("#retry")).to_be_disabled()
    check()
    visitor.locator("#file").set_input_files({"name": "x.txt", "mimeType": "text/plain", "buffer": b"text"})
    expect(visitor.locator("#file-message")).not_to_be_empty()
    check()


def test_while_the_server_is_starting(visitor: Page, demo: str, check: Check):
    body = json.dumps({"state": "starting", "reason": None})
    visitor.route(
        "**/health/ready", lambda route: route.fulfill(status=503, content_type="application/json", body=body)
    )
    visitor.goto(demo)
    expect(visitor.locator("#run-reason")).to_have_text("The server is starting")
    check()


def test_while_it_asks_for_a_key(visitor: Page, demo_with_keys: str, check: Check):
    visitor.goto(demo_with_keys)
    expect(visitor.get_by_role("dialog")).to_be_visible()
    check()
    visitor.keyboard.press("Escape")
    expect(visitor.locator("#enter-key")).to_be_visible()
    check()


def test_during_an_overload(visitor: Page, simulated: str, check: Check):
    open_page(visitor, simulated)
    button = visitor.locator("#overload-start")
    button.click()
    expect(button).to_have_text("Stop")
    expect(visitor.locator("#overload-results")).to_be_visible()
    check()
    button.click()
    expect(button).to_have_text("Start")
    check()
