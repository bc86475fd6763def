"""The bundled decoder: its checkpoint decodes well, and the script that made it starts right and can go on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from engines.demo import dct, evaluate, photos, train
from engines.demo.decoder import CHECKPOINT, CONFIG, PHOTO, PUBLISHED
from engines.demo.start import TIMES, regress, start_linear, wire
from engines.pid import PidConfig, PidDecoder

PHOTO_FLOOR = 23.5  # dB, the decoder reaches 24.3


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """The bundled photo at 256 × 256, [1, 3, 256, 256]."""
    return photos.to_tensor(np.array(Image.open(PHOTO).resize((256, 256), Image.Resampling.LANCZOS)))[None]


@pytest.fixture(scope="module")
def decoder() -> PidDecoder:
    return evaluate.load()


def test_the_checkpoint_describes_itself() -> None:
    with safe_open(CHECKPOINT, "pt") as file:
        metadata = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads(metadata["config"]) == PUBLISHED
    assert PidConfig.from_published(json.loads(metadata["config"])) == CONFIG
    assert metadata["latent_space"] == "dct"
    assert CHECKPOINT.stat().st_size < 12e6


def test_it_decodes_the_bundled_photo(decoder: PidDecoder, photo: torch.Tensor) -> None:
    latent = dct.encode(dct.downscale(photo))
    image = evaluate.decode(decoder, latent)
    assert evaluate.psnr(image, photo) > PHOTO_FLOOR
    assert torch.equal(image, evaluate.decode(decoder, latent))


def test_a_noisier_latent_is_trusted_less(decoder: PidDecoder, photo: torch.Tensor) -> None:
    latent = dct.encode(dct.downscale(photo[..., :64, :64]))
    contrast = [evaluate.decode(decoder, latent, sigma).std().item() for sigma in (0.0, 0.4, 0.8)]
    assert contrast == sorted(contrast, reverse=True)
    assert contrast[2] < 0.9 * contrast[0]


@pytest.fixture
def wired() -> PidDecoder:
    torch.manual_seed(0)
    decoder = PidDecoder(CONFIG)
    wire(decoder)
    return decoder


@pytest.mark.parametrize("t", TIMES)
@torch.no_grad()
def test_a_wired_network_removes_the_noise(wired: PidDecoder, t: float) -> None:
    latent, x = torch.randn(1, dct.CHANNELS, 4, 4), torch.randn(1, 3, 64, 64)
    conditioning = wired.condition(latent, torch.zeros(1, 1, CONFIG.caption_width), (64, 64))
    x0 = x - t * wired.velocity(x, t, conditioning, 0.0)
    assert (x0 - regress(wired, latent, torch.zeros(1))).std() < 0.03  # of noise of unit variance


@torch.no_grad()
def test_the_linear_start_is_no_worse_than_bicubic(wired: PidDecoder) -> None:
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(4)]
    smooth = [np.asarray(image.resize((400, 400), Image.Resampling.BICUBIC)) for image in coarse]
    start_linear(wired, smooth, random)
    image = photos.random_crops(smooth, 2, (256, 256), random)
    latent = dct.encode(dct.downscale(image))
    linear = regress(wired, latent, torch.zeros(2))
    assert evaluate.psnr(linear, image) > evaluate.psnr(evaluate.bicubic(latent), image)


def test_a_resumed_run_takes_the_same_step(wired: PidDecoder, tmp_path: Path) -> None:
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    run = train.Run(wired)
    run.enter(train.FLOW)
    run.step(image, 0.1)
    run.seconds = 7.0
    run.save(tmp_path)
    resumed = train.Run(PidDecoder(CONFIG))
    resumed.resume(tmp_path)
    assert (resumed.seconds, resumed.steps, resumed.stage) == (7.0, 1, train.FLOW)
    losses = []
    for each in (run, resumed):
        torch.manual_seed(1)
        losses.append(each.step(image, 0.2))
    assert losses[0] == pytest.approx(losses[1])
    for one, other in zip(run.average.parameters(), resumed.average.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_crops_keep_to_the_photos_that_are_large_enough() -> None:
    small, large = np.zeros((80, 80, 3), np.uint8), np.full((96, 130, 3), 255, np.uint8)
    crops = photos.random_crops([small, large], 5, (64, 96), np.random.default_rng(0))
    assert crops.shape == (5, 3, 64, 96)
    assert crops.min() == 1


def test_held_out_photos_are_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for value, name in enumerate(("astronaut.0", "astronaut.1", "rocket.0")):
        np.save(tmp_path / "photos" / f"{name}.npy", np.full((2, 2, 3), value, np.uint8))
    assert [int(photo.max()) for photo in photos.load(tmp_path, held_out=False)] == [2]
    assert [int(photo.max()) for photo in photos.load(tmp_path, held_out=True)] == [0, 1]


def test_every_held_out_photo_exists_and_one_ships() -> None:
    titles = {photos.title(name) for source in photos.SOURCES for name in source.names}
    assert set(photos.HELD_OUT) <= titles
    assert "Picture 0B" in PHOTO.with_suffix(".txt").read_text()
