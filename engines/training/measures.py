"""How good a decoded picture is. Pictures are float32 [B, 3, H, W] in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled import dct
from engines.pid.config import PATCH


def bicubic(latent: Tensor) -> Tensor:
    """What upscaling makes of the latent without a network: [B, 16, h, w] -> [B, 3, 16h, 16w]."""
    return F.interpolate(dct.decode(latent), scale_factor=dct.UPSCALE, mode="bicubic").clamp(-1, 1)


def psnr(image: Tensor, reference: Tensor) -> float:
    """Mean over the batch in dB."""
    error = (image.clamp(-1, 1) - reference).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(4 / error)).mean().item()


def ssim(image: Tensor, reference: Tensor) -> float:
    """Structural similarity with its authors' Gaussian window, mean over colours and batch."""
    from skimage.metrics import structural_similarity

    pairs = zip(image.cpu().numpy(), reference.cpu().numpy(), strict=True)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return sum(structural_similarity(*pair, channel_axis=0, data_range=2.0, **window) for pair in pairs) / len(image)


def gradient_energy(image: Tensor) -> float:
    """Mean square of the difference between neighbouring pixels: how sharp a picture is."""
    return 0.5 * (image.diff(dim=2).square().mean() + image.diff(dim=3).square().mean()).item()


def sharpness(image: Tensor, reference: Tensor) -> float:
    """Gradient energy against the original's; 1 where as sharp."""
    return gradient_energy(image) / gradient_energy(reference)


def grid(image: Tensor) -> float:
    """Mean absolute difference of neighbours where patches meet, over that elsewhere; 1 where none can tell."""
    columns = image.diff(dim=3).abs().mean(dim=(0, 1, 2))
    rows = image.diff(dim=2).abs().mean(dim=(0, 1, 3))
    steps = torch.cat((columns, rows))
    border = torch.cat([torch.arange(len(line)) % PATCH == PATCH - 1 for line in (columns, rows)])
    return (steps[border].mean() / steps[~border].mean()).item()
