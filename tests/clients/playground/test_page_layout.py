"""Themes, small screens, motion and the keyboard."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.clients.playground.actions import box, open_page, progress, run
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


class Fingers:
    """Fingers on the image of a page, at fractions of its width and height when this object is created."""

    def __init__(self, page: Page) -> None:
        self._page, self._client = page, page.context.new_cdp_session(page)
        self._left, self._top, self.width, self.height = box(page.locator(".stage"))

    def send(self, event: str, *fingers: tuple[int, float, float]) -> None:
        """Send an event with the number of each finger that it concerns, and its place."""
        points = [
            {"id": number, "x": self._left + x * self.width, "y": self._top + y * self.height}
            for number, x, y in fingers
        ]
        self._client.send("Input.dispatchTouchEvent", {"type": event, "touchPoints": points})
        self._page.evaluate("() => new Promise(requestAnimationFrame)")  # browsers send moves once per frame


@pytest.fixture
def phone(new_page: NewPage, demo: str) -> Page:
    """The page on a phone, with a decoded image."""
    page = new_page(**PHONE)
    open_page(page, demo)
    run(page)
    return page


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


def test_a_phone_has_targets_large_enough_for_a_finger(phone: Page):
    small = {}
    for target in phone.locator(TARGETS).all():
        _, _, width, height = box(target)
        if min(width, height) < TOUCH - 0.5:
            small[target.evaluate("(element) => element.outerHTML.slice(0, 80)")] = width, height
    assert small == {}


def test_on_a_phone_the_result_is_scrolled_into_view(phone: Page):
    expect(phone.get_by_role("img", name="Decoded")).to_be_in_viewport(ratio=0.5)


def test_a_finger_moves_the_divider_and_scrolls_the_page(phone: Page):
    fingers = Fingers(phone)

    def swipe(x: float, y: float) -> None:
        """Move a finger from the centre of the image by fractions of its size."""
        fingers.send("touchStart", (0, 0.5, 0.5))
        for part in range(1, 11):
            fingers.send("touchMove", (0, 0.5 + part / 10 * x, 0.5 + part / 10 * y))
        fingers.send("touchEnd")

    swipe(-0.3, 0.02)
    assert float(phone.locator("#split").input_value()) == pytest.approx(20, abs=3)
    before = phone.evaluate("() => scrollY")
    swipe(0, -0.5)
    phone.wait_for_function("(before) => scrollY > before", arg=before)
    assert float(phone.locator("#split").input_value()) == pytest.approx(20, abs=3)


def test_after_a_pinch_the_other_finger_moves_the_image(phone: Page):
    fingers, image = Fingers(phone), phone.locator("#after")
    fingers.send("touchStart", (0, 0.2, 0.5))
    fingers.send("touchStart", (0, 0.2, 0.5), (1, 0.4, 0.5))
    for part in range(1, 6):
        fingers.send("touchMove", (0, 0.2, 0.5), (1, 0.4 + part / 10, 0.5))
    fingers.send("touchEnd", (1, 0.9, 0.5))
    zoomed, _, width, _ = box(image)
    assert width > 2 * fingers.width
    for part in range(1, 6):
        fingers.send("touchMove", (0, 0.2 - part / 50, 0.5))
    fingers.send("touchEnd", (0, 0.1, 0.5))
    assert box(image)[0] - zoomed == pytest.approx(-0.1 * fingers.width, abs=0.02 * fingers.width)
    assert phone.locator("#split").input_value() == "50"


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
