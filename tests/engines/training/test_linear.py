"""The closed-form linear decoder minimises its objective."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from engines.size import Size
from engines.training import linear

BATCHES, CROP = 4, Size(128, 128)


def test_the_fit_minimises_errors_and_their_steps_across_patch_borders(smooth_photos: list[np.ndarray]) -> None:
    """The objective is written in terms of images here, not of normal equations."""
    solution = linear.BorderAwareFit(smooth_photos, np.random.default_rng(0), BATCHES, CROP).solve()

    def slope(point: torch.Tensor) -> float:
        point.requires_grad_()
        random, total = np.random.default_rng(0), torch.zeros(())
        for _ in range(BATCHES):
            cells, patches = linear.weighted_examples(smooth_photos, random, CROP)
            error = F.pixel_shuffle((patches - cells @ point).permute(2, 3, 0, 1), 16)
            framed = F.pad(error, (1, 1, 1, 1))  # beyond the image there is no error
            steps = framed.diff(dim=2)[:, :, ::16], framed.diff(dim=3)[..., ::16]
            total = total + error.square().sum() + linear.BORDER_WEIGHT * sum(step.square().sum() for step in steps)
        return torch.autograd.grad(total, point)[0].norm().item()

    assert slope(solution) < 0.01 * slope(torch.zeros_like(solution))
