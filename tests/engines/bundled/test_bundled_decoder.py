"""The bundled decoder: metadata of its file, quality of its images, and the metrics that measure it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from engines.bundled import dct
from engines.bundled.decoder import CHECKPOINT, CONFIG, PHOTO, PUBLISHED
from engines.pid import PidConfig, PidDecoder
from engines.size import Size
from engines.training import evaluate, metrics, photo_sources, photos


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """The bundled photo at 256 × 256, [1, 3, 256, 256]."""
    return photos.to_tensor(np.array(Image.open(PHOTO).resize((256, 256), Image.Resampling.LANCZOS)))[None]


@pytest.fixture(scope="module")
def decoder() -> PidDecoder:
    return evaluate.load_decoder()


def test_the_checkpoint_describes_itself() -> None:
    with safe_open(CHECKPOINT, "pt") as file:
        metadata = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads(metadata["config"]) == PUBLISHED
    assert PidConfig.from_published(json.loads(metadata["config"])) == CONFIG
    assert metadata["latent_space"] == "dct"
    assert CHECKPOINT.stat().st_size < 24e6


def test_a_decoded_photo_is_close_to_the_original_and_sharper_than_bicubic(
    decoder: PidDecoder, photo: torch.Tensor
) -> None:
    latent = dct.encode(dct.downscale(photo))
    image, upscaled = evaluate.decode(decoder, latent), metrics.bicubic(latent)
    assert metrics.psnr(image, photo) > metrics.psnr(upscaled, photo) - 0.5
    assert metrics.ssim(image, photo) > metrics.ssim(upscaled, photo)
    assert metrics.chroma_noise(image, photo) < 1.2
    assert metrics.sharpness(image, photo) > 1.3 * metrics.sharpness(upscaled, photo)
    assert torch.equal(image, evaluate.decode(decoder, latent))


def test_a_noised_latent_decodes_better_with_its_sigma(decoder: PidDecoder, photo: torch.Tensor) -> None:
    latent = evaluate.add_fixed_noise(dct.encode(dct.downscale(photo)), 0.4)
    right, wrong = (metrics.psnr(evaluate.decode(decoder, latent, sigma), photo) for sigma in (0.4, 0.0))
    assert right > wrong + 3
    assert right > metrics.psnr(metrics.bicubic(latent), photo) + 2


def test_the_grid_metric_rises_when_patches_differ() -> None:
    torch.manual_seed(0)
    plain = 0.1 * torch.randn(1, 3, 64, 64)
    tiles = torch.randn(1, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert 0.95 < metrics.grid(plain) < 1.05
    assert metrics.grid(plain + tiles) > 3


def test_sharpness_is_one_for_the_original_and_smaller_after_a_blur(photo: torch.Tensor) -> None:
    assert metrics.sharpness(photo, photo) == 1
    assert metrics.sharpness(F.avg_pool2d(photo, 3, 1, 1), photo) < 0.7


def test_psnr_and_ssim_have_known_values(photo: torch.Tensor) -> None:
    image = photo * 0.5
    assert metrics.psnr(image + 0.02, image) == pytest.approx(40, abs=0.01)  # 20·log10(2 / 0.02)
    assert metrics.ssim(image, image) == pytest.approx(1)
    assert metrics.ssim(image + 0.2 * torch.randn_like(image), image) < 0.8


def test_the_evaluation_prints_tables_and_writes_a_contact_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for title in photo_sources.HELD_OUT:
        np.save(tmp_path / "photos" / f"{title}.0.npy", random.integers(0, 256, (80, 90, 3), np.uint8))
    monkeypatch.setattr(evaluate, "SIZES", (Size(64, 64),))
    monkeypatch.setattr(evaluate, "SHEET_SIZE", Size(48, 48))
    sheet = tmp_path / "sheet.png"
    evaluate.main(["--data", str(tmp_path), "--teacher", str(CHECKPOINT), "--sheet", str(sheet)])
    printed = capsys.readouterr().out
    assert f"{len(photo_sources.HELD_OUT)} crops of 64×64" in printed
    for row in ("| 0 | original", "| 0.2 | student, 1 step |", "| 0.4 | teacher, 25 steps", "given sigma 0 |"):
        assert row in printed
    assert Image.open(sheet).size == (4 * 48, len(photo_sources.HELD_OUT) * 48)
