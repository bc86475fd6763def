"""A server with several decoders, one of which the person chooses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.clients.latents import LATENT
from tests.clients.playground.actions import choose_file, choose_size, image, open_page, progress, run, sent_latent
from tests.clients.playground.test_page_snippets import run_both

pytestmark = pytest.mark.clients


def decoder_field(page: Page) -> Locator:
    return page.get_by_label("Decoder", exact=True)


def sizes(page: Page, field: str) -> list[str]:
    return page.get_by_label(field, exact=True).locator("option").all_inner_texts()


def in_another_space(page: Page, url: str) -> None:
    """Let /info describe the decoder "three" as one of FLUX.1, whose latents have the same shapes."""
    info = httpx.get(f"{url}/info").json()
    info["decoders"][1]["latent_space"]["name"] = "flux"
    body = json.dumps(info)

    def fulfill(route: Route) -> None:
        route.fulfill(content_type="application/json", body=body)

    page.route("**/info", fulfill)


def test_a_single_decoder_offers_no_choice(page: Page, demo: str):
    open_page(page, demo)
    expect(page.locator("#decoder")).to_be_hidden()
    assert "decoder" not in run(page)
    for name in ("curl", "python"):
        expect(page.locator(f"#{name}")).not_to_contain_text("decoder")


def test_the_chosen_decoder_decodes_at_its_own_sizes(page: Page, several: str):
    open_page(page, several)
    assert decoder_field(page).locator("option").all_inner_texts() == ["1e1", "three"]
    assert sizes(page, "Size") == ["256 × 256"]
    page.get_by_role("radio", name="Mountains").check()
    assert run(page)["decoder"] == "1e1"
    decoder_field(page).select_option("three")
    expect(page.locator("#after")).to_be_hidden()
    assert sizes(page, "Size") == ["512 × 512", "256 × 256", "256 × 192"]
    expect(page.get_by_role("radio", name="Mountains")).to_be_checked()
    choose_size(page, "256 × 192")
    assert run(page)["decoder"] == "three"
    assert sent_latent(page).shape == (16, 12, 16)


def test_the_code_names_the_decoder(page: Page, several: str, tmp_path: Path):
    open_page(page, several)
    run(page)
    assert run_both(page, tmp_path, "image.png") == [image(page)] * 2
    expect(page.locator("#python")).to_contain_text('decoder="1e1"')


def test_photos_are_offered_only_for_the_decoder_that_can_use_them(page: Page, several: str):
    in_another_space(page, several)
    open_page(page, several)
    page.get_by_role("radio", name="Fig").check()
    expect(page.locator("#before-name")).to_have_text("Bicubic")
    decoder_field(page).select_option("three")
    expect(page.get_by_role("radio", name="Fig")).to_be_hidden()
    expect(page.get_by_role("radio", name="Random latent")).to_be_checked()
    expect(page.locator("#before-name")).to_have_text("Latent, three channels")
    run(page)
    decoder_field(page).select_option("1e1")
    expect(page.get_by_role("radio", name="Fig")).to_be_visible()
    expect(page.locator("#before-name")).to_have_text("Bicubic")


def test_a_file_is_kept_for_the_decoder_that_supports_it(page: Page, several: str, tmp_path: Path):
    np.save(tmp_path / "wide.npy", LATENT.numpy()[:, :12])
    open_page(page, several)
    decoder_field(page).select_option("three")
    choose_file(page, tmp_path / "wide.npy")
    expect(page.get_by_role("radio", name="wide.npy")).to_be_checked()
    decoder_field(page).select_option("1e1")
    expect(page.locator("#file-message")).to_contain_text("16 × 12 × 16. This decoder supports 16 × 16 × 16.")
    expect(page.get_by_role("radio", name="Random latent")).to_be_checked()
    expect(progress(page)).to_have_text("16 × 16 × 16 values")
    decoder_field(page).select_option("three")
    page.get_by_role("radio", name="wide.npy").check()
    expect(progress(page)).to_have_text("16 × 12 × 16 values")
    expect(page.locator("#file-message")).to_be_empty()


def test_the_overload_is_that_of_the_chosen_decoder(page: Page, several: str):
    open_page(page, several)
    facts = page.locator("#overload-facts")
    expect(facts).to_contain_text("with the decoder 1e1, predicted")
    assert sizes(page, "Image size") == ["256 × 256"]
    decoder_field(page).select_option("three")
    expect(facts).to_contain_text("with the decoder three, predicted")
    page.get_by_label("Image size").select_option(label="256 × 192")
    with page.expect_request(re.compile(r"/decode\?decoder=three&shape=16%2C12%2C16&")):
        page.locator("#overload-start").click()
    expect(page.locator("#overload-start")).to_have_text("Stop")
    decoder_field(page).select_option("1e1")  # ends the run
    expect(page.locator("#overload-start")).to_have_text("Start")
    expect(facts).to_contain_text("with the decoder 1e1, predicted")
