"""Conversion of ComfyUI's latents to those that a decoder expects."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pid_client import DecoderInfo, ServerInfo
from pid_client.frames import drop_frame, normalise, vp_from_euler
from pid_client.server_info import LatentSpace
from pid_client.tensors import to_tensor

_IDENTICAL = ("flux2",)  # spaces whose latents ComfyUI keeps in the form that the decoder expects


def choose_decoder(samples: torch.Tensor, info: ServerInfo, name: str) -> DecoderInfo:
    """Return the decoder of a server with this name, or the only one that supports the shape of the latents.

    Args:
        samples: Latents as for `decoder_input`.
        info: Description of the server.
        name: Name of the decoder. If it is empty, the only decoder of the server is returned whatever the shape is,
            because `decoder_input` or the server then reports what is wrong with it.

    Raises:
        ValueError: no decoder, or none alone, is suitable.
    """
    if name or len(info.decoders) == 1:
        return info.decoder(name or None)
    channels, cells = samples.shape[1], (samples.shape[-2], samples.shape[-1])
    found = [
        decoder
        for decoder in info.decoders
        if decoder.latent_space.channels == channels and _may_support(decoder, cells)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(decoder.name for decoder in found)
        raise ValueError(f"The server has several decoders for latents of this shape; set decoder to one of {names}.")
    names = ", ".join(f"{decoder.name} ({decoder.latent_space.name})" for decoder in info.decoders)
    raise ValueError(
        f"No decoder of the server supports latents of {channels} channels and {cells[1]} x {cells[0]} cells; its "
        f"decoders are {names}."
    )


def _may_support(decoder: DecoderInfo, cells: tuple[int, int]) -> bool:
    """Return whether latents of this size are decoded as a whole, or may be decoded in tiles."""
    if cells in [size.latent for size in decoder.sizes]:
        return True
    output, latent = decoder.sizes[0]
    side = output[0] // latent[0]  # output pixels along one side of a cell
    limit = decoder.document["max_pixels"]
    return limit is not None and cells[0] * cells[1] * side**2 <= limit


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
        space: Latent space of the decoder.

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
