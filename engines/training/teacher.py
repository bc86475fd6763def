"""The teacher: flow matching at all timesteps t, on latents that may be noised."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engines.bundled import dct
from engines.pid import PidDecoder
from engines.pid.network import Conditioning
from engines.training import flow
from engines.training.initialise import freeze_noise_paths
from engines.training.learner import Learner

LEARNING_RATE = 1e-4
CROPS = 4  # of 256×256, or as many pixels of another size
SAMPLE_STEPS = 25
TRAJECTORY_TIMESTEPS = (0.634, 0.342, 0.15, 0.05, 0.0)  # at which `follow` evaluates the velocity


class Teacher:
    """Learns the velocity ε − x0 at x_t = (1 − t)·x0 + t·ε for all t, given a latent and its noise level."""

    title = "teacher"
    crops = CROPS

    def __init__(self, decoder: PidDecoder) -> None:
        freeze_noise_paths(decoder, pixel_modulation=True)
        self.learner = Learner(decoder, LEARNING_RATE)

    @property
    def average(self) -> PidDecoder:
        """The network with the EMA weights that are exported."""
        return self.learner.average

    def step(self, image: Tensor, rate_factor: float) -> dict[str, float]:
        """Take one optimiser step on images [B, 3, H, W]; return the losses by name."""
        latent, sigma = flow.noise_random_share(dct.encode(dct.downscale(image)))
        t, noise = flow.random_timesteps(len(image), image.device), torch.randn_like(image)
        decoder = self.learner.network
        velocity = decoder.velocity(flow.diffuse(image, t, noise), t, flow.condition(decoder, latent), sigma)
        loss = flow.velocity_loss(velocity - (noise - image), t, flow.pixel_residual(latent, sigma))
        self.learner.update(loss, rate_factor)
        return {"flow matching": loss.item()}

    def decode(self, latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Decode latents [B, 16, h, w] from noise [B, 3, H, W] with the EMA weights."""
        return sample(self.average, latent, noise, sigma)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume."""
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.learner.load_state_dict(state)


@torch.no_grad()
def sample(decoder: PidDecoder, latent: Tensor, noise: Tensor, sigma: float = 0.0, steps: int = SAMPLE_STEPS) -> Tensor:
    """Integrate the velocity from noise [B, 3, H, W] at t = 1 to an image at t = 0, in equal Euler steps."""
    conditioning = flow.condition(decoder, latent)
    timesteps = torch.linspace(1, 0, steps + 1).tolist()
    x = noise
    for t, next_t in pairwise(timesteps):
        x = x + (next_t - t) * decoder.velocity(x, t, conditioning, sigma)
    return x


@torch.no_grad()
def follow(
    teacher: PidDecoder, x: Tensor, t: float, conditioning: Conditioning, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Follow the teacher's trajectory from x_t [B, 3, H, W] to t = 0, in Euler steps at TRAJECTORY_TIMESTEPS.

    Returns:
        The teacher's estimate of x0 at x_t, and the end of the trajectory.
    """
    velocity = teacher.velocity(x, t, conditioning, sigma)
    estimate = x - t * velocity
    for next_t in (timestep for timestep in TRAJECTORY_TIMESTEPS if timestep < t):
        x = x + (next_t - t) * velocity
        t = next_t
        if t > 0:
            velocity = teacher.velocity(x, t, conditioning, sigma)
    return estimate, x
