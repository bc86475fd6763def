"""A photo is decoded: the browser computes its latent, the server decodes it with the bundled decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect

from engines.bundled import dct
from engines.bundled.decoder import PHOTO
from tests.clients.latents import pixels
from tests.clients.playground.actions import (
    choose_file,
    choose_size,
    decode_again,
    download,
    drop_file,
    image,
    open_page,
    progress,
    run,
    sent_latent,
)

pytestmark = pytest.mark.clients

ORIENTATION = 0x0112  # tag of EXIF
ROTATED = 6  # its value if viewers have to turn the photo clockwise
PIXELS = """(image) => {
    const context = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext("2d");
    context.drawImage(image, 0, 0);
    const { width, height } = context.canvas;
    return [...context.getImageData(0, 0, width, height).data].filter((_, index) => index % 4 < 3);
}"""


def photo(width: int, height: int) -> Image.Image:
    """Return the photo of the bundled decoder, scaled."""
    return Image.open(PHOTO).resize((width, height), Image.Resampling.LANCZOS)


def encode(image: Image.Image) -> np.ndarray:
    """Return the latent of a photo that has the size of the decoded image."""
    tensor = torch.from_numpy(np.array(image, np.float64)) / 127.5 - 1  # [H, W, 3]
    return dct.encode(dct.downscale(tensor.permute(2, 0, 1)[None]))[0].numpy()


def assert_rounded(found: np.ndarray, expected: np.ndarray) -> None:
    """Assert that `found` is `expected` in float16."""
    assert found.dtype == np.float16
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=2**-11, atol=2e-5)


def test_a_dropped_photo_is_decoded_and_shown(page: Page, bundled: str, tmp_path: Path):
    original = photo(256, 256)
    original.save(tmp_path / "fig.png")
    open_page(page, bundled)
    drop_file(page, tmp_path / "fig.png")
    expect(page.locator(".tile.own")).to_have_text("fig.png")
    expect(progress(page)).to_have_text("16 × 16 × 16 values")
    options = run(page)
    assert options == {"sigma": "0", "steps": "4", "seed": "7", "format": "png", "preview": "steps"}

    latent = sent_latent(page)
    assert_rounded(latent, encode(original))
    name, decoded = download(page, page.get_by_role("link", name="Download"))
    assert name == "image.png"
    assert decoded == decode_again(bundled, latent, options)
    shown = page.get_by_role("img", name="Decoded")
    expect(shown).to_be_visible()
    assert shown.evaluate(PIXELS) == pixels(decoded).flatten().tolist()
    error = np.abs(pixels(decoded).astype(float) - np.asarray(original)).mean()
    assert error < 12  # of 255: the image is that of the photo


def test_a_photo_of_another_shape_is_cropped_in_the_middle(page: Page, bundled: str, tmp_path: Path):
    original = photo(256, 336)
    original.save(tmp_path / "tall.png")
    open_page(page, bundled)
    choose_file(page, tmp_path / "tall.png")
    run(page)
    assert_rounded(sent_latent(page), encode(original.crop((0, 40, 256, 296))))


def test_a_photo_gets_the_size_with_the_nearest_shape(page: Page, bundled: str, tmp_path: Path):
    original = photo(256, 192)
    original.save(tmp_path / "wide.png")
    open_page(page, bundled)
    choose_file(page, tmp_path / "wide.png")
    run(page)
    assert_rounded(sent_latent(page), encode(original))
    assert pixels(image(page)).shape == (192, 256, 3)


def test_a_larger_photo_is_scaled(page: Page, bundled: str, tmp_path: Path):
    """Browsers choose the filter, so a few pixels differ from those of another program."""
    photo(1000, 1000).save(tmp_path / "large.png")
    open_page(page, bundled)
    choose_file(page, tmp_path / "large.png")
    choose_size(page, "256 × 256")
    run(page)
    expected = encode(photo(256, 256))
    assert np.abs(sent_latent(page) - expected).mean() < 0.03 < np.abs(expected).mean()


def test_a_photo_of_a_rotated_camera_is_upright(page: Page, bundled: str, tmp_path: Path):
    upright = photo(256, 256)
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED
    upright.rotate(90).save(tmp_path / "rotated.jpg", exif=exif, quality=100, subsampling=0)
    open_page(page, bundled)
    choose_file(page, tmp_path / "rotated.jpg")
    run(page)
    assert np.abs(sent_latent(page) - encode(upright)).max() < 0.05


def test_transparent_pixels_become_white(page: Page, bundled: str, tmp_path: Path):
    Image.new("RGBA", (256, 256), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    open_page(page, bundled)
    choose_file(page, tmp_path / "clear.png")
    run(page)
    assert_rounded(sent_latent(page), encode(Image.new("RGB", (256, 256), "white")))


def test_every_photo_of_the_gallery_is_decoded_at_the_largest_size(page: Page, bundled: str):
    open_page(page, bundled)
    page.get_by_role("radio", name="1", exact=True).check()  # step
    latents = []
    for name in ("Cat", "Fig", "Mountains"):
        page.get_by_role("radio", name=name).check()
        expect(progress(page)).to_have_text("16 × 32 × 32 values")
        run(page)
        latents.append(sent_latent(page))
    assert_rounded(latents[1], encode(Image.open(PHOTO)))
    assert not np.array_equal(latents[0], latents[2])
