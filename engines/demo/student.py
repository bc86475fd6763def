"""The student: the teacher distilled to the sampler's few steps by distribution matching (DMD2, arXiv 2405.14867)."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.demo import dct, flow
from engines.demo.critic import Critic, paired_loss
from engines.demo.flow import expected_error
from engines.demo.learner import Learner
from engines.pid import PidDecoder, sample
from engines.pid.config import PATCH
from engines.pid.sampler import advance, step_times

LEARNING_RATE, FAKE_RATE, CRITIC_RATE = 2.5e-5, 1e-4, 4e-4
BETAS = (0.5, 0.98)
STEPS, STEPS_ODDS = (4, 2, 1), (0.7, 0.2, 0.1)  # the samplers that the student is trained in
CROPS = 2
MATCHING, ANCHOR, CRITIC = 1.0, 0.1, 5.0  # weights of the three terms
BORDER_WEIGHT = 5.0  # in the anchor: of differences across the borders of patches
LATENT_WEIGHT = 10.0  # in the anchor: of the low-resolution picture, which the latent does tell


class Student:
    """Learns from three sides what a picture looks like, each a gradient on the pixels that it decodes.

    Matching: two networks look at the decoded picture with noise on it, the frozen teacher, which knows photographs,
    and one that keeps learning what the student makes; the picture moves from the one's guess to the other's. Anchor:
    the photograph itself, for what the latent does tell. Critic: what the teacher is too small to know.
    """

    save_every = 75
    crops = CROPS

    def __init__(self, teacher: PidDecoder, title: str = "student") -> None:
        self.title = title
        self.teacher = teacher.requires_grad_(False)
        self.learner = Learner(copy.deepcopy(teacher).requires_grad_(True), LEARNING_RATE, BETAS)
        self.fake = Learner(copy.deepcopy(teacher).requires_grad_(True), FAKE_RATE, BETAS)
        self.critic = Learner(Critic().to(next(teacher.parameters()).device), CRITIC_RATE, (0.0, 0.9))

    @property
    def average(self) -> PidDecoder:
        return self.learner.average

    def step(self, image: Tensor, factor: float) -> dict[str, float]:
        """One update of student, fake score and critic on pictures [B, 3, H, W]; the losses by name."""
        latent, sigma = flow.noised(dct.encode(dct.downscale(image)))
        decoded = self._decode(latent, sigma)
        pixels = decoded.detach().requires_grad_()
        matching, fake_loss = self._match(decoded.detach(), latent, sigma, factor)
        critic = self.critic.network
        real = critic(image)
        anchor = anchor_loss(pixels - image, sigma)
        looks = paired_loss(critic(pixels), real.detach())
        looking = torch.autograd.grad(looks, pixels)[0]
        pulls = {
            "matching": MATCHING / matching.numel() * detail_only(matching),
            "anchor": ANCHOR * torch.autograd.grad(anchor, pixels)[0],
            "critic": CRITIC / pixels.numel() * detail_only(looking / looking.abs().mean()),
        }
        total = sum(pulls.values(), torch.zeros_like(pixels))
        self.learner.descend((decoded * total).sum(), factor)  # a sum whose gradient on the pixels is the total
        critic_loss = paired_loss(real, critic(decoded.detach()))
        self.critic.descend(critic_loss, factor)
        sizes = {f"pull of {name}": pull.abs().mean().item() * pull.numel() for name, pull in pulls.items()}
        return {"anchor": anchor.item(), "fake score": fake_loss, "critic": critic_loss.item(), **sizes}

    def _decode(self, latent: Tensor, sigma: Tensor) -> Tensor:
        """x0 [B, 3, H, W] from one random step of one of the samplers, its start made by the steps before it."""
        steps = STEPS[int(torch.multinomial(torch.tensor(STEPS_ODDS), 1))]
        wanted = int(torch.randint(steps, ()))
        decoder = self.learner.network
        conditioning = flow.condition(decoder, latent)
        height, width = conditioning.size
        x = torch.randn(len(latent), 3, height, width, device=latent.device)
        times = list(pairwise(step_times(steps)))
        with torch.no_grad():
            for t, next_t in times[:wanted]:
                x = advance(x, decoder.velocity(x, t, conditioning, sigma), t, next_t, torch.randn_like(x))
        t = times[wanted][0]
        return advance(x, decoder.velocity(x, t, conditioning, sigma), t, 0.0, None)

    def _match(self, decoded: Tensor, latent: Tensor, sigma: Tensor, factor: float) -> tuple[Tensor, float]:
        """The gradient of matching on decoded pictures, about 1 a pixel; trains the fake score on the way."""
        t, noise = flow.random_times(len(decoded), decoded.device), torch.randn_like(decoded)
        x = flow.diffuse(decoded, t, noise)
        fake = self.fake.network.velocity(x, t, flow.condition(self.fake.network, latent), sigma)
        with torch.no_grad():
            real = self.teacher.velocity(x, t, flow.condition(self.teacher, latent), sigma)
            scale = t.view(-1, 1, 1, 1)  # x0 = x − t·v: the difference of two guesses is t times that of velocities
            gap = (x - scale * real - decoded).abs().mean(dim=(1, 2, 3), keepdim=True)
            gradient = scale * (real - fake) / gap
        loss = flow.velocity_loss(fake - (noise - decoded), t, sigma)
        self.fake.descend(loss, factor)
        return gradient, loss.item()

    @torch.no_grad()
    def decode(self, latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """What the server will make of it, in four steps."""
        later = [torch.randn_like(noise) for _ in range(3)]
        return sample(self.average, flow.condition(self.average, latent), noise, sigma, later)

    def state_dict(self) -> dict[str, Any]:
        return {part: getattr(self, part).state_dict() for part in ("learner", "fake", "critic")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in ("learner", "fake", "critic"):
            getattr(self, part).load_state_dict(state[part])


def anchor_loss(error: Tensor, sigma: Tensor) -> Tensor:
    """Squared errors of pictures [B, 3, H, W]: of pixels, of what the latent tells and across patches' borders.

    Not of differences within a patch: those would forbid every detail that is not the photograph's own.
    """
    total = flow.picture_error(error, 0.0, BORDER_WEIGHT)
    total = total + LATENT_WEIGHT * dct.downscale(error).square().mean(dim=(1, 2, 3))
    return (total / expected_error(torch.ones_like(sigma), sigma)).mean()


def detail_only(pull: Tensor) -> Tensor:
    """A gradient on pictures [B, 3, H, W] less its part in the low-resolution picture and what all patches share.

    The one is told by the latent and the anchor's alone. The other would soon be a pattern in all patches, and a grid.
    """
    pull = pull - F.interpolate(dct.downscale(pull), scale_factor=dct.UPSCALE, mode="nearest")
    patches = F.pixel_unshuffle(pull, PATCH)  # [B, 3·256, h, w]
    return F.pixel_shuffle(patches - patches.mean(dim=(0, 2, 3), keepdim=True), PATCH)
