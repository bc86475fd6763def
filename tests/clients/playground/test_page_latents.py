"""Latents from files, noise and the other settings, as the server receives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Page, expect
from safetensors.torch import save_file

from tests.clients.latents import LATENT, pixels
from tests.clients.playground.actions import (
    choose_file,
    decode_again,
    download,
    image,
    open_page,
    progress,
    run,
    sent_latent,
)

pytestmark = pytest.mark.clients

EXTREMES = torch.tensor([0.0, -0.0, 1.0, -2.5, 65504, -65504, 1e6, 6e-8, 1e-9, 2048 + 1, 1 + 2**-11, 1 + 3 * 2**-11])


def set_noise(page: Page, sigma: float) -> None:
    page.get_by_role("slider", name="Noise").fill(str(sigma))


def set_seed(page: Page, seed: int) -> None:
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_label("Seed").blur()


def assert_normal(values: np.ndarray) -> None:
    """Assert that 4096 values are standard normally distributed, within about four standard errors of each moment."""
    assert abs(values.mean()) < 0.06
    assert abs(values.std() - 1) < 0.05
    assert abs((values**4).mean() - 3) < 0.7


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_a_npy_file_is_sent_as_float16(page: Page, demo: str, tmp_path: Path, kind: str):
    values = LATENT.float().numpy()
    values.flat[: len(EXTREMES)] = EXTREMES
    np.save(tmp_path / "mine.npy", values.astype(kind) if kind != "float16" else LATENT.numpy())
    open_page(page, demo)
    choose_file(page, tmp_path / "mine.npy")
    run(page)
    expected = LATENT.numpy() if kind == "float16" else values.clip(-65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(sent_latent(page), expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_a_safetensors_file_is_sent_as_float16(page: Page, demo: str, tmp_path: Path, kind: torch.dtype):
    latent = LATENT.to(kind)
    save_file({"caption": torch.ones(3), "latent": latent[None]}, tmp_path / "mine.safetensors", {"made": "by a test"})
    open_page(page, demo)
    choose_file(page, tmp_path / "mine.safetensors")
    note = page.locator("#file-note")
    expect(note).to_have_text("Only the latent is sent. The file also has: caption.")
    page.get_by_role("radio", name="Cat").check()
    expect(note).to_be_empty()
    page.get_by_role("radio", name="mine.safetensors").check()
    expect(note).to_contain_text("caption")
    options = run(page)
    np.testing.assert_array_equal(sent_latent(page), latent.half().numpy())
    assert image(page) == decode_again(demo, latent.half().numpy(), options)


def test_noise_is_added_with_the_formula_of_the_documents(page: Page, demo: str, tmp_path: Path):
    """z = (1 - sigma) z0 + sigma noise, with Gaussian noise that depends only on the seed."""
    np.save(tmp_path / "mine.npy", LATENT.numpy())
    open_page(page, demo)
    choose_file(page, tmp_path / "mine.npy")
    latents = {}
    for sigma, seed in ((0.4, 3), (0.75, 3), (0.75, 4)):
        set_noise(page, sigma)
        set_seed(page, seed)
        assert run(page)["sigma"] == str(sigma)
        latents[sigma, seed] = sent_latent(page).astype(np.float64)

    clean = LATENT.numpy().astype(np.float64)
    noise = (latents[0.75, 3] - 0.25 * clean) / 0.75
    np.testing.assert_allclose(latents[0.4, 3], 0.6 * clean + 0.4 * noise, atol=5e-3)
    assert_normal(noise)
    assert abs((noise * clean).mean()) < 0.06
    other = (latents[0.75, 4] - 0.25 * clean) / 0.75
    assert abs((noise * other).mean()) < 0.06


def test_the_frame_of_the_decoder_determines_how_much_of_the_latent_is_kept(page: Page, sdxl: str, tmp_path: Path):
    """z = sqrt(1 - sigma²) z0 + sigma noise for SDXL."""
    clean = np.random.default_rng(0).standard_normal((4, 8, 8)).astype(np.float16)
    np.save(tmp_path / "mine.npy", clean)
    open_page(page, sdxl)
    choose_file(page, tmp_path / "mine.npy")
    set_noise(page, 1)
    run(page)
    noise = sent_latent(page).astype(np.float64)
    set_noise(page, 0.6)
    run(page)
    np.testing.assert_allclose(sent_latent(page), 0.8 * clean.astype(np.float64) + 0.6 * noise, atol=5e-3)


def test_noise_that_the_file_contains_is_not_added_again(page: Page, demo: str, tmp_path: Path):
    np.save(tmp_path / "mine.npy", LATENT.numpy())
    open_page(page, demo)
    noisy = page.get_by_role("checkbox", name="The file already contains this noise")
    expect(noisy).to_be_hidden()
    choose_file(page, tmp_path / "mine.npy")
    set_noise(page, 0.5)
    noisy.check()
    assert run(page)["sigma"] == "0.5"
    np.testing.assert_array_equal(sent_latent(page), LATENT.numpy())


def test_the_settings_are_those_of_the_request_and_of_the_image(page: Page, demo: str):
    open_page(page, demo)
    page.get_by_role("radio", name="Random latent").check()
    page.get_by_role("radio", name="2", exact=True).check()
    set_seed(page, 4294967295)
    page.get_by_label("Format").select_option("WEBP")
    options = run(page)
    assert options == {"sigma": "0", "steps": "2", "seed": "4294967295", "format": "webp", "preview": "steps"}
    name, content = download(page, page.get_by_role("link", name="Download"))
    assert name == "image.webp"
    assert pixels(content).shape == (256, 256, 3)
    latent = sent_latent(page).astype(np.float64)
    assert_normal(latent)


def test_a_random_seed_is_another_one(page: Page, demo: str):
    open_page(page, demo)
    page.get_by_role("button", name="Random").click()
    expect(page.get_by_label("Seed")).not_to_have_value("7")
    assert run(page)["seed"] == page.get_by_label("Seed").input_value()


@pytest.mark.parametrize("seed", ["-1", "4294967296", "0.5", ""])
def test_an_invalid_seed_is_not_sent(page: Page, demo: str, seed: str):
    open_page(page, demo)
    page.get_by_label("Seed").fill(seed)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.get_by_role("button", name="Decode").click()
    page.wait_for_timeout(300)
    assert page.get_by_label("Seed").evaluate("(field) => !field.validity.valid")
    assert not [url for url in requests if "/decode" in url]
    expect(page.get_by_label("Seed")).to_be_focused()


def test_a_decoder_with_another_latent_space_accepts_only_latents(
    page: Page, serve_space: Callable[[str], str], tmp_path: Path
):
    flux = serve_space("flux")
    open_page(page, flux)
    for name in ("Cat", "Fig", "Mountains"):
        expect(page.get_by_role("radio", name=name)).to_be_hidden()
    expect(page.get_by_role("radio", name="Random latent")).to_be_checked()
    expect(progress(page)).to_contain_text("values")
    run(page)
    assert sent_latent(page).ndim == 3
    expect(page.locator("#before-name")).to_have_text("Latent, three channels")
