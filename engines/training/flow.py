"""Flow matching: noising of latents and images, and losses weighted by the error that is expected."""

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

MIN_T = 0.02  # the smallest t that is trained
SIGMA_MAX = 0.8  # largest noise level of a latent
NOISED_SHARE = 0.3  # share of latents that are noised
SAMPLER_SHARE = 0.25  # share of training timesteps that are drawn from those of the sampler
# Error of a linear decode, for images in [-1, 1]: its smallest mean square, and the RMS that noise adds per sigma.
MIN_RESIDUAL, RESIDUAL_PER_SIGMA = 5e-5, 0.6
EDGE_WEIGHT = 2.0  # of differences between neighbouring pixels, relative to the pixels themselves
BORDER_WEIGHT = 3.0  # additional weight of those differences across the border of two patches
_HIGH_LUMA = slice(6, 10)  # channels with the highest luma frequencies


def residual(latent: Tensor, sigma: Tensor) -> Tensor:
    """Predict the mean square error of a linear decode in each cell: [B, 16, h, w], sigma [B] -> [B, 1, h, w].

    The prediction is a curve of the energy in the highest frequencies of the latent, fitted to the training photos.
    It differs by a factor of 300 between a sky and a lawn.
    """
    scales = torch.tensor(dct.SCALES, device=latent.device)[_HIGH_LUMA, None, None]
    energy = (scales * latent[:, _HIGH_LUMA]).square().sum(dim=1, keepdim=True)
    energy = F.avg_pool2d(F.pad(energy, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return MIN_RESIDUAL + energy / (1.5 + 20 * energy) + (RESIDUAL_PER_SIGMA * sigma.view(-1, 1, 1, 1)) ** 2


def pixel_residual(latent: Tensor, sigma: Tensor) -> Tensor:
    """Interpolate `residual` to pixels, without steps between cells: [B, 1, 16h, 16w]."""
    return F.interpolate(residual(latent, sigma), scale_factor=PATCH, mode="bilinear")


def expected_error(t: Tensor, residual: Tensor) -> Tensor:
    """Return the mean square error of the best linear estimate of the velocity, for t [B], residuals [B, 1, H, W]."""
    t = t.view(-1, 1, 1, 1)
    return residual / (residual * (1 - t) ** 2 + t**2)


def diffuse(x0: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
    """Return (1 − t)·x0 + t·ε for images or latents [B, C, H, W] and one t or [B]."""
    t = t.view(-1, 1, 1, 1) if isinstance(t, Tensor) else t
    return (1 - t) * x0 + t * noise


def noise_random_share(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Add noise to a random share of latents [B, 16, h, w]; return them with their noise levels sigma [B].

    Sigma is uniform in 0..SIGMA_MAX for the noised ones and 0 for the others.
    """
    batch = latent.shape[0]
    sigma = torch.rand(batch, device=latent.device) * SIGMA_MAX
    sigma = sigma * (torch.rand(batch, device=latent.device) < NOISED_SHARE)
    return diffuse(latent, sigma, torch.randn_like(latent)), sigma


def random_timesteps(batch: int, device: torch.device) -> Tensor:
    """Draw training timesteps [B]: uniform in MIN_T..1, except for a share drawn from the sampler's timesteps."""
    t = MIN_T + (1 - MIN_T) * torch.rand(batch, device=device)
    used = torch.tensor(MODEL_TIMESTEPS, device=device)[torch.randint(len(MODEL_TIMESTEPS), (batch,), device=device)]
    return torch.where(torch.rand(batch, device=device) < SAMPLER_SHARE, used, t)


def condition(decoder: PidDecoder, latent: Tensor) -> Conditioning:
    """Condition the decoder on latents [B, 16, h, w] and a caption of zeros."""
    batch, _, rows, columns = latent.shape
    caption = torch.zeros(batch, CAPTION_TOKENS, CONFIG.caption_width, device=latent.device)
    return decoder.condition(latent, caption, Size(CONFIG.cell_side * rows, CONFIG.cell_side * columns))


def image_error(error: Tensor) -> Tensor:
    """Reduce an error [B, 3, H, W] to one loss per image [B].

    The loss is the mean square of the error plus that of its differences to the right and below. These give more weight
    to errors at edges, and most to those across patch borders, because nothing else in the loss or the network makes
    neighbouring patches continuous. All terms are squares, so that the minimum is still at the mean, as flow matching
    requires.
    """
    total = error.square().mean(dim=(1, 2, 3))
    for axis in (2, 3):
        steps = error.diff(dim=axis).square()
        across = steps.index_select(axis, torch.arange(PATCH - 1, steps.shape[axis], PATCH, device=error.device))
        total = total + EDGE_WEIGHT * steps.mean(dim=(1, 2, 3)) + BORDER_WEIGHT / PATCH * across.mean(dim=(1, 2, 3))
    return total


def velocity_loss(error: Tensor, t: Tensor, residual: Tensor) -> Tensor:
    """Return the flow-matching loss of velocity errors [B, 3, H, W] at t [B], relative to the expected error.

    The weight depends only on t and the latent, so that the minimum is still at the mean.
    """
    return image_error(error / expected_error(t, residual).sqrt()).mean()
