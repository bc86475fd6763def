"""The result of a decode: previews, the divider between latent and image, zoom, and the bar of the stages."""

from __future__ import annotations

import io
import json
import re
from base64 import b64encode

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, Route, expect

from tests.clients.latents import pixels
from tests.clients.playground.actions import box, open_page, progress, record_texts, recorded_texts, run

pytestmark = pytest.mark.clients

GRIP = 40  # pixels on each side of the divider that its handle covers
STAGES = {"queue": 1.5, "condition": 10, "denoise": 80, "finish": 0.5, "encode": 8}


def steps(page: Page) -> list[list[str]]:
    """Return name and latency of each step and of the image."""
    return [item.inner_text().split("\n") for item in page.get_by_role("list", name="Steps").locator("li").all()]


def event(name: str, colour: str, **members: object) -> str:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(data, "JPEG")
    members |= {"index": 0, "media_type": "image/jpeg", "data": b64encode(data.getvalue()).decode()}
    return f"event: {name}\ndata: {json.dumps(members)}\n\n"


def test_previews_appear_in_order_before_the_image(page: Page, simulated: str):
    open_page(page, simulated)
    record_texts(progress(page))
    run(page)
    texts = recorded_texts(page)
    shown = [int(text[5]) for text in texts if text.startswith("Step ")]
    assert shown  # a slow browser loses some
    assert shown == sorted(set(shown))
    assert texts[0] == "Decoding"
    assert texts[-1].startswith("Decoded in ")
    assert [name for name, _ in steps(page)] == [f"Step {step}" for step in shown] + ["Image"]


