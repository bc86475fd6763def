"""Shapes of latents and captions that a decoder supports."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engines.size import Size
from server.body.quoting import one_of, quote
from server.body.tensors import RawTensor, check_rank, invalid
from server.request import DecoderLimits


def check_latent(shape: Sequence[int], limits: DecoderLimits) -> tuple[int, int, int, int]:
    """Return the shape of a latent with its batch dimension, [B, c, h, w].

    Raises:
        InvalidLatentError: this decoder does not support it.
    """
    check_rank("latent", shape)
    batch, channels, height, width = shape if len(shape) == 4 else (1, *shape)
    if channels != limits.channels:
        layout = f"[{limits.channels}, h, w] or [batch, {limits.channels}, h, w]"
        raise invalid("latent", f"has {quote(channels)} channels; this decoder needs {limits.channels}, as {layout}")
    if not 1 <= batch <= limits.max_images:
        raise invalid("latent", f"is a batch of {quote(batch)}; send 1 to {limits.max_images} per request")
    if (height, width) not in limits.latent_sizes:
        nearest = _nearest_sizes(height, width, limits)
        raise invalid(
            "latent", f"has height {quote(height)} and width {quote(width)}; the nearest supported sizes are {nearest}"
        )
    return batch, channels, height, width


def read_latents(raw: RawTensor, limits: DecoderLimits) -> torch.Tensor:
    """Return the latents [B, c, h, w] float32 if this decoder supports their shape."""
    shape = check_latent(raw.shape, limits)
    return raw.to_float32().reshape(shape)  # [B, c, h, w]


def read_captions(raw: RawTensor, batch: int, limits: DecoderLimits) -> torch.Tensor:
    """Return the captions [B, T, E] float32, a single one expanded to the batch, if this decoder supports them."""
    if limits.caption_tokens == 0:
        raise invalid("caption", "is not supported by this decoder; omit it")
    *batches, tokens, width = raw.shape
    if batches not in ([], [batch]):
        advice = f"send {batch}, one per latent, or one without a batch dimension for all"
        raise invalid("caption", f"is a batch of {quote(batches[0])}; {advice}")
    if (tokens, width) != (limits.caption_tokens, limits.caption_width):
        needed = f"exactly {limits.caption_tokens} tokens, padding included, of width {limits.caption_width}"
        raise invalid("caption", f"has {quote(tokens)} tokens of width {quote(width)}; this decoder needs {needed}")
    return raw.to_float32().expand(batch, -1, -1)  # [B, T, E]


def _nearest_sizes(height: int, width: int, limits: DecoderLimits) -> str:
    """List the up to three supported latent sizes that are closest to a height and width."""
    by_distance = sorted(limits.latent_sizes, key=lambda size: abs(size.height - height) + abs(size.width - width))
    scale = limits.pixels_per_cell
    return one_of(f"{size} (for {Size(size.height * scale, size.width * scale)} pixels)" for size in by_distance[:3])
