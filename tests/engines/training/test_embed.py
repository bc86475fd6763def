"""A decoder with an embedded pixel network computes what that network computes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from engines.bundled import dct
from engines.bundled.decoder import CONFIG
from engines.pid import PidDecoder
from engines.training import flow, photos
from engines.training.embed import cell_features, embed, reduce_rank
from engines.training.initialise import decode_mean
from engines.training.pixel_network import PixelNetwork


def rms(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


@torch.no_grad()
def test_the_adapter_computes_the_features_of_any_network(decoder: PidDecoder) -> None:
    network = PixelNetwork()
    for name, parameter in network.named_parameters():
        parameter.copy_(0.1 * torch.randn_like(parameter) + name.endswith(("0.weight", "3.weight")))  # group norms
    embed(network, torch.eye(CONFIG.adapter_width).double(), decoder)
    latent = torch.randn(2, dct.CHANNELS, 3, 5)
    expected = cell_features(network.features(latent))
    features = decoder.lq_proj.latent_proj(latent).permute(0, 2, 3, 1)
    torch.testing.assert_close(features, expected, atol=1e-4 * rms(expected), rtol=1e-4)


class TestEmbeddedDecoder:
    """With the linear start on smooth photos, and a random bias. The images have an RMS of about 0.5."""

    @pytest.fixture
    def network(self, linear_network: PixelNetwork) -> PixelNetwork:
        network = copy.deepcopy(linear_network)
        torch.nn.init.normal_(network.bias, std=0.1)
        return network

    @pytest.fixture
    def latent(self, smooth_photos: list[np.ndarray]) -> torch.Tensor:
        return dct.encode(dct.downscale(photos.random_crops(smooth_photos, 4, (128, 128), np.random.default_rng(1))))

    @pytest.fixture
    def embedded(self, decoder: PidDecoder, network: PixelNetwork, latent: torch.Tensor) -> PidDecoder:
        with torch.no_grad():
            features = cell_features(network.features(latent)).flatten(0, 2).double()
        embed(network, features.T @ features / len(features) + 1e-4 * torch.eye(features.shape[1]), decoder)
        return decoder

    @pytest.mark.parametrize(("sigma", "tolerance"), [(0.0, 0.002), (0.3, 0.01)])
    @torch.no_grad()
    def test_the_mean_is_the_networks_image(
        self, embedded: PidDecoder, network: PixelNetwork, latent: torch.Tensor, sigma: float, tolerance: float
    ) -> None:
        """The coarse part loses rank. At sigma 0, the fine part makes up for it."""
        noisy, level = flow.diffuse(latent, sigma, torch.randn_like(latent)), torch.full((4,), sigma)
        image = network(noisy, level)
        assert rms(image) > 0.3
        assert rms(decode_mean(embedded, noisy, level) - image) < tolerance

    @pytest.mark.parametrize("sigma", [0.0, 0.3])
    @torch.no_grad()
    def test_one_step_from_noise_gives_the_mean(self, embedded: PidDecoder, latent: torch.Tensor, sigma: float) -> None:
        noise = torch.randn(4, 3, 128, 128)
        estimate = noise - 0.999 * embedded.velocity(noise, 0.999, flow.condition(embedded, latent), sigma)
        mean = decode_mean(embedded, latent, torch.full((4,), sigma))
        assert rms(estimate - mean) < 0.01


class TestReduceRank:
    @pytest.fixture
    def matrix(self) -> torch.Tensor:
        return torch.randn(12, 30, generator=torch.Generator().manual_seed(0)).double()

    @pytest.fixture
    def moments(self) -> torch.Tensor:
        """Second moments of correlated features of very different size, [12, 12]."""
        features = torch.randn(500, 12, generator=torch.Generator().manual_seed(1)).double()
        features = features @ torch.randn(12, 12, generator=torch.Generator().manual_seed(2)).double()
        features *= torch.logspace(-1, 1, 12)
        return features.T @ features / len(features)

    def test_full_rank_is_exact(self, matrix: torch.Tensor, moments: torch.Tensor) -> None:
        reduced = reduce_rank(matrix, moments, 12)
        torch.testing.assert_close(reduced.readout @ reduced.patches, matrix)

    def test_no_other_map_of_that_rank_is_closer(self, matrix: torch.Tensor, moments: torch.Tensor) -> None:
        """By Eckart and Young, the smallest error is the sum of the squares of the other singular values."""
        reduced = reduce_rank(matrix, moments, 4)
        factor = torch.linalg.cholesky(moments).T

        def error(approximation: torch.Tensor) -> float:
            return (factor @ (matrix - approximation)).square().sum().item()

        smallest = torch.linalg.svdvals(factor @ matrix)[4:].square().sum().item()
        assert error(reduced.readout @ reduced.patches) == pytest.approx(smallest)
        left, scale, right = torch.linalg.svd(matrix, full_matrices=False)
        assert smallest < 0.9 * error(left[:, :4] * scale[:4] @ right[:4])  # the best one without the weights

    def test_intermediate_values_have_unit_mean_square(self, matrix: torch.Tensor, moments: torch.Tensor) -> None:
        readout = reduce_rank(matrix, moments, 4).readout
        torch.testing.assert_close((readout.T @ moments @ readout).diagonal(), torch.ones(4).double())