def test_each_preview_is_shown_with_its_latency_and_can_be_selected(page: Page, simulated: str):
    events = [
        event("preview", colour, step=step, steps=4, latency_ms=100.0 * step, width=64, height=64)
        for step, colour in enumerate(["red", "green", "blue", "white"], start=1)
    ]
    timing = ", ".join(f"{name};dur={milliseconds}" for name, milliseconds in STAGES.items())
    events.append(event("image", "black", seed=7, latency_ms=420.0, server_timing=timing))

    def respond(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body="".join(events))

    page.route(re.compile(r"/decode\?"), respond)
    open_page(page, simulated)
    run(page)
    expect(page.get_by_role("list", name="Steps").get_by_role("button")).to_have_count(5)
    assert [name for name, _ in steps(page)] == ["Step 1", "Step 2", "Step 3", "Step 4", "Image"]
    assert all(re.fullmatch(r"[\d.]+ m?s", latency) for _, latency in steps(page))
    page.get_by_role("slider", name="Divider").fill("0")
    image = page.get_by_role("button", name="Image")
    expect(image).to_have_attribute("aria-pressed", "true")
    for name, colour in (("Step 1", (254, 0, 0)), ("Step 3", (0, 0, 254)), ("Image", (0, 0, 0))):
        button = page.get_by_role("button", name=name)
        button.click()
        expect(button).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#after-name")).to_have_text({"Image": "Decoded"}.get(name, f"{name} of 4"))
        page.locator("#after").evaluate("(image) => image.decode()")
        height, width, _ = picture(page).shape
        assert picture(page)[height // 4, width // 2].tolist() == list(colour)


@pytest.fixture
def decoded(page: Page, demo: str) -> Page:
    """The page with a decoded photo."""
    page.emulate_media(reduced_motion="reduce")
    page.set_viewport_size({"width": 1000, "height": 900})
    open_page(page, demo)
    run(page)
    expect(page.get_by_role("img", name="Decoded")).to_be_visible()
    return page


def stage(page: Page) -> Locator:
    return page.get_by_role("group", name="Image")


def picture(page: Page) -> np.ndarray:
    """Return what the comparison looks like, [H, W, 3]."""
    return pixels(stage(page).screenshot()).astype(int)


def assert_split(page: Page, share: float, latent: np.ndarray, image: np.ndarray) -> None:
    """Assert that the latent is shown on the left side of a divider and the image on the right."""
    shown = picture(page)
    split, middle = round(share * shown.shape[1]), slice(60, -60)  # below the names
    for columns, expected in ((slice(0, split - GRIP), latent), (slice(split + GRIP, None), image)):
        assert np.abs(shown[middle, columns] - expected[middle, columns]).max(initial=0) <= 8


def test_the_divider_moves_with_the_keyboard_and_with_the_pointer(decoded: Page):
    divider = decoded.get_by_role("slider", name="Divider between the latent and the decoded image")
    assert divider.input_value() == "50"
    divider.fill("100")
    latent = picture(decoded)
    divider.fill("0")
    image = picture(decoded)
    assert np.abs(latent - image).max() > 50
    divider.fill("50")
    assert_split(decoded, 0.5, latent, image)

    divider.focus()
    for _ in range(10):
        decoded.keyboard.press("ArrowRight")
    assert divider.input_value() == "60"
    assert_split(decoded, 0.6, latent, image)

    left, top, width, height = box(stage(decoded))
    decoded.mouse.move(left + 0.6 * width, top + height / 2)
    decoded.mouse.down()
    decoded.mouse.move(left + 0.25 * width, top + height / 3, steps=5)
    decoded.mouse.up()
    decoded.mouse.move(left, top)  # without a pressed button
    assert float(divider.input_value()) == pytest.approx(25, abs=1)
    assert_split(decoded, 0.25, latent, image)


def test_the_divider_follows_the_keyboard_at_once(page: Page, demo: str):
    """Only the first image of a decode is revealed with a transition."""
    open_page(page, demo)
    run(page)
    divider = page.get_by_role("slider", name="Divider")
    for key, share in (("Home", 0), ("End", 1)):
        divider.press(key)
        line = box(page.locator(".divider"))
        left, _, width, _ = box(stage(page))
        assert line[0] + line[2] / 2 == pytest.approx(left + share * width, abs=1)


def test_the_divider_stays_inside_the_image(decoded: Page):
    left, top, width, height = box(stage(decoded))
    decoded.mouse.move(left + width / 2, top + height / 2)
    decoded.mouse.down()
    decoded.mouse.move(left + 2 * width, top + height / 2)
    assert decoded.locator("#split").input_value() == "100"
    decoded.mouse.move(0, top)
    assert decoded.locator("#split").input_value() == "0"
    decoded.mouse.up()


def test_a_click_leaves_the_divider_where_it_is(decoded: Page):
    """A double-click zooms."""
    left, top, width, height = box(stage(decoded))
    decoded.mouse.move(left + 0.2 * width, top + height / 2)
    decoded.mouse.down()
    decoded.mouse.move(left + 0.2 * width + 2, top + height / 2)  # a hand is not still
    decoded.mouse.up()
    decoded.mouse.dblclick(left + 0.8 * width, top + height / 2)
    expect(decoded.locator("#zoom-level")).to_have_text("200 %")
    assert decoded.locator("#split").input_value() == "50"


def test_buttons_and_keys_zoom(decoded: Page):
    view, shown = stage(decoded), decoded.locator("#after")
    _, _, width, _ = box(view)
    for action, factor in (
        (lambda: decoded.get_by_role("button", name="Zoom in").click(), 2),
        (lambda: view.press("+"), 4),
        (lambda: view.press("+"), 8),
        (lambda: view.press("+"), 8),  # the largest
        (lambda: decoded.get_by_role("button", name="Zoom out").click(), 4),
        (lambda: view.press("-"), 2),
        (lambda: view.press("0"), 1),
        (lambda: view.press("-"), 1),
    ):
        action()
        assert box(shown)[2] == pytest.approx(factor * width, rel=0.01)
        expect(decoded.locator("#zoom-level")).to_have_text(f"{100 * factor} %")
    view.press("+")
    decoded.locator("#zoom-reset").click()
    assert box(shown)[2] == pytest.approx(width, rel=0.01)


def test_keys_that_the_browser_uses_are_left_to_it(decoded: Page):
    decoded.evaluate("() => addEventListener('keydown', (event) => (window.taken = event.defaultPrevented))")
    view = stage(decoded)
    for key, taken in (("+", True), ("Control++", False), ("Alt+ArrowUp", False), ("ArrowDown", True), ("0", True)):
        view.press(key)
        assert decoded.evaluate("taken") is taken, key
    view.press("ArrowDown")  # scrolls the page, as the image is not zoomed
    assert decoded.evaluate("taken") is False
    expect(decoded.locator("#zoom-level")).to_have_text("100 %")


def test_the_code_is_hidden_when_a_setting_changes(decoded: Page):
    code = decoded.get_by_role("heading", name="The same request")
    expect(code).to_be_visible()
    decoded.get_by_role("button", name="Random", exact=True).click()
    expect(code).to_be_hidden()
    run(decoded)
    expect(code).to_be_visible()


@pytest.mark.parametrize("gesture", ["double click", "ctrl and wheel"])
def test_zoom_keeps_the_pixel_under_the_pointer(decoded: Page, gesture: str):
    left, top, width, height = box(stage(decoded))
    x, y = left + 0.2 * width, top + 0.7 * height
    if gesture == "double click":
        decoded.mouse.dblclick(x, y)
    else:
        decoded.mouse.move(x, y)
        decoded.keyboard.down("Control")
        decoded.mouse.wheel(0, -300)
        decoded.keyboard.up("Control")
    expect(decoded.locator("#zoom-level")).not_to_have_text("100 %")
    shown_left, shown_top, shown_width, shown_height = box(decoded.locator("#after"))
    assert shown_width > 1.5 * width
    assert (x - shown_left) / shown_width == pytest.approx(0.2, abs=0.01)
    assert (y - shown_top) / shown_height == pytest.approx(0.7, abs=0.01)
    assert box(decoded.locator("#before")) == box(decoded.locator("#after"))


def test_the_wheel_alone_scrolls_the_page(decoded: Page):
    left, top, width, height = box(stage(decoded))
    decoded.mouse.move(left + width / 2, top + height / 2)
    decoded.mouse.wheel(0, 300)
    decoded.wait_for_function("() => scrollY > 0")
    expect(decoded.locator("#zoom-level")).to_have_text("100 %")


def test_a_zoomed_image_is_moved_by_dragging_and_by_arrow_keys_up_to_its_edges(decoded: Page):
    view, shown = stage(decoded), decoded.locator("#after")
    view.press("+")
    left, top, width, height = box(view)
    before = box(shown)
    decoded.mouse.move(left + 0.25 * width, top + 0.5 * height)  # away from the divider
    decoded.mouse.down()
    decoded.mouse.move(left + 0.35 * width, top + 0.4 * height, steps=5)
    decoded.mouse.up()
    after = box(shown)
    assert after[0] - before[0] == pytest.approx(0.1 * width, abs=1)
    assert after[1] - before[1] == pytest.approx(-0.1 * height, abs=1)
    assert decoded.locator("#split").input_value() == "50"

    view.press("ArrowRight")
    assert box(shown)[0] == pytest.approx(after[0] - 0.1 * width, abs=1)
    for _ in range(20):
        view.press("ArrowLeft")
        view.press("ArrowUp")
    assert box(shown)[:2] == pytest.approx((left, top), abs=1)


def test_the_bar_has_the_stages_of_the_server(decoded: Page):
    terms = decoded.locator("#timing dt").all_inner_texts()
    assert terms == ["Waiting", "Condition", "Steps", "Finish", "Encoding", "Other"]
    texts = decoded.locator("#timing dd").all_inner_texts()
    milliseconds = [float(text.split()[0]) * (1000 if text.endswith(" s") else 1) for text in texts]
    total = decoded.locator("#total").inner_text()
    assert sum(milliseconds) == pytest.approx(float(total.split()[0]) * (1000 if total.endswith(" s") else 1), rel=0.02)
    widths = [box(segment)[2] for segment in decoded.locator("#timing .bar span").all()]
    share = milliseconds[2] / sum(milliseconds)
    assert widths[2] / sum(widths) == pytest.approx(share, abs=0.03)
    colours = decoded.locator("#timing .bar span").evaluate_all(
        "(spans) => spans.map((span) => getComputedStyle(span).backgroundColor)"
    )
    assert len(set(colours)) == len(terms)
