"""Themes, small screens, motion and the keyboard."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.clients.playground.actions import open_page, progress, run
from tests.clients.playground.conftest import NewPage

pytestmark = pytest.mark.clients

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "reduced_motion": "reduce"}
TOUCH = 44  # pixels
LUMINANCE = """(element) => {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    context.fillStyle = getComputedStyle(element).backgroundColor;
    context.fillRect(0, 0, 1, 1);
    const [red, green, blue] = context.getImageData(0, 0, 1, 1).data;
    return (red + green + blue) / 3;
}"""
OVERFLOWING = """() => {
    const scrolls = (element) => getComputedStyle(element).overflowX !== "visible";
    const inside = (element) => {
        for (let parent = element.parentElement; parent !== document.body && parent; parent = parent.parentElement) {
            if (scrolls(parent)) return true;
        }
        return false;
    };
    const wide = [...document.body.querySelectorAll("*")].filter(
        (element) => element.getBoundingClientRect().right > innerWidth + 1 && !inside(element),
    );
    return wide.map((element) => element.outerHTML.slice(0, 80));
}"""
TARGETS = "button:visible, select:visible, input:visible, nav a:visible, a.button:visible, label.tile:visible"
FOCUSED = "() => document.activeElement.id || document.activeElement.value || document.activeElement.tagName"


def is_dark(page: Page) -> bool:
    return bool(page.locator("body").evaluate(LUMINANCE) < 128)


def test_the_theme_follows_the_system_until_the_button_chooses_one(page: Page, demo: str):
    open_page(page, demo)
    button = page.locator("#theme")
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        expect(button).to_have_text("Light theme" if scheme == "dark" else "Dark theme")
        assert is_dark(page) == (scheme == "dark")
    button.click()
    assert is_dark(page)
    page.reload()
    assert is_dark(page)
    expect(button).to_have_text("Light theme")
    page.route("**/app.js", lambda route: route.abort())
    page.reload()
    assert is_dark(page)  # before the modules run
    page.unroute("**/app.js")
    page.emulate_media(color_scheme="dark")
    page.reload()
    button.click()
    page.reload()
    assert not is_dark(page)


def assert_fits(page: Page) -> None:
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_a_phone_shows_everything_without_scrolling_sideways(new_page: NewPage, demo: str):
    page = new_page(**PHONE)
    open_page(page, demo)
    expect(page.locator("#overload-facts")).not_to_be_empty()
    assert_fits(page)
    run(page)
    expect(page.locator("#code")).to_be_visible()
    page.locator("#overload details summary").click()
    assert_fits(page)
    page.route(re.compile(r"/decode\?"), lambda route: route.abort())
    page.get_by_role("button", name="Decode").click()
    expect(page.locator("#problem")).to_be_visible()
    assert_fits(page)


def test_a_phone_has_targets_large_enough_for_a_finger(new_page: NewPage, demo: str):
    page = new_page(**PHONE)
    open_page(page, demo)
    run(page)
    small = {}
    for target in page.locator(TARGETS).all():
        box = target.bounding_box()
        assert box is not None
        if box["height"] < TOUCH - 0.5 or box["width"] < TOUCH - 0.5:
            small[target.evaluate("(element) => element.outerHTML.slice(0, 80)")] = box
    assert small == {}


def test_on_a_phone_the_result_is_scrolled_into_view(new_page: NewPage, demo: str):
    page = new_page(**PHONE)
    open_page(page, demo)
    run(page)
    expect(page.get_by_role("img", name="Decoded")).to_be_in_viewport(ratio=0.5)


def test_a_finger_moves_the_divider_and_scrolls_the_page(new_page: NewPage, demo: str):
    page = new_page(**PHONE)
    open_page(page, demo)
    run(page)
    client = page.context.new_cdp_session(page)
    box = page.locator(".stage").bounding_box()
    assert box is not None

    def swipe(x: float, y: float) -> None:
        """Move a finger from the centre of the image by fractions of its size."""
        start = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        client.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [start]})
        for part in range(1, 11):
            point = {
                "x": start["x"] + part / 10 * x * box["width"],
                "y": start["y"] + part / 10 * y * box["height"],
            }
            client.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
        client.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    swipe(-0.3, 0.02)
    assert float(page.locator("#split").input_value()) == pytest.approx(20, abs=3)
    before = page.evaluate("() => scrollY")
    swipe(0, -0.5)
    page.wait_for_function("(before) => scrollY > before", arg=before)
    assert float(page.locator("#split").input_value()) == pytest.approx(20, abs=3)


def test_after_a_pinch_the_other_finger_moves_the_image(new_page: NewPage, demo: str):
    page = new_page(**PHONE)
    open_page(page, demo)
    run(page)
    client = page.context.new_cdp_session(page)
    box = page.locator(".stage").bounding_box()
    assert box is not None

    def touch(kind: str, **fingers: float) -> None:
        """Send an event with fingers at these fractions of the width of the image."""
        points = [
            {"id": ord(name), "x": box["x"] + x * box["width"], "y": box["y"] + box["height"] / 2}
            for name, x in fingers.items()
        ]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.evaluate("() => new Promise(requestAnimationFrame)")  # browsers send moves once per frame

    touch("touchStart", a=0.2)
    touch("touchStart", a=0.2, b=0.4)
    for step in range(1, 6):
        touch("touchMove", a=0.2, b=0.4 + step / 10)
    touch("touchEnd", b=0.9)
    zoomed = page.locator("#after").bounding_box()
    assert zoomed is not None
    assert zoomed["width"] > 2 * box["width"]
    for step in range(1, 6):
        touch("touchMove", a=0.2 - step / 50)
    touch("touchEnd", a=0.1)
    moved = page.locator("#after").bounding_box()
    assert moved is not None
    assert moved["x"] - zoomed["x"] == pytest.approx(-0.1 * box["width"], abs=0.02 * box["width"])
    assert page.locator("#split").input_value() == "50"


@pytest.mark.parametrize("preference", ["reduce", "no-preference"])
def test_nothing_moves_if_the_person_prefers_reduced_motion(page: Page, demo: str, preference: Any):
    page.emulate_media(reduced_motion=preference)
    open_page(page, demo)
    page.evaluate(
        """() => {
            window.motions = [];
            for (const type of ["animationstart", "transitionrun"]) {
                document.addEventListener(type, ({ target }) => motions.push(target.className));
            }
        }"""
    )
    run(page)
    expect(page.get_by_role("img", name="Decoded")).to_be_visible()
    page.wait_for_timeout(200)
    assert (page.evaluate("() => motions") == []) == (preference == "reduce")
    behaviour = page.evaluate("() => getComputedStyle(document.documentElement).scrollBehavior")
    assert behaviour == ("auto" if preference == "reduce" else "smooth")


def tab_to(page: Page, name: str) -> Locator:
    """Press the tabulator until an element has the focus."""
    for _ in range(60):
        if page.evaluate(FOCUSED) == name:
            break
        page.keyboard.press("Tab")
    assert page.evaluate(FOCUSED) == name
    return page.locator("*:focus")


def test_the_keyboard_alone_chooses_a_photo_decodes_and_compares(page: Page, demo: str):
    open_page(page, demo)
    tab_to(page, "cat")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(FOCUSED) == "fig"
    expect(page.get_by_role("radio", name="Fig")).to_be_checked()
    outline = page.locator(".tile", has=page.get_by_role("radio", name="Fig"))
    expect(outline).to_have_css("outline-style", "solid")
    tab_to(page, "file")
    expect(page.locator(".drop")).to_have_css("outline-style", "solid")
    tab_to(page, "4")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("radio", name="3", exact=True)).to_be_checked()
    tab_to(page, "run")
    page.keyboard.press("Enter")
    expect(progress(page)).to_have_text(re.compile("^Decoded in "))
    assert page.evaluate(FOCUSED) == "run"
    tab_to(page, "image-link")
    tab_to(page, "split")
    page.keyboard.press("Home")
    expect(page.locator("#split")).to_have_value("0")
    page.keyboard.press("Tab")
    expect(page.locator(".stage")).to_be_focused()
    page.keyboard.press("+")
    expect(page.locator("#zoom-level")).to_have_text("200 %")
    tab_to(page, "latent-link")
    tab_to(page, "overload-load")
    page.keyboard.press("Home")
    expect(page.locator("#overload-rate")).to_contain_text("0.5 × the capacity")
