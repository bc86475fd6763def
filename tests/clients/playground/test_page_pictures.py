"""Pictures of the playground. To update them: make test-clients PYTEST="-k pictures --pictures docs"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.clients.conftest import Serve
from tests.clients.playground import actions
from tests.clients.playground.conftest import NewPage

pytestmark = pytest.mark.clients

DESKTOP = {"viewport": {"width": 1280, "height": 1010}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where to write the pictures: the option --pictures, or a temporary folder."""
    return request.config.getoption("--pictures") or tmp_path


@pytest.fixture(scope="session")
def gb200(serve: Serve) -> str:
    """URL of a server with a simulated GB200."""
    return serve("loadtest.simulated_server", "--table", "gb200")


def save(page: Page, path: Path, colours: int | None = None, **options: Any) -> None:
    """Write a screenshot, with a palette of `colours` if that is given, and check that it shows something."""
    page.screenshot(path=path, animations="disabled", **options)
    with Image.open(path) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1000
        if colours is not None:
            image.convert("RGB").quantize(colours, kmeans=4).save(path, optimize=True)
    assert path.stat().st_size < 500_000


def decoded(new_page: NewPage, url: str, **options: Any) -> Page:
    page = new_page(**options)
    actions.open_page(page, url)
    actions.run(page)
    page.mouse.move(0, 0)
    return page


@pytest.mark.parametrize(("scheme", "name"), [("light", "playground.png"), ("dark", "playground-dark.png")])
def test_a_picture_of_the_page_with_a_result(new_page: NewPage, bundled: str, folder: Path, scheme: str, name: str):
    page = decoded(new_page, bundled, color_scheme=scheme, **DESKTOP)
    save(page, folder / name, colours=256)


def test_a_picture_of_a_phone(new_page: NewPage, bundled: str, folder: Path):
    page = decoded(new_page, bundled, **PHONE)
    page.evaluate("scrollTo(0, 0)")
    save(page, folder / "playground-phone.png", colours=256, full_page=False)


def test_a_picture_of_an_overload(new_page: NewPage, gb200: str, folder: Path):
    page = new_page(**DESKTOP)
    actions.open_page(page, gb200)
    button = page.locator("#overload-start")
    button.click()
    expect(button).to_have_text("Stop", timeout=60_000)
    expect(button).to_have_text("Start", timeout=60_000)
    _, top, _, _ = actions.box(page.locator("#figures"))
    _, last, _, height = actions.box(page.locator("#overload"))
    clip = {"x": 0, "y": page.evaluate("scrollY") + top, "width": 1280, "height": last + height - top}
    save(page, folder / "overload.png", colours=256, full_page=True, clip=clip)
