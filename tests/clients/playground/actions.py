"""What a person does on the page, and what it then offers."""

from __future__ import annotations

import io
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import httpx
import numpy as np
from playwright.sync_api import Locator, Page, expect

RECORD = """(element) => {
    window.texts = [];
    new MutationObserver(() => window.texts.push(element.textContent)).observe(element, { childList: true });
}"""


def open_page(page: Page, url: str) -> None:
    """Load the page and wait until it can decode."""
    page.goto(url)
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#before-name")).not_to_be_empty()


def box(element: Locator) -> tuple[float, float, float, float]:
    """Return left, top, width and height of an element in the window."""
    found = element.bounding_box()
    assert found is not None
    return found["x"], found["y"], found["width"], found["height"]


def choose_file(page: Page, path: Path) -> None:
    """Choose a file with the file dialog and wait until the page shows it."""
    page.get_by_label("Drop a file or choose one").set_input_files(path)
    expect(page.locator(".tile.own")).to_contain_text(path.name)


def drop_file(page: Page, path: Path) -> None:
    """Drop a file from another program on the drop zone."""
    zone = page.locator(".drop")
    zone.scroll_into_view_if_needed()
    left, top, width, height = box(zone)
    client = page.context.new_cdp_session(page)
    place = {"x": left + width / 2, "y": top + height / 2}
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for event in ("dragEnter", "dragOver", "drop"):
        client.send("Input.dispatchDragEvent", {"type": event, **place, "data": data})


def choose_size(page: Page, size: str) -> None:
    """Choose the size of the image, such as "256 × 256"."""
    page.get_by_label("Size", exact=True).select_option(label=size)


def progress(page: Page) -> Locator:
    return page.locator("#progress")


def run(page: Page) -> dict[str, str]:
    """Press the button and wait until the image is shown; return the options of the request."""
    with page.expect_request(re.compile(r"/decode\?")) as request:
        page.get_by_role("button", name="Decode").click()
    expect(progress(page)).to_have_text(re.compile(r"^Decoded in [\d.]+ m?s$"), timeout=60_000)
    expect(page.locator("#after")).to_be_visible()
    return dict(parse_qsl(urlsplit(request.value.url).query))


def record_texts(element: Locator) -> None:
    """Record the texts of an element from now on."""
    element.evaluate(RECORD)


def recorded_texts(page: Page) -> list[str]:
    """Return the texts that were recorded."""
    texts: list[str] = page.evaluate("texts")
    return texts


def download(page: Page, link: Locator) -> tuple[str, bytes]:
    """Return the name and the content of the file behind a link."""
    with page.expect_download() as download:
        link.click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def image(page: Page) -> bytes:
    """Return the file of the decoded image."""
    return download(page, page.get_by_role("link", name="Download"))[1]


def sent_latent(page: Page) -> np.ndarray:
    """Return the latent of the last request, [channels, height, width]."""
    name, content = download(page, page.get_by_role("link", name="latent.npy"))
    assert name == "latent.npy"
    return np.load(io.BytesIO(content))


def decode_again(url: str, latent: np.ndarray, options: dict[str, str]) -> bytes:
    """Return the image of a latent with the options of a request, without previews."""
    options = {name: value for name, value in options.items() if name != "preview"}
    body = io.BytesIO()
    np.save(body, latent)
    headers = {"Content-Type": "application/x-npy"}
    response = httpx.post(f"{url}/decode", params=options, content=body.getvalue(), headers=headers, timeout=60)
    return response.raise_for_status().content


def enter_key(page: Page, key: str) -> None:
    """Enter an API key in the dialog, once it is open."""
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_role("button", name="Continue").click()
