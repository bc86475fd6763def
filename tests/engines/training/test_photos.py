"""Training photos: crops, and the separation of held-out photos."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.bundled.decoder import PHOTO
from engines.training import photo_sources, photos


def test_crops_come_only_from_photos_that_are_large_enough() -> None:
    small, large = np.zeros((80, 80, 3), np.uint8), np.full((96, 130, 3), 255, np.uint8)
    crops = photos.random_crops([small, large], 5, (64, 96), np.random.default_rng(0))
    assert crops.shape == (5, 3, 64, 96)
    assert crops.min() == 1


def test_the_most_detailed_of_several_crops_is_used() -> None:
    flat = np.full((64, 64, 3), 128, np.uint8)
    noisy = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    detailed = [
        photos.random_crops([flat, noisy], 50, (64, 64), np.random.default_rng(1), count).std(dim=(1, 2, 3)) > 0.1
        for count in (1, 3)
    ]
    assert detailed[0].sum() < 35 < detailed[1].sum()


def test_held_out_photos_are_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for value, name in enumerate(("astronaut.0", "astronaut.1", "rocket.0")):
        np.save(tmp_path / "photos" / f"{name}.npy", np.full((2, 2, 3), value, np.uint8))
    assert [int(photo.max()) for photo in photos.load(tmp_path, held_out=False)] == [2]
    assert [int(photo.max()) for photo in photos.load(tmp_path, held_out=True)] == [0, 1]


def _prepare(data: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Store photos without fine detail, of the given sizes (H, W)."""
    (data / "photos").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, (height, width) in sizes.items():
        photo = Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).resize((width, height))
        np.save(data / "photos" / f"{name}.npy", np.asarray(photo))


def test_a_compact_copy_is_loaded_at_all_sizes(tmp_path: Path) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"
    _prepare(data, {"rocket.0": (1600, 800), "rocket.1": (1120, 560), "astronaut.0": (450, 600)})
    photos.write_compact(data, copy)
    assert {file.name for file in (copy / "photos").iterdir()} == {"rocket.jpg", "astronaut.jpg"}
    assert [photo.shape for photo in photos.load(copy, held_out=False)] == [(1280, 640, 3), (896, 448, 3)]
    (photo,), (original,) = photos.load(copy, held_out=True), photos.load(data, held_out=True)
    difference = photo.astype(int) - original  # colours too: chroma is stored at full resolution
    assert photo.shape == (450, 600, 3)
    assert np.abs(difference).max() < 16
    assert np.abs(difference).mean() < 2


def test_a_compact_copy_needs_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["photos", "--data", str(tmp_path), "--compact", f"{tmp_path}/."])
    with pytest.raises(SystemExit, match="2"):
        photos.main()
    assert "another directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_titles_are_unique_because_they_name_the_stored_arrays() -> None:
    titles = [photo_sources.title(name) for source in photo_sources.SOURCES for name in source.names]
    assert len(titles) == len(set(titles))


def test_every_held_out_photo_exists_and_one_ships() -> None:
    titles = {photo_sources.title(name) for source in photo_sources.SOURCES for name in source.names}
    assert set(photo_sources.HELD_OUT) <= titles
    assert "Picture 0B" in PHOTO.with_suffix(".txt").read_text()
