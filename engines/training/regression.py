"""Training of the pixel network, in whose shape the teacher starts: regression on the photo, without diffusion."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.bundled import dct
from engines.bundled.decoder import CONFIG
from engines.pid import PidDecoder
from engines.training import flow
from engines.training.embed import cell_features, embed
from engines.training.initialise import initialise_velocity
from engines.training.learner import Learner, ema_decay
from engines.training.linear_start import start_linear
from engines.training.pixel_network import PixelNetwork

LEARNING_RATE = 1e-3
CROPS = 4  # of 256×256, or as many pixels of another size


class Regression:
    """Learns the mean of the images that a latent may stand for, with a `PixelNetwork`."""

    title = "regression"
    crops = CROPS

    def __init__(self, photo_set: list[np.ndarray] | None, device: torch.device) -> None:
        """Start from the best linear decoder of photos, uint8 [H, W, 3]; with None, from random weights."""
        network = PixelNetwork()
        if photo_set is not None:
            start_linear(network, photo_set, np.random.default_rng(0))
        self.learner = Learner(network.to(device), LEARNING_RATE)
        self.moments = torch.eye(CONFIG.adapter_width, device=device).double()

    @property
    def average(self) -> PidDecoder:
        """A decoder with the EMA weights of the pixel network, on the CPU."""
        decoder = PidDecoder(CONFIG)
        initialise_velocity(decoder)
        embed(copy.deepcopy(self.learner.average).cpu(), self.moments.cpu(), decoder)
        return decoder

    def step(self, image: Tensor, rate_factor: float) -> dict[str, float]:
        """Take one optimiser step on images [B, 3, H, W]; return the losses by name."""
        latent, sigma = flow.noise_random_share(dct.encode(dct.downscale(image)))
        network = self.learner.network
        features = network.features(latent)
        error = network.decode(features, sigma) - image
        loss = flow.image_error(error / flow.pixel_residual(latent, sigma).sqrt()).mean()
        steps = int(self.learner.ema.n_averaged)
        self.learner.update(loss, rate_factor)
        cells = cell_features(features.detach()).flatten(0, 2).double()
        self.moments.lerp_(cells.T @ cells / len(cells), 1 - ema_decay(steps))  # over the same steps as the weights
        return {"regression": loss.item()}

    @torch.no_grad()
    def decode(self, latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Decode latents [B, 16, h, w] with the EMA weights; the noise is not used."""
        return self.learner.average(latent, torch.full((len(latent),), sigma, device=latent.device))

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume."""
        return {"learner": self.learner.state_dict(), "moments": self.moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.learner.load_state_dict(state["learner"])
        self.moments.copy_(state["moments"])
