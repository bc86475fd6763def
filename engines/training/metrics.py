"""Quality metrics of decoded images. Images are float32 [B, 3, H, W] in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled import dct
from engines.pid.config import PATCH


def bicubic(latent: Tensor) -> Tensor:
    """Return the baseline without a network, the inverse DCT upscaled: [B, 16, h, w] -> [B, 3, 16h, 16w]."""
    return F.interpolate(dct.decode(latent), scale_factor=dct.UPSCALE, mode="bicubic").clamp(-1, 1)


def psnr(image: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB: the mean over the images of the batch, which are clamped."""
    error = (image.clamp(-1, 1) - reference).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(4 / error)).mean().item()


def ssim(image: Tensor, reference: Tensor) -> float:
    """Return the structural similarity (Wang et al. 2004, Gaussian window), averaged over colours and batch."""
    from skimage.metrics import structural_similarity

    pairs = zip(image.cpu().numpy(), reference.cpu().numpy(), strict=True)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return sum(structural_similarity(*pair, channel_axis=0, data_range=2.0, **window) for pair in pairs) / len(image)


def gradient_energy(image: Tensor) -> float:
    """Return the mean square of the difference between neighbouring pixels."""
    return 0.5 * (image.diff(dim=2).square().mean() + image.diff(dim=3).square().mean()).item()


def sharpness(image: Tensor, reference: Tensor) -> float:
    """Return the gradient energy relative to the reference; 1 if equally sharp."""
    return gradient_energy(image) / gradient_energy(reference)


def grid(image: Tensor) -> float:
    """Return how visible the patch grid is; 1 if invisible.

    The value is the mean absolute difference between neighbours across patch borders, over that elsewhere.
    """
    columns = image.diff(dim=3).abs().mean(dim=(0, 1, 2))
    rows = image.diff(dim=2).abs().mean(dim=(0, 1, 3))
    steps = torch.cat((columns, rows))
    border = torch.cat([torch.arange(len(line)) % PATCH == PATCH - 1 for line in (columns, rows)])
    return (steps[border].mean() / steps[~border].mean()).item()
