"""What the page shows when a file or a request cannot be used; the fixture `problems` fails if a script throws."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Locator, Page, Route, expect
from safetensors.torch import save_file

from loadtest.scrape import read_metrics
from tests.clients.latents import LATENT
from tests.clients.playground.actions import (
    choose_file,
    open_page,
    progress,
    record_texts,
    recorded_texts,
    run,
    sent_latent,
)
from tests.clients.playground.conftest import ServeSimulated

pytestmark = pytest.mark.clients

DECODE = re.compile(r"/decode\?")
READY = "**/health/ready"


def problem(page: Page) -> Locator:
    return page.locator("#problem")


def respond(status: int, detail: str) -> Callable[[Route], None]:
    """Return a handler of a request that responds with a problem document."""
    document = {"type": "about:blank", "status": status, "code": "test", "detail": detail, "request_id": "r-17"}

    def fulfill(route: Route) -> None:
        route.fulfill(status=status, content_type="application/problem+json", body=json.dumps(document))

    return fulfill


def press(page: Page) -> None:
    """Press the button with the keyboard."""
    page.get_by_role("button", name="Decode").press("Enter")


def assert_page_decodes(page: Page) -> None:
    run(page)
    expect(problem(page)).to_be_hidden()
    expect(page.get_by_role("img", name="Decoded")).to_be_visible()


def write_files(folder: Path) -> dict[str, str]:
    """Write files that are no usable latents; return the message for each."""
    np.save(folder / "shape.npy", np.zeros((16, 8, 8), np.float16))
    np.save(folder / "flat.npy", np.zeros(4096, np.float16))
    np.save(folder / "whole.npy", np.zeros((16, 16, 16), np.int32))
    np.save(folder / "fortran.npy", np.asfortranarray(LATENT.numpy()))
    np.save(folder / "nan.npy", np.full((16, 16, 16), np.nan, np.float16))
    np.save(folder / "infinite.npy", np.full((16, 16, 16), np.inf, np.float32))
    np.save(folder / "complete.npy", LATENT.numpy())
    complete = (folder / "complete.npy").read_bytes()
    (folder / "short.npy").write_bytes(complete[:-1])
    (folder / "header.npy").write_bytes(complete[:8])
    (folder / "text.txt").write_text("no latent")
    (folder / "empty.png").write_bytes(b"")
    with (folder / "large.jpg").open("wb") as large:
        large.truncate(2**28 + 1)
    save_file({"other": LATENT, "more": torch.ones(3)}, folder / "name.safetensors")
    save_file({"latent": LATENT.to(torch.float8_e4m3fn)}, folder / "type.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"\xff" * 64)
    (folder / "null.safetensors").write_bytes((4).to_bytes(8, "little") + b"null")
    tensor = {"dtype": "F16", "shape": [16, 16, 16], "data_offsets": [0, 8192]}
    headers = {
        "cut": tensor,
        "member": 1,
        "offsets": tensor | {"data_offsets": None},
        "side": tensor | {"shape": [-16, -16, 16]},
        "fraction": tensor | {"shape": [16, 16, 16.5]},
    }
    for name, latent in headers.items():
        header = json.dumps({"latent": latent}).encode()
        (folder / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return {
        "shape.npy": "16 × 8 × 8. This decoder supports 16 × 16 × 16.",
        "flat.npy": "4096. This decoder supports",
        "whole.npy": "must contain float16, float32 or float64",
        "fortran.npy": "in C order",
        "nan.npy": "not finite",
        "infinite.npy": "not finite",
        "short.npy": "incomplete",
        "header.npy": "incomplete",
        "text.txt": "neither a photo",
        "empty.png": "neither a photo",
        "large.jpg": "257 MiB. The page reads files of up to 256 MiB",
        "name.safetensors": "no tensor named “latent”, only: ",
        "type.safetensors": "F8_E4M3",
        "damaged.safetensors": "damaged",
        "null.safetensors": "damaged",
        "member.safetensors": "damaged",
        "offsets.safetensors": "damaged",
        "side.safetensors": "damaged",
        "fraction.safetensors": "damaged",
        "cut.safetensors": "incomplete",
    }


def test_a_wrong_file_is_explained_and_the_input_stays(page: Page, demo: str, tmp_path: Path):
    open_page(page, demo)
    message = page.locator("#file-message")
    expect(message).to_have_role("alert")
    for name, text in write_files(tmp_path).items():
        page.locator("#file").set_input_files(tmp_path / name)
        expect(message, name).to_contain_text(text)
        expect(page.get_by_role("radio", name="Cat")).to_be_checked()
    choose_file(page, tmp_path / "complete.npy")
    expect(message).to_be_empty()
    run(page)
    np.testing.assert_array_equal(sent_latent(page), LATENT.numpy())


def test_a_photo_is_explained_if_the_decoder_cannot_use_it(
    page: Page, serve_space: Callable[[str], str], tmp_path: Path
):
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    open_page(page, serve_space("flux"))
    page.locator("#file").set_input_files(tmp_path / "photo.png")
    expect(page.locator("#file-message")).to_contain_text("This decoder needs a latent.")


@pytest.mark.parametrize(
    ("status", "title"),
    [
        (413, "The latent is too large"),
        (422, "The server cannot decode this"),
        (503, "The server is not available"),
        (504, "The deadline has passed"),
        (418, "The request failed with status 418"),
    ],
)
def test_an_error_is_announced_with_its_reason_and_request(page: Page, demo: str, status: int, title: str):
    open_page(page, demo)
    page.route(DECODE, respond(status, "A reason."))
    press(page)
    alert = page.get_by_role("alert").and_(problem(page))
    expect(alert.get_by_role("heading")).to_have_text(title)
    expect(alert).to_contain_text("A reason.")
    expect(alert.locator("code")).to_have_text("r-17")
    expect(page.get_by_role("button", name="Decode")).to_be_focused()
    expect(page.get_by_role("img", name="Decoded")).to_be_hidden()
    page.unroute(DECODE)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("img", name="Decoded")).to_be_visible()
    expect(problem(page)).to_be_hidden()


def test_an_error_page_of_a_proxy_is_shown_with_its_status(page: Page, demo: str):
    open_page(page, demo)
    page.route(DECODE, lambda route: route.fulfill(status=502, content_type="text/html", body="<h1>Bad Gateway</h1>"))
    press(page)
    expect(problem(page)).to_contain_text("The request failed with status 502")
    expect(problem(page).locator(".request")).to_be_hidden()


def test_a_page_of_a_proxy_is_not_shown_as_an_image(page: Page, demo: str):
    open_page(page, demo)
    page.route(DECODE, lambda route: route.fulfill(content_type="text/html", body="<h1>Log in</h1>"))
    press(page)
    expect(problem(page)).to_contain_text("does not respond like a PiD server")


def test_a_problem_after_the_first_preview_is_shown(page: Page, demo: str):
    document = {"index": 0, "problem": {"status": 503, "code": "device-lost", "detail": "A device failed."}}
    body = f"event: problem\ndata: {json.dumps(document)}\n\n"
    open_page(page, demo)
    page.route(DECODE, lambda route: route.fulfill(content_type="text/event-stream", body=body))
    press(page)
    expect(problem(page)).to_contain_text("A device failed.")


def test_a_response_that_ends_early_is_an_error(page: Page, demo: str):
    open_page(page, demo)
    page.route(DECODE, lambda route: route.fulfill(content_type="text/event-stream", body="event: preview\ndata: {"))
    press(page)
    expect(problem(page)).to_contain_text("The response ended before the image had arrived.")


@pytest.fixture(scope="module")
def slow(serve_simulated: ServeSimulated) -> str:
    """URL of a server that decodes one image per second and lets one other image wait."""
    return serve_simulated(0.25, "--queue-images", "1")


def test_a_busy_server_rejects_and_the_page_counts_down_to_the_retry(page: Page, slow: str):
    open_page(page, slow)
    retry = page.locator("#retry")
    record_texts(retry)
    query = {"shape": "16,16,16", "dtype": "float16"}
    request = partial(httpx.post, f"{slow}/decode", params=query, content=bytes(2 * 16**3), timeout=60)
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(request) for _ in range(4)]
        while read_metrics(httpx.get(f"{slow}/metrics").text)['pid_queue_images{decoder="simulated"}'] < 1:
            page.wait_for_timeout(20)
        with page.expect_response(DECODE) as rejected:
            press(page)
        expect(retry).to_be_disabled()
    assert {other.result().status_code for other in others} == {200, 429}
    assert rejected.value.status == 429
    expect(problem(page)).to_contain_text("The server is busy")
    expect(retry).to_have_text("Retry")
    expect(retry).to_be_enabled()
    seconds = int(rejected.value.headers["retry-after"])
    shown = [*dict.fromkeys(recorded_texts(page))]
    assert shown == [f"Retry in {left} s" for left in range(seconds, 0, -1)] + ["Retry"]
    retry.click()
    expect(page.get_by_role("img", name="Decoded")).to_be_visible()


def test_a_lost_connection_is_explained_and_the_page_recovers(page: Page, demo: str):
    open_page(page, demo)
    page.context.set_offline(True)
    press(page)
    expect(problem(page)).to_contain_text("The server cannot be reached.")
    status = page.get_by_role("status").and_(page.locator("#status"))
    expect(status).to_contain_text("The server cannot be reached")
    expect(page.get_by_role("button", name="Decode")).to_be_disabled()
    expect(page.locator("#run-reason")).to_have_text("The server cannot be reached")
    page.context.set_offline(False)
    expect(status).to_have_text("Ready")
    assert_page_decodes(page)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ("starting", "The server is starting"),
        ("draining", "The server is shutting down"),
        ("stalled", "A device of the server is stalled"),
        ("failed", "The server has failed and will restart"),
    ],
)
def test_the_button_waits_until_the_server_is_ready(page: Page, demo: str, state: str, text: str):
    body = json.dumps({"state": state, "reason": None})
    page.route(READY, lambda route: route.fulfill(status=503, content_type="application/json", body=body))
    page.goto(demo)
    expect(page.locator("#status")).to_have_text(text)
    button = page.get_by_role("button", name="Decode")
    expect(page.locator("#run-reason")).to_have_text(text)
    expect(button).to_be_disabled()
    assert button.get_attribute("aria-describedby") == "run-reason"
    page.unroute(READY)
    expect(button).to_be_enabled()
    expect(page.locator("#run-reason")).to_be_empty()


def test_a_photo_that_cannot_be_loaded_is_explained_and_the_input_stays(page: Page, demo: str):
    open_page(page, demo)
    message, fig = page.locator("#file-message"), page.get_by_role("radio", name="Fig")
    for failure, text in (
        (lambda route: route.abort(), "The server cannot be reached."),
        (respond(404, "Not Found"), "Not Found"),
        (lambda route: route.fulfill(content_type="text/html", body="<h1>Log in</h1>"), "respond like a PiD server"),
    ):
        page.route("**/fig.jpg", failure)
        fig.click()
        expect(message).to_contain_text(text)
        expect(page.get_by_role("radio", name="Cat")).to_be_checked()
        page.unroute("**/fig.jpg")
    fig.check()
    expect(message).to_be_empty()
    assert_page_decodes(page)


def test_without_photos_a_random_latent_is_decoded(page: Page, demo: str):
    page.route("**/cat.jpg", respond(404, "Not Found"))
    open_page(page, demo)
    expect(page.get_by_role("radio", name="Random latent")).to_be_checked()
    assert_page_decodes(page)


def test_a_photo_that_arrives_after_the_next_choice_is_ignored(page: Page, demo: str, tmp_path: Path):
    np.save(tmp_path / "latent.npy", LATENT.numpy())
    open_page(page, demo)
    held: list[Route] = []
    page.route("**/fig.jpg", lambda route: held.append(route))
    with page.expect_request("**/fig.jpg"):
        page.get_by_role("radio", name="Fig").click()
    choose_file(page, tmp_path / "latent.npy")
    with page.expect_response("**/fig.jpg"):
        held[0].continue_()
    run(page)
    expect(page.get_by_role("radio", name="latent.npy")).to_be_checked()
    np.testing.assert_array_equal(sent_latent(page), LATENT.numpy())


@pytest.mark.parametrize("path", ["info", "metrics", "health/ready"])
def test_a_page_of_a_proxy_does_not_stop_the_page(page: Page, demo: str, path: str):
    page.route(f"**/{path}", lambda route: route.fulfill(content_type="text/html", body="<h1>Log in</h1>"))
    with page.expect_response(f"**/{path}"):
        page.goto(demo)
    if path == "metrics":
        expect(page.locator("#figures-status")).to_contain_text("does not respond like a PiD server")
    page.unroute(f"**/{path}")
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#figures-status")).to_be_empty()
    assert_page_decodes(page)


def test_a_date_in_retry_after_is_not_counted_down(page: Page, demo: str):
    open_page(page, demo)
    headers = {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}
    page.route(DECODE, lambda route: route.fulfill(status=503, headers=headers, body="{}"))
    press(page)
    retry = page.get_by_role("button", name="Retry")
    expect(retry).to_be_enabled()
    expect(retry).to_have_text("Retry")


def test_a_setting_that_changes_during_a_decode_replaces_its_view(page: Page, slow: str):
    open_page(page, slow)
    record_texts(progress(page))
    with page.expect_event("requestfailed", lambda request: "/decode?" in request.url):
        press(page)
        page.get_by_role("button", name="Random", exact=True).click()
    run(page)
    texts = recorded_texts(page)
    assert "Cancelled" not in texts
    assert "16 × 16 × 16 values" in texts


def test_cancel_ends_the_decode_and_the_page_decodes_again(page: Page, slow: str):
    open_page(page, slow)
    cancel = page.get_by_role("button", name="Cancel")
    expect(cancel).to_be_hidden()
    with page.expect_event("requestfailed", lambda request: "/decode?" in request.url):
        press(page)
        cancel.press("Enter")
    expect(progress(page)).to_have_text("Cancelled")
    expect(cancel).to_be_hidden()
    expect(page.get_by_role("button", name="Decode")).to_be_focused()
    assert_page_decodes(page)
