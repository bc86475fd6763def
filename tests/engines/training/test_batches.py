"""Batches that a thread prepares ahead of the training."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from engines.training import train

CPU = torch.device("cpu")


def test_batches_are_those_of_the_generator_in_its_order() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (520, 520, 3), np.uint8)
    random = np.random.default_rng(1)
    expected = [train.random_batch([photo], 1, random) for _ in range(2 * train.BATCHES_AHEAD)]
    with contextlib.closing(train.batches([photo], 1, np.random.default_rng(1), CPU)) as images:
        for batch in expected:
            assert torch.equal(next(images), batch)


def test_a_failure_in_the_thread_stops_the_training() -> None:
    with pytest.raises(ValueError, match="high <= 0"):  # no photo is large enough for a crop
        next(train.batches([np.zeros((8, 8, 3), np.uint8)], 1, np.random.default_rng(0), CPU))
