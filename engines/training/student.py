"""The student: the teacher distilled to the sampler's few steps.

By regression on the teacher's own trajectories (DMD, arXiv 2311.18828) and by distribution matching with a fake score,
at the steps of the sampler on what its earlier steps made (DMD2, arXiv 2405.14867).
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled import dct
from engines.pid import PidDecoder, sample
from engines.pid.sampler import advance, step_times
from engines.training import flow
from engines.training.learner import Learner
from engines.training.start import hold

LEARNING_RATE, FAKE_RATE = 5e-5, 5e-5
BETAS = (0.8, 0.98)
STEPS, STEPS_ODDS = (4, 2, 1), (0.7, 0.2, 0.1)  # the samplers that the student is trained in
LAST = 0.6  # how often that is the sampler's last step, the one that is seen
CROPS = 2
MATCHING = 0.5  # weight of the distribution matching, against the regression
TRAJECTORY = (0.8, 0.634, 0.48, 0.342, 0.2, 0.1, 0.04, 0.0)  # the times at which the teacher is followed
LEAST, MOST, BINS = 2e-4, 0.05, 8  # residuals between which the gain of detail is set, in so many points
SHARPNESS = (0.3, 0.75)  # gradient energy that is asked for at either end, against the photographs'
LARGEST_GAIN, GAIN_RATE = 3.0, 0.004


class Student:
    """Learns to decode in one go what the teacher decodes in many steps, with detail where photographs have it.

    Every step of a sampler but the last is asked for the mean of all pictures that the latent may stand for, since
    fresh noise follows. The last one adds the teacher's detail: what following its velocity to the end changes against
    its guess, a picture that depends on nothing but the noise at hand. A teacher of this size leaves grain in skies and
    makes too little of lawns, and a student does not learn all of what it makes; so the detail has a gain, for every
    residual its own, that is turned up or down until the student's pictures are as sharp there as is asked for.
    """

    save_every = 200
    crops = CROPS

    def __init__(self, teacher: PidDecoder, title: str = "student") -> None:
        self.title = title
        self.teacher = teacher.requires_grad_(False)
        self.learner = Learner(copy.deepcopy(teacher).requires_grad_(True), LEARNING_RATE, BETAS)
        self.fake = Learner(copy.deepcopy(teacher).requires_grad_(True), FAKE_RATE, BETAS)
        hold(self.learner.network, modulation=False)
        hold(self.fake.network, modulation=True)
        device = next(teacher.parameters()).device
        self.gain = 3 * torch.logspace(math.log10(LEAST), math.log10(MOST), BINS, device=device) ** 0.25
        self.energy = torch.zeros(2, BINS, device=device)  # of gradients of late: the student's and the photographs'

    @property
    def average(self) -> PidDecoder:
        return self.learner.average

    def step(self, image: Tensor, factor: float) -> dict[str, float]:
        """One update of student and, after a sampler's last step, fake score on pictures [B, 3, H, W]; the losses."""
        latent, sigma = flow.noised(dct.encode(dct.downscale(image)))
        residual = flow.pixel_residual(latent, sigma)
        steps = STEPS[int(torch.multinomial(torch.tensor(STEPS_ODDS), 1))]
        index = steps - 1 if torch.rand(()) < LAST else int(torch.randint(steps, ()))
        x, t, decoded = self._decode(latent, sigma, steps, index)
        if index < steps - 1:
            loss = flow.picture_error((decoded - image) / residual.sqrt()).mean()
            self.learner.descend(loss, factor)
            return {"earlier steps": loss.item()}
        self._turn_gain(decoded.detach(), image, residual, sigma)
        gain = self._gain(latent, residual)
        guess, end = follow(self.teacher, x, t, latent, sigma)
        regression = flow.picture_error((decoded - image - gain * (end - guess)) / residual.sqrt()).mean()
        matching, fake_score = self._match(decoded.detach(), latent, sigma, residual)
        pull = MATCHING / matching.numel() * gain * matching / residual.sqrt()
        self.learner.descend(regression + (decoded * pull).sum(), factor)  # the sum's gradient on pixels is the pull
        mine, photographs = self.energy.sum(dim=1).tolist()
        return {
            "last step": regression.item(),
            "fake score": fake_score,
            "sharpness": mine / max(photographs, 1e-6),
            "gain in texture": self.gain[-1].item(),
        }

    def _decode(self, latent: Tensor, sigma: Tensor, steps: int, index: int) -> tuple[Tensor, float, Tensor]:
        """One step of a sampler after the steps before it: x_t [B, 3, H, W], t, and x0 as the student has it."""
        decoder = self.learner.network
        conditioning = flow.condition(decoder, latent)
        x = torch.randn(len(latent), 3, *conditioning.size, device=latent.device)
        times = list(pairwise(step_times(steps)))
        with torch.no_grad():
            for t, next_t in times[:index]:
                x = advance(x, decoder.velocity(x, t, conditioning, sigma), t, next_t, torch.randn_like(x))
        t = times[index][0]
        return x, t, advance(x, decoder.velocity(x, t, conditioning, sigma), t, 0.0, None)

    def _gain(self, latent: Tensor, residual: Tensor) -> Tensor:
        """How much of the teacher's detail is wanted, [B, 1, H, W]; less where the latent is noise."""
        texture = flow.pixel_residual(latent, torch.zeros(len(latent), device=latent.device))
        place = _bin(texture)
        below = place.floor().clamp(max=BINS - 2)
        low, high = self.gain[below.long()], self.gain[below.long() + 1]
        return torch.lerp(low, high, place - below) * (texture / residual).sqrt()

    def _turn_gain(self, decoded: Tensor, image: Tensor, residual: Tensor, sigma: Tensor) -> None:
        """By how sharp pictures [B, 3, H, W] decoded from latents without noise are against the photographs."""
        place = _bin(residual[sigma == 0]).round().long().flatten()
        for total, picture in zip(self.energy, (decoded, image), strict=True):
            total.mul_(0.98).index_add_(0, place, _gradient_energy(picture[sigma == 0]).flatten())
        asked = torch.linspace(*SHARPNESS, BINS, device=self.energy.device)
        ratio = (asked * self.energy[1] + 1e-6) / (self.energy[0] + 1e-6)
        self.gain = (self.gain * ratio.clamp(0.1, 10) ** GAIN_RATE).clamp(max=LARGEST_GAIN)

    def _match(self, decoded: Tensor, latent: Tensor, sigma: Tensor, residual: Tensor) -> tuple[Tensor, float]:
        """The gradient of matching on decoded pictures, in the residual's unit and about 1 a pixel; trains the fake."""
        t, noise = flow.random_times(len(decoded), decoded.device), torch.randn_like(decoded)
        x = flow.diffuse(decoded, t, noise)
        fake = self.fake.network.velocity(x, t, flow.condition(self.fake.network, latent), sigma)
        with torch.no_grad():
            real = self.teacher.velocity(x, t, flow.condition(self.teacher, latent), sigma)
            unit = residual.sqrt() / t.view(-1, 1, 1, 1)  # x0 = x − t·v: guesses differ by t times what velocities do
            gap = ((noise - decoded - real) / unit).abs().mean(dim=(1, 2, 3), keepdim=True)
            gradient = (real - fake) / unit / gap
        loss = flow.velocity_loss(fake - (noise - decoded), t, residual)
        self.fake.descend(loss, 1.0)
        return gradient, loss.item()

    @torch.no_grad()
    def decode(self, latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """What the server will make of it, in four steps."""
        later = [torch.randn_like(noise) for _ in range(3)]
        return sample(self.average, flow.condition(self.average, latent), noise, sigma, later)

    def state_dict(self) -> dict[str, Any]:
        return {
            "learner": self.learner.state_dict(),
            "fake": self.fake.state_dict(),
            "gain": self.gain,
            "energy": self.energy,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.fake.load_state_dict(state["fake"])
        self.gain, self.energy = (state[name].to(self.gain.device) for name in ("gain", "energy"))


@torch.no_grad()
def follow(teacher: PidDecoder, x: Tensor, t: float, latent: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's guess of x0 from x_t [B, 3, H, W], and where its velocity leads from there in a few Euler steps."""
    conditioning = flow.condition(teacher, latent)
    velocity = teacher.velocity(x, t, conditioning, sigma)
    guess = x - t * velocity
    for next_t in (time for time in TRAJECTORY if time < t):
        x = x + (next_t - t) * velocity
        t = next_t
        if t > 0:
            velocity = teacher.velocity(x, t, conditioning, sigma)
    return guess, x


def _bin(residual: Tensor) -> Tensor:
    """Where residuals lie among the points of the gain, 0 to BINS - 1."""
    return ((residual / LEAST).log() / math.log(MOST / LEAST)).clamp(0, 1) * (BINS - 1)


def _gradient_energy(image: Tensor) -> Tensor:
    """Mean square of the differences to the right and below at every pixel of pictures [B, 3, H, W], [B, H, W]."""
    down, right = (F.pad(image.diff(dim=axis).square(), pad) for axis, pad in ((2, (0, 0, 0, 1)), (3, (0, 1))))
    return (down + right).mean(dim=1) / 2
