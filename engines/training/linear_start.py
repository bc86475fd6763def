"""Closed-form fit of the best linear `PixelNetwork`, from which its training starts.

Each low-resolution pixel is upscaled to 4×4 output pixels by a linear map of its neighbours within a radius of four.
The map is the sum of a coarse one, fitted to noised latents, and a fine one, fitted to the error of the coarse one on
clean latents. Their features become channels of the network.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled import dct
from engines.size import Size
from engines.training import flow, photos
from engines.training.luma import to_ycbcr
from engines.training.pixel_network import (
    CHANNELS,
    COARSE_GATE,
    FIRST_RADIUS,
    SECOND_RADIUS,
    SUBPIXELS,
    PixelNetwork,
    pad_cells,
    planes,
)

COARSE_CHANNELS = 6
BATCHES = 40
BATCH_CROPS, CROP = 8, Size(128, 128)
_MIN_COARSE_SIGMA = 0.2
_TAPS = 3 * (2 * SECOND_RADIUS + 1) ** 2


@torch.no_grad()
def start_linear(
    network: PixelNetwork, photo_set: list[np.ndarray], random: np.random.Generator, batches: int = BATCHES
) -> None:
    """Make a pixel network the best linear decoder of photos, uint8 [H, W, 3]; noise is from PyTorch's generator."""
    coarse = _fit(photo_set, random, batches, COARSE_CHANNELS, None)
    fine = _fit(photo_set, random, batches, CHANNELS - COARSE_CHANNELS, coarse[0] @ coarse[1])
    kernels = torch.cat((coarse[0], fine[0]), dim=1).T.unflatten(1, (3, 2 * SECOND_RADIUS + 1, -1))  # [C, 3, k, k]
    network.second.weight.zero_()
    for plane in range(3):  # in ± pairs, SiLU passes a value unchanged: SiLU(a) − SiLU(−a) = a
        for channel, sign in ((2 * plane, 1.0), (2 * plane + 1, -1.0)):
            network.first.weight[channel] = 0
            network.first.weight[channel, plane, FIRST_RADIUS, FIRST_RADIUS] = sign
            network.second.weight[:, channel] = sign * kernels[:, plane]
    for head, values, channels in (
        (network.coarse, coarse[1], slice(COARSE_CHANNELS)),
        (network.fine, fine[1], slice(COARSE_CHANNELS, None)),
    ):
        head.zero_()
        head[:, channels] = values.T
    for name, weight in network.state_dict().items():
        if name.endswith("block.5.weight"):  # the residual blocks do nothing at first
            weight.zero_()


def _fit(
    photo_set: list[np.ndarray], random: np.random.Generator, batches: int, rank: int, coarse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Fit the coarse map on noised latents, or on clean ones what the map `coarse` misses.

    Returns:
        Features of about unit mean square [taps, R], and the output values of each [R, 48], float32.
    """
    gram, cross, total = torch.zeros(_TAPS, _TAPS).double(), torch.zeros(_TAPS, SUBPIXELS).double(), 0.0
    for _ in range(batches):
        image = photos.random_crops(photo_set, BATCH_CROPS, CROP, random, photos.CANDIDATES)
        sigma = torch.linspace(_MIN_COARSE_SIGMA, flow.SIGMA_MAX, BATCH_CROPS) * (coarse is None)
        latent = dct.encode(dct.downscale(image))
        latent = flow.diffuse(latent, sigma, torch.randn_like(latent))
        inputs, targets = _examples(latent, image)
        weight = 1 / F.interpolate(flow.residual(latent, sigma), scale_factor=dct.BLOCK, mode="bilinear").flatten(1)
        if coarse is None:
            inputs = COARSE_GATE.openness(sigma)[:, None, None] * inputs
        else:
            targets = targets - inputs @ coarse
        weighted = (weight[..., None] * inputs).flatten(0, 1).T
        gram += (weighted @ inputs.flatten(0, 1)).double()
        cross += (weighted @ targets.flatten(0, 1)).double()
        total += weight.sum().item()
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(_TAPS)
    solution = torch.linalg.solve(gram, cross)
    factor = torch.linalg.cholesky(gram)
    left, scale, right = torch.linalg.svd(factor.T @ solution, full_matrices=False)
    features = torch.linalg.solve(factor.T, left[:, :rank]) * total**0.5
    return features.float(), (scale[:rank, None] * right[:rank] / total**0.5).float()


def _examples(latent: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the neighbourhoods of all low-resolution pixels [B, N, taps], and their output values [B, N, 48]."""
    inputs = F.unfold(pad_cells(planes(latent), SECOND_RADIUS), 2 * SECOND_RADIUS + 1)
    values = F.pixel_unshuffle(to_ycbcr(image), dct.UPSCALE)  # [B, 48, H/4, W/4]
    return inputs.transpose(1, 2), values.flatten(2).transpose(1, 2)
