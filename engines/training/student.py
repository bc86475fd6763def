"""The student: the teacher distilled to the few steps of the sampler.

It regresses on the teacher's own trajectories (DMD, arXiv 2311.18828) and matches distributions with a fake score
(DMD2, arXiv 2405.14867). It is trained at the timesteps of the sampler, on the results of its own earlier steps.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engines.bundled import dct
from engines.pid import PidDecoder, sample
from engines.pid.sampler import advance, timesteps_for
from engines.training import flow
from engines.training.detail_gain import DetailGain
from engines.training.initialise import freeze_noise_paths
from engines.training.learner import Learner
from engines.training.luma import luma, sharpen
from engines.training.matching import DistributionMatching, fake_score
from engines.training.teacher import follow

LEARNING_RATE, FAKE_RATE = 1.5e-4, 1e-4
BETAS = (0.8, 0.98)
STEPS, STEPS_PROBABILITIES = (4, 2, 1), (0.7, 0.2, 0.1)  # numbers of steps that are trained
LAST_STEP_PROBABILITY = 0.6  # of training the sampler's last step, whose result is the image; else any step
CROPS = 2
MATCHING_WEIGHT = 0.5  # of distribution matching, relative to regression
DETAIL_RATE = 0.3  # smallest relative learning rate at which detail is trained; then what remains of noise is removed


class Student:
    """Learns to decode in a few steps as the teacher does in many.

    In all steps of a sampler but the last, the target is the mean of all images that the latent may stand for, because
    fresh noise follows. In the last step the target is a sharpened photo, so the student's image is a sharpened mean.
    The teacher's detail is added to its luma: the end of the trajectory minus the estimate of x0, which is determined
    by the noise in x_t. The detail is scaled by a gain (`DetailGain`).
    """

    crops = CROPS

    def __init__(self, teacher: PidDecoder, title: str = "student") -> None:
        self.title = title
        self.teacher = teacher.requires_grad_(False)
        self.learner = Learner(copy.deepcopy(teacher).requires_grad_(True), LEARNING_RATE, BETAS)
        self.fake = Learner(fake_score(teacher), FAKE_RATE, BETAS)
        freeze_noise_paths(self.learner.network, pixel_modulation=False)
        freeze_noise_paths(self.fake.network, pixel_modulation=True)
        self.matching = DistributionMatching(self.teacher, self.fake)
        self.detail_gain = DetailGain(next(teacher.parameters()).device)

    @property
    def average(self) -> PidDecoder:
        """The network with the EMA weights that are exported."""
        return self.learner.average

    def step(self, image: Tensor, rate_factor: float) -> dict[str, float]:
        """Take one optimiser step on images [B, 3, H, W]; return the losses by name.

        After a last step with detail, the fake score and the gain are updated as well.
        """
        latent, sigma = flow.noise_random_share(dct.encode(dct.downscale(image)))
        residual = flow.pixel_residual(latent, sigma)
        steps = STEPS[int(torch.multinomial(torch.tensor(STEPS_PROBABILITIES), 1))]
        index = steps - 1 if torch.rand(()) < LAST_STEP_PROBABILITY else int(torch.randint(steps, ()))
        x, t, decoded = self._decode(latent, sigma, steps, index)
        last = index == steps - 1
        if not last or rate_factor < DETAIL_RATE:
            target = sharpen(image) if last else image
            loss = flow.image_error((decoded - target) / residual.sqrt()).mean()
            self.learner.update(loss, rate_factor)
            return {"last step" if last else "earlier steps": loss.item()}
        self.detail_gain.update(decoded.detach(), image, residual, sigma)
        gain = self.detail_gain.at(latent, residual)
        with torch.no_grad():
            conditioning = flow.condition(self.teacher, latent)
        estimate, end = follow(self.teacher, x, t, conditioning, sigma)
        target = sharpen(image) + gain * luma(end - estimate)  # the same in R, G and B: the chroma is the photo's
        regression = flow.image_error((decoded - target) / residual.sqrt()).mean()
        matching, fake_loss = self.matching.step(decoded.detach(), conditioning, sigma, residual)
        pull = MATCHING_WEIGHT / matching.numel() * gain * luma(matching) / residual.sqrt()
        self.learner.update(regression + (decoded * pull).sum(), rate_factor)  # d(sum)/d(decoded) is the pull
        return {
            "last step": regression.item(),
            "fake score": fake_loss,
            "sharpness": self.detail_gain.sharpness,
            "gain in texture": self.detail_gain.gain[-1].item(),
        }

    def _decode(self, latent: Tensor, sigma: Tensor, steps: int, index: int) -> tuple[Tensor, float, Tensor]:
        """Run a sampler up to step `index`; return its x_t [B, 3, H, W], t, and the student's estimate of x0.

        Only the last network call records a gradient.
        """
        decoder = self.learner.network
        conditioning = flow.condition(decoder, latent)
        x = torch.randn(len(latent), 3, *conditioning.size, device=latent.device)
        transitions = list(pairwise(timesteps_for(steps)))
        with torch.no_grad():
            for t, next_t in transitions[:index]:
                x = advance(x, decoder.velocity(x, t, conditioning, sigma), t, next_t, torch.randn_like(x))
        t = transitions[index][0]
        return x, t, advance(x, decoder.velocity(x, t, conditioning, sigma), t, 0.0, None)

    @torch.no_grad()
    def decode(self, latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Decode latents [B, 16, h, w] from noise [B, 3, H, W] in four steps, as the server does, with EMA weights."""
        step_noise = [torch.randn_like(noise) for _ in range(3)]
        return sample(self.average, flow.condition(self.average, latent), noise, sigma, step_noise)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume."""
        return {
            "learner": self.learner.state_dict(),
            "fake": self.fake.state_dict(),
            **self.detail_gain.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.learner.load_state_dict(state["learner"])
        self.fake.load_state_dict(state["fake"])
        self.detail_gain.load_state_dict(state)
