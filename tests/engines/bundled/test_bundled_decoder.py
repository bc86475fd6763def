"""The decoder that ships: its file describes itself, it decodes well, and what measures it can be trusted."""

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
from engines.training import evaluate, measures, photos


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


def test_it_is_close_to_the_photo_and_sharper_than_bicubic(decoder: PidDecoder, photo: torch.Tensor) -> None:
    latent = dct.encode(dct.downscale(photo))
    image, upscaled = evaluate.decode(decoder, latent), measures.bicubic(latent)
    assert measures.psnr(image, photo) > measures.psnr(upscaled, photo) - 1
    assert measures.sharpness(image, photo) > 1.3 * measures.sharpness(upscaled, photo)
    assert torch.equal(image, evaluate.decode(decoder, latent))


def test_told_the_noise_of_a_latent_it_decodes_it_better(decoder: PidDecoder, photo: torch.Tensor) -> None:
    latent = evaluate.noised(dct.encode(dct.downscale(photo)), 0.4)
    right, wrong = (measures.psnr(evaluate.decode(decoder, latent, told), photo) for told in (0.4, 0.0))
    assert right > wrong + 0.5
    assert right > measures.psnr(measures.bicubic(latent), photo) + 2


def test_the_grid_of_a_picture_is_measured() -> None:
    torch.manual_seed(0)
    plain = 0.1 * torch.randn(1, 3, 64, 64)
    tiles = torch.randn(1, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert 0.95 < measures.grid(plain) < 1.05
    assert measures.grid(plain + tiles) > 3


def test_sharpness_is_one_for_the_original_and_less_for_a_blurred_one(photo: torch.Tensor) -> None:
    assert measures.sharpness(photo, photo) == 1
    assert measures.sharpness(F.avg_pool2d(photo, 3, 1, 1), photo) < 0.7


def test_psnr_and_ssim_of_known_pictures(photo: torch.Tensor) -> None:
    image = photo * 0.5
    assert measures.psnr(image + 0.02, image) == pytest.approx(40, abs=0.01)  # 20·log10(2 / 0.02)
    assert measures.ssim(image, image) == pytest.approx(1)
    assert measures.ssim(image + 0.2 * torch.randn_like(image), image) < 0.8


def test_the_evaluation_prints_its_tables_and_writes_its_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for title in photos.HELD_OUT:
        np.save(tmp_path / "photos" / f"{title}.0.npy", random.integers(0, 256, (80, 90, 3), np.uint8))
    monkeypatch.setattr(evaluate, "SIZES", ((64, 64),))
    monkeypatch.setattr(evaluate, "SHEET_SIZE", (48, 48))
    sheet = tmp_path / "sheet.png"
    evaluate.main(["--data", str(tmp_path), "--teacher", str(CHECKPOINT), "--sheet", str(sheet)])
    printed = capsys.readouterr().out
    assert "6 crops of 64×64" in printed
    for row in ("| 0 | original", "| 0.2 | student, 1 step |", "| 0.4 | teacher, 25 steps", "told 0 |"):
        assert row in printed
    assert Image.open(sheet).size == (4 * 48, len(evaluate.SHEET_PHOTOS) * 48)
