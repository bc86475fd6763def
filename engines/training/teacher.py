"""The teacher: flow matching over all times, on latents that may themselves be noised."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engines.bundled import dct
from engines.pid import PidDecoder
from engines.training import flow
from engines.training.learner import Learner
from engines.training.start import hold

LEARNING_RATE = 1e-4
CROPS = 4  # of 256×256, or as many pixels of another size
SAMPLE_STEPS = 25


class Teacher:
    """Learns the velocity ε − x0 at x_t = (1 − t)·x0 + t·ε for all t, given a latent and its noise level."""

    title = "teacher"
    save_every = 250
    crops = CROPS

    def __init__(self, decoder: PidDecoder) -> None:
        hold(decoder, modulation=True)
        self.learner = Learner(decoder, LEARNING_RATE)

    @property
    def average(self) -> PidDecoder:
        return self.learner.average

    def step(self, image: Tensor, factor: float) -> dict[str, float]:
        """One update on pictures [B, 3, H, W] at `factor` times the learning rate; the losses by name."""
        latent, sigma = flow.noised(dct.encode(dct.downscale(image)))
        t, noise = flow.random_times(len(image), image.device), torch.randn_like(image)
        decoder = self.learner.network
        velocity = decoder.velocity(flow.diffuse(image, t, noise), t, flow.condition(decoder, latent), sigma)
        loss = flow.velocity_loss(velocity - (noise - image), t, flow.pixel_residual(latent, sigma))
        self.learner.descend(loss, factor)
        return {"flow matching": loss.item()}

    def decode(self, latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
        return sample(self.average, latent, noise, sigma)

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)


@torch.no_grad()
def sample(decoder: PidDecoder, latent: Tensor, noise: Tensor, sigma: float = 0.0, steps: int = SAMPLE_STEPS) -> Tensor:
    """Follow the velocity from noise [B, 3, H, W] at t = 1 to a picture at t = 0 in equal steps (Euler)."""
    conditioning = flow.condition(decoder, latent)
    times = torch.linspace(1, 0, steps + 1).tolist()
    x = noise
    for t, next_t in pairwise(times):
        x = x + (next_t - t) * decoder.velocity(x, t, conditioning, sigma)
    return x
