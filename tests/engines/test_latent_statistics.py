"""Statistics with which raw latents are normalised."""

from __future__ import annotations

import re

import pytest
import torch

from engines.bundled import decoder as bundled
from engines.decoders import find_latent_space
from engines.pid.released import LATENT_SPACES, LatentStatistics


def test_a_number_for_all_channels():
    latents = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    assert LatentStatistics((2.0,), (0.5,)).normalise(latents).flatten().tolist() == [1.0, 3.0]


def test_moments_per_channel_give_mean_0_and_deviation_1():
    raw = torch.randn(4, 2, 64, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 0.5]).view(2, 1, 1)
    raw += torch.tensor([-1.0, 7.0]).view(2, 1, 1)
    normalised = LatentStatistics.of_moments(mean=(-1.0, 7.0), std=(3.0, 0.5)).normalise(raw)
    assert normalised.mean((0, 2, 3)).tolist() == pytest.approx([0, 0], abs=0.05)
    assert normalised.std((0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("space", [s for s in LATENT_SPACES.values() if s.statistics], ids=lambda space: space.name)
def test_the_constants_are_those_of_the_formula(space):
    statistics, numbers = space.statistics, [float(x) for x in re.findall(r"\d+\.\d+", space.normalisation)]
    if numbers:
        assert [*statistics.scale, *(x for x in statistics.shift if x)] == numbers
    else:  # per channel, from a configuration
        assert len(statistics.scale) == len(statistics.shift) == space.channels


def test_latent_spaces_are_found_by_name():
    assert find_latent_space("flux") == LATENT_SPACES["flux"]
    assert find_latent_space("dct") == bundled.DESCRIPTION.latent_space
    assert find_latent_space("unknown") is None
