"""How good a decoded picture is. Pictures are float32 [B, 3, H, W] in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.demo import dct
from engines.pid.config import PATCH


def bicubic(latent: Tensor) -> Tensor:
    """What upscaling makes of the latent without a network: [B, 16, h, w] -> [B, 3, 16h, 16w]."""
    return F.interpolate(dct.decode(latent), scale_factor=dct.UPSCALE, mode="bicubic").clamp(-1, 1)


def psnr(image: Tensor, reference: Tensor) -> float:
    """Mean over the batch in dB."""
    error = (image.clamp(-1, 1) - reference).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(4 / error)).mean().item()


def sharpness(image: Tensor) -> float:
    """Mean absolute difference between neighbouring pixels."""
    return 0.5 * (image.diff(dim=2).abs().mean() + image.diff(dim=3).abs().mean()).item()


def grid(image: Tensor) -> float:
    """How much larger the difference between neighbours is where patches meet than elsewhere; 1 where nobody can tell."""
    columns = image.diff(dim=3).abs().mean(dim=(0, 1, 2))
    rows = image.diff(dim=2).abs().mean(dim=(0, 1, 3))
    border = [torch.arange(len(line)) % PATCH == PATCH - 1 for line in (columns, rows)]
    across = torch.cat((columns[border[0]], rows[border[1]])).mean()
    within = torch.cat((columns[~border[0]], rows[~border[1]])).mean()
    return (across / within).item()
