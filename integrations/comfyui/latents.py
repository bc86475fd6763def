"""Conversion of ComfyUI's latents to those that a decoder expects."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pid_client.frames import drop_frame, normalise, vp_from_euler
from pid_client.server_info import LatentSpace
from pid_client.tensors import to_tensor

_IDENTICAL = ("flux2",)  # spaces whose latents ComfyUI keeps in the form that the decoder expects


def decoder_input(
    samples: torch.Tensor, sigma: float, space: LatentSpace
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], float]:
    """Return the latents [B, c, h, w] and the noise level to send to a server.

    If a sampler of ComfyUI ends with the state x, it returns process_out(inverse_noise_scaling(sigma, x)). process_out
    converts to raw latents of the autoencoder. inverse_noise_scaling divides the state of a flow model,
    (1 − sigma) x0 + sigma·ε, by 1 − sigma, and does not change that of SDXL, x0 + sigma·ε. KSampler (Advanced) with
    leftover noise does the same. After a complete run, sigma is 0.

    Args:
        samples: Latents of a LATENT, [B, c, h, w], or [B, c, 1, h, w] for Qwen-Image.
        sigma: The last of the sigmas that the sampler ran on.
        space: Latent space of the server's decoder.

    Raises:
        ValueError: the shape, the noise level or the latent space is not supported.
    """
    latents = drop_frame(samples) if samples.ndim == 5 else samples
    normalised = latents if space.name in _IDENTICAL else normalise(latents, space.name)
    state = to_tensor(normalised).to_float32()
    if space.sigma_frame == "variance-preserving":
        return vp_from_euler(state, sigma)
    if not 0 <= sigma < 1:
        raise ValueError(
            f"sigma is {sigma:g}, but a {space.name} latent has 0 <= sigma < 1 after the first step of a run."
        )
    return state * np.float32(1 - sigma), sigma
