"""The critic of the GAN term: tells photographs from decoded pictures, patch by patch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

WIDTHS = (6, 24, 48, 96)
DETAIL = 4.0  # what is finer than 4×4 pixels is small, and all that is left to judge
DITHER = 0.01  # noise on what is judged, so that the 8 bits of photographs do not give them away
SCALE = 30.0  # of the logits: with all layers' norms at 1 they are tiny otherwise


class Critic(nn.Module):
    """Four strided or plain convolutions, spectrally normalised; each logit sees 54×54 pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(WIDTHS):
            layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 3, padding=1)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(nn.Conv2d(WIDTHS[-1], 1, 3, padding=1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> logits [B, 1, H/8, W/8], larger where it looks like a photograph."""
        image = image + DITHER * torch.randn_like(image)
        detail = image - F.interpolate(F.avg_pool2d(image, 4), scale_factor=4, mode="bilinear")
        return SCALE * self.layers(torch.cat((image, DETAIL * detail), dim=1))


def paired_loss(better: Tensor, worse: Tensor) -> Tensor:
    """Small where each logit of the one is above the same place's of the other: content cancels, looks are left."""
    return F.softplus(worse - better).mean()
