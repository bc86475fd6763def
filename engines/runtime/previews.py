"""Previews: small images of what the decoder predicts after a step, before the decode is complete."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engines.pixels import to_uint8
from engines.runtime.protocol import preview_factor
from engines.size import Size


def preview(x: Tensor, noise: Tensor, next_t: Tensor) -> Tensor:
    """Return the preview of an image after a step, recovered from the result of the step.

    A step to t' computes x' = (1 − t')·x0 + t'·ε from the predicted image x0 and the noise ε, so that
    x0 = (x' − t'·ε) / (1 − t'): the step does not have to return x0. Both x' and ε are scaled down first.

    Args:
        x: Result x' of the step, [1, 3, H, W] float32.
        noise: Noise ε of the step, [1, 3, H, W] float32; any finite values if t' is 0.
        next_t: Timestep t' after the step, [1] float32, below 1.

    Returns:
        Pixels [h, w, 3] uint8 of the size `preview_size`.
    """
    factor = preview_factor(Size(*x.shape[2:]))
    if factor > 1:  # pooling by 1 would be a slow copy
        x, noise = (F.avg_pool2d(image, factor, ceil_mode=True) for image in (x, noise))  # [1, 3, h, w]
    x0 = (x - next_t * noise) / (1 - next_t)
    return to_uint8(x0[0]).permute(1, 2, 0)
