"""Conversions of latents in the client. tests/clients/test_latent_frames.py compares them with those of diffusers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engines.pid.released import LATENT_SPACES
from pid_client import frames
from server.body.shapes import LatentShape

ROWS, COLUMNS = 6, 10  # cells of a latent


def latent(channels: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def pack(latents: torch.Tensor, side: int) -> torch.Tensor:
    """Return tokens of side × side cells, value by value."""
    batch, channels, height, width = latents.shape
    tokens = torch.empty(batch, height // side * (width // side), channels * side**2, dtype=latents.dtype)
    for c, y, x in np.ndindex(channels, height, width):
        token = (y // side) * (width // side) + x // side
        tokens[:, token, c * side**2 + (y % side) * side + x % side] = latents[:, c, y, x]
    return tokens


UNPACK: dict[int, Callable[..., np.ndarray]] = {2: frames.unpack, 1: frames.unpack_cells}


@pytest.mark.parametrize("side", UNPACK)
class TestUnpacking:
    """Tokens of 2×2 cells and of one cell, in images of 8 pixels per cell."""

    SIZE = (8 * ROWS, 8 * COLUMNS, 8)

    def test_it_is_the_inverse_of_packing(self, side: int):
        np.testing.assert_array_equal(UNPACK[side](pack(latent(), side), *self.SIZE), latent().numpy())

    def test_it_is_that_of_the_server(self, side: int):
        tokens = torch.randn(2, ROWS * COLUMNS // side**2, 16 * side**2)
        expected = LatentShape(2, 16, ROWS, COLUMNS, side).arrange(tokens)
        np.testing.assert_array_equal(UNPACK[side](tokens, *self.SIZE), expected.numpy())

    def test_a_size_between_tokens_is_rounded_down(self, side: int):
        height, width, pixels = self.SIZE
        rounded = UNPACK[side](pack(latent(), side), height + 7, width + 7, pixels)
        np.testing.assert_array_equal(rounded, latent().numpy())

    @pytest.mark.parametrize(("height", "width"), [(8 * ROWS + 16, 8 * COLUMNS), (0, 0), (4, 8 * COLUMNS)])
    def test_another_size_is_rejected(self, side: int, height: int, width: int):
        with pytest.raises(ValueError, match="pass the height and width that the pipeline used"):
            UNPACK[side](pack(latent(), side), height, width, 8)

    def test_a_latent_that_is_not_packed_is_rejected(self, side: int):
        with pytest.raises(ValueError, match=r"Packed latents are \[batch, tokens, values\]"):
            UNPACK[side](latent(), *self.SIZE)


def test_the_default_cells_are_those_of_the_models():
    assert frames.unpack(torch.zeros(1, 24, 64), 64, 96).shape == (1, 16, 8, 12)
    assert frames.unpack_cells(torch.zeros(1, 24, 128), 64, 96).shape == (1, 128, 4, 6)


def test_tokens_that_are_not_of_2x2_cells_are_rejected():
    with pytest.raises(ValueError, match="multiple of 4"):
        frames.unpack(torch.zeros(1, 24, 63), 64, 96)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_rearrangement_keeps_the_dtype(dtype: torch.dtype):
    values = latent().to(dtype)
    assert torch.equal(torch.from_numpy(frames.unpack(pack(values, 2), 8 * ROWS, 8 * COLUMNS)), values)
    assert torch.equal(torch.from_numpy(frames.drop_frame(values[:, :, None])), values)
    assert frames.patchify(values).dtype == values.numpy().dtype


def test_a_rearrangement_widens_bfloat16():
    values = latent().bfloat16()
    unpacked = frames.unpack(pack(values, 2), 8 * ROWS, 8 * COLUMNS)
    assert torch.equal(torch.from_numpy(unpacked), values.float())


def test_patchify_moves_squares_into_channels():
    values, patches = latent(), frames.patchify(latent())
    assert patches.shape == (2, 64, ROWS // 2, COLUMNS // 2)
    for c, row, column in np.ndindex(16, 2, 2):
        np.testing.assert_array_equal(patches[:, 4 * c + 2 * row + column], values[:, c, row::2, column::2])


@pytest.mark.parametrize("shape", [(1, 16, 5, 8), (1, 16, 8, 5), (16, 8, 8)])
def test_patchify_rejects_other_shapes(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="even h and w"):
        frames.patchify(torch.zeros(shape))


def test_batch_norm_is_that_of_pytorch():
    norm = torch.nn.BatchNorm2d(16, eps=1e-4, affine=False).eval()
    norm.running_mean = torch.randn(16)
    norm.running_var = torch.rand(16) + 0.1
    normalised = frames.batch_norm(latent(), norm.running_mean, norm.running_var)
    np.testing.assert_allclose(normalised, norm(latent()).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mean", "variance"), [(16, 15), (15, 16), (1, 1)])
def test_batch_norm_needs_statistics_of_every_channel(mean: int, variance: int):
    with pytest.raises(ValueError, match="one mean and variance per channel"):
        frames.batch_norm(latent(), torch.zeros(mean), torch.ones(variance))


@pytest.mark.parametrize("sigma", [0.0, 0.03, 1.7, 14.6])
def test_the_euler_frame_is_converted_to_the_variance_preserving_one(sigma: float):
    x0, noise = latent(4), torch.randn(2, 4, ROWS, COLUMNS)
    converted, vp_sigma = frames.vp_from_euler(x0 + sigma * noise, sigma)
    expected = (1 - vp_sigma**2) ** 0.5 * x0 + vp_sigma * noise
    np.testing.assert_allclose(converted, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_an_invalid_sigma_is_rejected(sigma: float):
    with pytest.raises(ValueError, match="at least 0"):
        frames.vp_from_euler(latent(4), sigma)


@pytest.mark.parametrize("shape", [(1, 16, 2, 8, 8), (1, 16, 8, 8)])
def test_only_one_frame_can_be_dropped(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="one frame"):
        frames.drop_frame(torch.zeros(shape))


NORMALISABLE = [name for name, space in LATENT_SPACES.items() if space.statistics is not None]


@pytest.mark.parametrize("name", NORMALISABLE)
def test_normalisation_has_the_constants_of_the_server(name: str):
    space = LATENT_SPACES[name]
    assert space.statistics is not None
    raw = latent(space.channels)
    np.testing.assert_allclose(frames.normalise(raw, name), space.statistics.normalise(raw).numpy(), rtol=1e-6)
    np.testing.assert_array_equal(frames.normalise(raw[0], name), frames.normalise(raw, name)[0])


@pytest.mark.parametrize("name", sorted(LATENT_SPACES.keys() - NORMALISABLE))
def test_latents_without_constants_cannot_be_normalised(name: str):
    with pytest.raises(ValueError, match="only those of flux, sd3, sdxl, qwenimage"):
        frames.normalise(torch.zeros(1, LATENT_SPACES[name].channels, 8, 8), name)


def test_normalisation_rejects_other_channels():
    with pytest.raises(ValueError, match=r"A raw latent of sdxl is \[4, h, w\]"):
        frames.normalise(latent(16), "sdxl")
