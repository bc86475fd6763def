"""Training photos: crops, and the separation of held-out photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np

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


def test_titles_are_unique_because_they_name_the_stored_arrays() -> None:
    titles = [photo_sources.title(name) for source in photo_sources.SOURCES for name in source.names]
    assert len(titles) == len(set(titles))


def test_every_held_out_photo_exists_and_one_ships() -> None:
    titles = {photo_sources.title(name) for source in photo_sources.SOURCES for name in source.names}
    assert set(photo_sources.HELD_OUT) <= titles
    assert "Picture 0B" in PHOTO.with_suffix(".txt").read_text()
