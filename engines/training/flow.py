"""What teacher and student share: noised latents and pictures, and the loss in terms of the velocity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled import dct
from engines.bundled.decoder import CAPTION_TOKENS, CONFIG
from engines.pid import PidDecoder
from engines.pid.config import PATCH
from engines.pid.network import Conditioning
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import Size

SHORTEST = 0.02  # the smallest t that is trained
SIGMA_MAX = 0.8  # of the latents that are noised
NOISED_SHARE = 0.3
# Of pictures in [-1, 1]: the least mean square of what a linear decode misses, and the root of what noise adds.
LEAST_RESIDUAL, RESIDUAL_PER_SIGMA = 2e-4, 0.6
HIGHEST = slice(6, 10)  # the channels of the highest frequencies of luma
EDGE_WEIGHT = 0.5  # of differences between neighbouring pixels, against the pixels themselves
BORDER_WEIGHT = 3.0  # of those differences where two patches meet, on top


def residual(latent: Tensor, sigma: Tensor) -> Tensor:
    """Mean square of what a linear decode misses in every cell, for latents [B, 16, h, w], sigma [B] -> [B, 1, h, w].

    Told from the highest frequencies that the latent still has, by a curve fitted to training photos: between a sky and
    a lawn it varies three hundredfold.
    """
    scales = torch.tensor(dct.SCALES, device=latent.device)[HIGHEST, None, None]
    energy = (scales * latent[:, HIGHEST]).square().sum(dim=1, keepdim=True)
    energy = F.avg_pool2d(F.pad(energy, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return LEAST_RESIDUAL + energy / (1.5 + 20 * energy) + (RESIDUAL_PER_SIGMA * sigma.view(-1, 1, 1, 1)) ** 2


def pixel_residual(latent: Tensor, sigma: Tensor) -> Tensor:
    """The same for every pixel, without steps between cells: [B, 1, 16h, 16w]."""
    return F.interpolate(residual(latent, sigma), scale_factor=PATCH, mode="bilinear")


def expected_error(t: Tensor, residual: Tensor) -> Tensor:
    """Mean square error of the best linear guess of the velocity, for t [B] and residuals [B, 1, H, W]."""
    t = t.view(-1, 1, 1, 1)
    return residual / (residual * (1 - t) ** 2 + t**2)


def noised(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Latents at flow-matching noise levels sigma [B]: mostly 0, else uniform up to SIGMA_MAX."""
    batch = latent.shape[0]
    sigma = torch.rand(batch, device=latent.device) * SIGMA_MAX
    sigma = sigma * (torch.rand(batch, device=latent.device) < NOISED_SHARE)
    level = sigma.view(-1, 1, 1, 1)
    return (1 - level) * latent + level * torch.randn_like(latent), sigma


def random_times(batch: int, device: torch.device) -> Tensor:
    """Times of flow matching [B]: uniform in SHORTEST..1, and in a quarter of the cases one that the sampler uses."""
    t = SHORTEST + (1 - SHORTEST) * torch.rand(batch, device=device)
    used = torch.tensor(MODEL_TIMESTEPS, device=device)[torch.randint(len(MODEL_TIMESTEPS), (batch,), device=device)]
    return torch.where(torch.rand(batch, device=device) < 0.25, used, t)


def diffuse(image: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """(1 − t)·x0 + t·ε for images [B, 3, H, W] and t [B]."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * image + t * noise


def condition(decoder: PidDecoder, latent: Tensor) -> Conditioning:
    """The decoder's conditioning on latents [B, 16, h, w] and the caption of zeros."""
    batch, _, rows, columns = latent.shape
    caption = torch.zeros(batch, CAPTION_TOKENS, CONFIG.caption_width, device=latent.device)
    return decoder.condition(latent, caption, Size(CONFIG.cell_side * rows, CONFIG.cell_side * columns))


def picture_error(error: Tensor) -> Tensor:
    """Mean square of an error [B, 3, H, W], and of its differences to the right and below, for each picture: [B].

    All squares, so that the least is still at the mean that flow matching wants; the differences make errors of edges
    count more, and those across the borders of patches, which nothing else keeps together, more again.
    """
    total = error.square().mean(dim=(1, 2, 3))
    for axis in (2, 3):
        steps = error.diff(dim=axis).square()
        across = steps.index_select(axis, torch.arange(PATCH - 1, steps.shape[axis], PATCH, device=error.device))
        total = total + EDGE_WEIGHT * steps.mean(dim=(1, 2, 3)) + BORDER_WEIGHT / PATCH * across.mean(dim=(1, 2, 3))
    return total


def velocity_loss(error: Tensor, t: Tensor, residual: Tensor) -> Tensor:
    """Flow matching: errors of the velocity [B, 3, H, W] at t [B], each in proportion to what is expected there.

    What is expected depends on nothing but t and the latent, so that the least is still at the mean.
    """
    return picture_error(error / expected_error(t, residual).sqrt()).mean()
