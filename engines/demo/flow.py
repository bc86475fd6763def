"""What teacher and student share: noised latents and pictures, and the loss in terms of the velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.demo.decoder import CAPTION_TOKENS, CONFIG
from engines.pid import PidDecoder
from engines.pid.config import PATCH
from engines.pid.network import Conditioning

SHORTEST = 0.02  # the smallest t that is trained
SIGMA_MAX = 0.8  # of the latents that are noised
NOISED_SHARE = 0.3
RESIDUAL = 0.08  # root mean square of what a linear decode of the latent misses, for pictures in [-1, 1]
RESIDUAL_PER_SIGMA = 0.6  # how much larger it is for a latent at noise level 1
EDGE_WEIGHT = 0.5  # of differences between neighbouring pixels, against the pixels themselves
BORDER_WEIGHT = 3.0  # of those differences where two patches meet, on top


def spread(t: Tensor, sigma: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """r², and r²(1 − t)² + t²: the variance of a picture around its linear decode, and of that picture at time t."""
    residual = RESIDUAL**2 + (RESIDUAL_PER_SIGMA * torch.as_tensor(sigma)) ** 2
    return residual, residual * (1 - t) ** 2 + t**2


def expected_error(t: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
    """Mean square error of the best linear guess of the velocity, for t and sigma [B]."""
    residual, variance = spread(t, sigma)
    return residual / variance


def noised(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Latents at flow-matching noise levels sigma [B]: mostly 0, else uniform up to SIGMA_MAX."""
    batch = latent.shape[0]
    sigma = torch.rand(batch, device=latent.device) * SIGMA_MAX
    sigma = sigma * (torch.rand(batch, device=latent.device) < NOISED_SHARE)
    level = sigma.view(-1, 1, 1, 1)
    return (1 - level) * latent + level * torch.randn_like(latent), sigma


def random_times(batch: int, device: torch.device) -> Tensor:
    """Times of flow matching [B] in SHORTEST..1, logit-normal around 0.27, and 1 itself now and then.

    Below about 0.3 detail stands out of the noise; above it there is little to tell but what the latent tells.
    """
    t = torch.sigmoid(1.2 * torch.randn(batch, device=device) - 1).clamp(SHORTEST, 0.999)
    return torch.where(torch.rand(batch, device=device) < 0.1, torch.ones_like(t), t)


def diffuse(image: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """(1 − t)·x0 + t·ε for images [B, 3, H, W] and t [B]."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * image + t * noise


def condition(decoder: PidDecoder, latent: Tensor) -> Conditioning:
    """The decoder's conditioning on latents [B, 16, h, w] and the caption of zeros."""
    batch, _, rows, columns = latent.shape
    caption = torch.zeros(batch, CAPTION_TOKENS, CONFIG.caption_width, device=latent.device)
    return decoder.condition(latent, caption, (CONFIG.cell_side * rows, CONFIG.cell_side * columns))


def picture_error(error: Tensor, edges: float = EDGE_WEIGHT, borders: float = BORDER_WEIGHT) -> Tensor:
    """Mean square of an error [B, 3, H, W], and of its differences to the right and below, for each picture: [B].

    All squares, so that the least is still at the mean that flow matching wants; the differences make errors of edges
    count more, and those across the borders of patches, which nothing else keeps together, more again.
    """
    total = error.square().mean(dim=(1, 2, 3))
    for axis in (2, 3):
        steps = error.diff(dim=axis).square()
        across = steps.index_select(axis, torch.arange(PATCH - 1, steps.shape[axis], PATCH, device=error.device))
        total = total + edges * steps.mean(dim=(1, 2, 3)) + borders / PATCH * across.mean(dim=(1, 2, 3))
    return total


def velocity_loss(error: Tensor, t: Tensor, sigma: Tensor) -> Tensor:
    """Flow matching: errors of the velocity [B, 3, H, W], every t and sigma [B] in proportion to what is expected."""
    return (picture_error(error) / expected_error(t, sigma)).mean()
