"""Distribution matching with a fake score (DMD2, arXiv 2405.14867)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from engines.pid import PidDecoder
from engines.pid.network import Conditioning
from engines.training import flow
from engines.training.learner import Learner


def fake_score(teacher: PidDecoder) -> PidDecoder:
    """Return a copy of the teacher to train as the fake score; it keeps the teacher's encoding of the latent."""
    network = copy.deepcopy(teacher).requires_grad_(True)
    for encoder in (network.lq_proj.latent_proj, network.lq_proj.output_heads, network.lq_proj.pit_head):
        assert encoder is not None  # noqa: S101  the bundled decoder's configuration has all three
        encoder.requires_grad_(False)
    return network


class DistributionMatching:
    """Pulls decoded images from the distribution of the student towards that of the teacher.

    The teacher's velocity represents the distribution of the photos. A second network, the fake score, learns the
    velocity of the student's images while the student is trained.
    """

    def __init__(self, teacher: PidDecoder, fake: Learner[PidDecoder]) -> None:
        self._teacher, self._fake = teacher, fake

    def step(
        self, decoded: Tensor, conditioning: Conditioning, sigma: Tensor, residual: Tensor
    ) -> tuple[Tensor, float]:
        """Compare both scores on noised images, then train the fake score on them.

        Args:
            decoded: The student's images, [B, 3, H, W]; no gradient flows through them.
            conditioning: The teacher's encoding of the latents.
            sigma: Noise level of each latent, [B].
            residual: Expected error of each pixel, [B, 1, H, W].

        Returns:
            The gradient on `decoded` [B, 3, H, W], in units of √residual and with a mean magnitude of about 1, and the
            loss of the fake score.
        """
        t, noise = flow.random_timesteps(len(decoded), decoded.device), torch.randn_like(decoded)
        x = flow.diffuse(decoded, t, noise)
        fake = self._fake.network.velocity(x, t, conditioning, sigma)
        with torch.no_grad():
            real = self._teacher.velocity(x, t, conditioning, sigma)
            unit = residual.sqrt() / t.view(-1, 1, 1, 1)  # x0 = x − t·v, so estimates of x0 differ by t·(difference)
            gap = ((noise - decoded - real) / unit).abs().mean(dim=(1, 2, 3), keepdim=True)
            gradient = (real - fake) / unit / gap
        loss = flow.velocity_loss(fake - (noise - decoded), t, residual)
        self._fake.update(loss, 1.0)
        return gradient, loss.item()
