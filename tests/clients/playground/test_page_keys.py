"""The page on a server that requires an API key; the fixture `problems` fails if anything is sent to another origin."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import Page, Request, expect

from tests.clients.conftest import KEY
from tests.clients.playground.actions import enter_key, open_page, run

pytestmark = pytest.mark.clients


def test_it_asks_rejects_a_wrong_key_and_decodes_with_the_right_one(page: Page, demo_with_keys: str):
    requests: list[Request] = []
    page.on("request", lambda request: requests.append(request))
    page.goto(demo_with_keys)
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
    rejected = dialog.get_by_text("does not accept")
    expect(rejected).to_be_hidden()
    enter_key(page, "wrong-0123456789abcdef")
    expect(rejected).to_be_visible()
    expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
    expect(dialog.get_by_label("Key", exact=True)).to_have_value("")
    enter_key(page, f" {KEY} ")  # with spaces, as copied keys often are
    expect(dialog).to_be_hidden()
    run(page)
    expect(page.get_by_role("img", name="Decoded")).to_be_visible()
    (sent,) = [request for request in requests if "/decode?" in request.url]
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert all(KEY not in request.url for request in requests)


@pytest.mark.parametrize("character", ["\u200b", "é", "€", " ", '"'])
def test_a_key_with_a_character_that_no_key_has_is_explained_and_not_kept(
    page: Page, demo_with_keys: str, character: str
):
    page.goto(demo_with_keys)
    enter_key(page, f"{KEY[:8]}{character}{KEY[8:]}")
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog.get_by_role("alert")).to_contain_text("contains a character")
    expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0
    enter_key(page, KEY)
    expect(dialog).to_be_hidden()
    run(page)


def test_the_key_is_kept_only_in_the_storage_of_the_tab(page: Page, demo_with_keys: str):
    page.goto(demo_with_keys)
    enter_key(page, KEY)
    expect(page.get_by_role("button", name="Decode")).to_be_enabled()
    assert KEY in json.dumps(page.evaluate("() => Object.entries(sessionStorage)"))
    assert KEY not in json.dumps(page.evaluate("() => [...Object.entries(localStorage), document.cookie]"))
    open_page(page, demo_with_keys)  # the same tab
    expect(page.get_by_role("dialog")).to_be_hidden()
    other = page.context.new_page()
    other.goto(demo_with_keys)
    expect(other.get_by_role("dialog", name="API key")).to_be_visible()


def test_the_page_works_if_the_browser_forbids_storage(page: Page, demo_with_keys: str):
    forbid = "{ get() { throw new DOMException('forbidden', 'SecurityError'); } }"
    for name in ("sessionStorage", "localStorage"):
        page.add_init_script(f"Object.defineProperty(window, '{name}', {forbid})")
    page.goto(demo_with_keys)
    enter_key(page, KEY)
    run(page)
    theme = page.get_by_role("button", name="Dark theme")
    theme.click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_the_dialog_can_be_cancelled_and_opened_again(page: Page, demo_with_keys: str):
    page.goto(demo_with_keys)
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#run-reason")).to_have_text("This server requires an API key.")
    expect(page.get_by_role("button", name="Decode")).to_be_disabled()
    again = page.get_by_role("button", name="Enter API key")
    again.click()
    dialog.get_by_role("button", name="Cancel").click()
    again.click()
    enter_key(page, KEY)
    expect(again).to_be_hidden()
    run(page)


def test_a_key_that_becomes_invalid_is_asked_for_again(page: Page, demo_with_keys: str):
    page.goto(demo_with_keys)
    enter_key(page, KEY)
    expect(page.get_by_role("button", name="Decode")).to_be_enabled()
    page.evaluate("() => sessionStorage.setItem(Object.keys(sessionStorage)[0], 'revoked-0123456789abcdef')")
    page.get_by_role("button", name="Decode").click()
    expect(page.get_by_text("does not accept")).to_be_visible()
    enter_key(page, KEY)
    expect(page.get_by_role("img", name="Decoded")).to_be_visible()


def test_without_a_key_nothing_is_asked(page: Page, demo: str):
    open_page(page, demo)
    run(page)
    expect(page.get_by_role("dialog")).to_be_hidden()
