"""The teacher: flow matching over all times, on latents that may themselves be noised."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engines.demo import dct, flow
from engines.demo.learner import Learner
from engines.demo.start import regress
from engines.pid import PidDecoder

LEARNING_RATE = 5e-4
FLOW_FACTOR = 0.4  # of that, for flow matching
REGRESSION_STEPS = 1500
CROPS_REGRESSION, CROPS_FLOW = 8, 4  # of 256×256, or as many pixels of another size
SAMPLE_STEPS = 25


class Teacher:
    """Two tasks one after the other.

    First the adapter alone learns to turn a latent into a picture: a plain regression, several times cheaper than the
    whole network and, by the wiring of engines/demo/start.py, most of what its velocity needs. Then everything learns
    the velocity ε − x0.
    """

    def __init__(self, decoder: PidDecoder) -> None:
        self.learner = Learner(decoder, LEARNING_RATE)

    @property
    def average(self) -> PidDecoder:
        return self.learner.average

    def crops(self, step: int) -> int:
        return CROPS_REGRESSION if step < REGRESSION_STEPS else CROPS_FLOW

    def step(self, image: Tensor, step: int, factor: float) -> dict[str, float]:
        """One update on pictures [B, 3, H, W] at `factor` times the learning rate; the losses by name."""
        decoder = self.learner.network
        if step == REGRESSION_STEPS:
            decoder.load_state_dict(self.average.state_dict())
        latent, sigma = flow.noised(dct.encode(dct.downscale(image)))
        if step < REGRESSION_STEPS:
            error, t = regress(decoder, latent, sigma) - image, torch.ones_like(sigma)
        else:
            t, noise = flow.random_times(len(image), image.device), torch.randn_like(image)
            velocity = decoder.velocity(flow.diffuse(image, t, noise), t, flow.condition(decoder, latent), sigma)
            error = velocity - (noise - image)
        loss = flow.velocity_loss(error, t, sigma)
        self.learner.descend(loss, factor if step < REGRESSION_STEPS else FLOW_FACTOR * factor)
        return {"regression" if step < REGRESSION_STEPS else "flow matching": loss.item()}

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
