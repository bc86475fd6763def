"""Gain of the teacher's detail, controlled so that the student's images reach a target sharpness."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.training import flow
from engines.training.flow import MIN_RESIDUAL

MAX_RESIDUAL, BINS = 0.05, 8  # the gain has BINS levels, spaced logarithmically from MIN_RESIDUAL to MAX_RESIDUAL
SHARPNESS = (0.2, 0.32)  # target at the smallest and the largest residual, relative to the photos
MAX_GAIN = 3.0
RATE = 0.01  # exponent of the correction per update
MEMORY = 0.98  # decay of the measured energies per update


class DetailGain:
    """A factor for the detail that the student adds to its estimate of the mean, as a function of the residual.

    A teacher of this size leaves grain in skies and makes too little detail in lawns, and the student does not learn
    all of it. A controller therefore raises or lowers the gain at each residual, until decoded images have the target
    share of the photos' gradient energy there.
    """

    def __init__(self, device: torch.device, rate: float = RATE) -> None:
        self._rate = rate
        levels = torch.logspace(math.log10(MIN_RESIDUAL), math.log10(MAX_RESIDUAL), BINS, device=device)
        self.gain = levels**0.25  # [BINS]
        self.energy = torch.zeros(2, BINS, device=device)  # recent gradient energies: of the student, of the photos

    @property
    def sharpness(self) -> float:
        """Recent gradient energy of the student over that of the photos, at all residuals together."""
        student, photos = self.energy.sum(dim=1).tolist()
        return student / max(photos, 1e-6)

    def at(self, latent: Tensor, residual: Tensor) -> Tensor:
        """Return the gain at each pixel, [B, 1, H, W]; smaller for noised latents.

        Args:
            latent: [B, 16, h, w]
            residual: Expected error of each pixel, [B, 1, H, W].
        """
        texture = flow.pixel_residual(latent, torch.zeros(len(latent), device=latent.device))
        position = _bin(texture)
        below = position.floor().clamp(max=BINS - 2)
        low, high = self.gain[below.long()], self.gain[below.long() + 1]
        return torch.lerp(low, high, position - below) * (texture / residual).sqrt()

    def update(self, decoded: Tensor, image: Tensor, residual: Tensor, sigma: Tensor) -> None:
        """Correct the gain by the sharpness of decoded images [B, 3, H, W]; those of noised latents are ignored."""
        bins = _bin(residual).round().long().flatten()
        clean = (sigma == 0)[:, None, None]  # a factor, because selecting those images would make the host wait
        for total, pixels in zip(self.energy, (decoded, image), strict=True):
            total.mul_(MEMORY).index_add_(0, bins, (clean * _gradient_energy(pixels)).flatten())
        target = torch.linspace(*SHARPNESS, BINS, device=self.energy.device)
        ratio = (target * self.energy[1] + 1e-6) / (self.energy[0] + 1e-6)
        self.gain = (self.gain * ratio.clamp(0.1, 10) ** self._rate).clamp(max=MAX_GAIN)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything needed to resume."""
        return {"gain": self.gain, "energy": self.energy}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from a `state_dict`."""
        self.gain, self.energy = (state[name].to(self.gain.device) for name in ("gain", "energy"))


def _bin(residual: Tensor) -> Tensor:
    """Return the fractional bin of residuals, 0 to BINS - 1."""
    return ((residual / MIN_RESIDUAL).log() / math.log(MAX_RESIDUAL / MIN_RESIDUAL)).clamp(0, 1) * (BINS - 1)


def _gradient_energy(image: Tensor) -> Tensor:
    """Return the mean square of the differences to the right and below, at every pixel: [B, 3, H, W] -> [B, H, W]."""
    down, right = (F.pad(image.diff(dim=axis).square(), pad) for axis, pad in ((2, (0, 0, 0, 1)), (3, (0, 1))))
    return (down + right).mean(dim=1) / 2
