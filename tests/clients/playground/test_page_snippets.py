"""The code that the page shows sends the same request as the page: it is copied, run, and its image compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.clients.conftest import KEY
from tests.clients.playground.actions import download, enter_key, image, open_page, run
from tests.programs import ROOT, program

pytestmark = pytest.mark.clients


def copied(page: Page, name: str) -> str:
    """Press a button that copies and return what it puts on the clipboard."""
    button = page.locator(f"[data-copy={name}]")
    expect(button).to_have_accessible_name(re.compile("^Copy the "))
    button.click()
    expect(button).to_have_accessible_name("Copied")
    page.context.grant_permissions(["clipboard-read"])
    text: str = page.evaluate("() => navigator.clipboard.readText()")
    return text


def run_both(page: Page, folder: Path, name: str) -> list[bytes]:
    """Save the latent, run the curl command and the Python program, and return the images that they write."""
    saved, latent = download(page, page.get_by_role("link", name="latent.npy"))
    (folder / saved).write_bytes(latent)
    environment = os.environ | {"PID_API_KEY": KEY, "PYTHONPATH": str(ROOT / "client")}
    images = []
    for shell, code in (
        ([program("sh"), "-c"], copied(page, "curl")),
        ([sys.executable, "-c"], copied(page, "python")),
    ):
        subprocess.run([*shell, code], cwd=folder, env=environment, check=True, timeout=120)
        images.append((folder / name).read_bytes())
        (folder / name).unlink()
    return images


def test_both_give_the_image_of_the_page(page: Page, demo: str, tmp_path: Path):
    open_page(page, demo)
    run(page)
    assert run_both(page, tmp_path, "image.png") == [image(page)] * 2


def test_both_have_all_settings(page: Page, demo: str, tmp_path: Path):
    open_page(page, demo)
    page.get_by_role("slider", name="Noise").fill("0.35")
    page.get_by_role("radio", name="2", exact=True).check()
    page.get_by_label("Seed").fill("4294967295")
    page.get_by_label("Format").select_option("JPEG")
    run(page)
    assert run_both(page, tmp_path, "image.jpg") == [image(page)] * 2


def test_both_read_the_api_key_from_the_environment(page: Page, demo_with_keys: str, tmp_path: Path):
    page.goto(demo_with_keys)
    enter_key(page, KEY)
    run(page)
    assert run_both(page, tmp_path, "image.png") == [image(page)] * 2
    for name in ("curl", "python"):
        expect(page.locator(f"#{name}")).not_to_contain_text(KEY)
