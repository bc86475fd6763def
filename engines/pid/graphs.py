"""The two graphs of a decode. PyTorch executes them as they are; for TensorRT they are exported and compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engines.pid.fold import FoldedDecoder
from engines.pid.network import Conditioning
from engines.pid.sampler import STEP_TRANSITIONS, advance
from engines.size import Size

# Names of the inputs and outputs. Adapter tokens are numbered by injection; those of the pixel blocks come last.
LATENT, CAPTION = "latent", "caption"
X, SIGMA, STEP_INDEX, NOISE, CAPTION_TOKENS = "x", "sigma", "step_index", "noise", "caption_tokens"
NEXT_X = "next_x"


def token_names(count: int) -> tuple[str, ...]:
    """Return the tensor names of `count` sets of adapter tokens."""
    return tuple(f"tokens_{i}" for i in range(count))


class ConditionGraph(nn.Module):
    """Graph that runs once per image and computes what all its steps share."""

    def __init__(self, decoder: FoldedDecoder, size: Size) -> None:
        super().__init__()
        self.decoder, self.size = decoder, size

    def forward(self, latent: Tensor, caption: Tensor) -> tuple[Tensor, ...]:
        """Condition on a latent and a caption.

        Args:
            latent: [1, c, h, w] float32.
            caption: [1, T, E] float32.

        Returns:
            Caption tokens [1, T, D], then `PidConfig.token_sets` sets of adapter tokens [1, L, D], in the dtype of
            the network.
        """
        conditioning = self.decoder.condition(latent, caption, self.size)
        pixel = () if conditioning.pixel is None else (conditioning.pixel,)
        return (conditioning.caption, *conditioning.adapter, *pixel)


class StepGraph(nn.Module):
    """Graph that runs once per step: computes the velocity and applies the sampler's update, in float32."""

    transitions: Tensor  # [N, 2] float32: t, next t
    rows: Tensor  # [N]: row of t in the folded tables

    def __init__(self, decoder: FoldedDecoder, size: Size) -> None:
        super().__init__()
        self.decoder, self.size = decoder, size
        device = decoder.y_pos_embedding.device
        self.register_buffer("transitions", torch.tensor(STEP_TRANSITIONS, device=device), persistent=False)
        rows = [decoder.row(t) for t, _ in STEP_TRANSITIONS]
        self.register_buffer("rows", torch.tensor(rows, device=device), persistent=False)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        step_index: Tensor,
        noise: Tensor,
        caption_tokens: Tensor,
        tokens: Sequence[Tensor],
    ) -> Tensor:
        """Run one step; samples of a batch may be at different steps.

        Args:
            x: [B, 3, H, W] float32.
            sigma: [B] float32.
            step_index: [B] int64, rows of `sampler.STEP_TRANSITIONS`.
            noise: [B, 3, H, W] float32. Must be finite even for a step to t = 0, which multiplies it by 0.
            caption_tokens: [B, T, D], from the condition graph.
            tokens: Each [B, L, D], from the condition graph.

        Returns:
            The next x.
        """
        count = self.decoder.config.injections
        pixel = tokens[count] if self.decoder.config.pixel_injection else None
        conditioning = Conditioning(self.size, tokens[:count], pixel, caption_tokens)
        velocity = self.decoder.velocity_at(x, self.rows.index_select(0, step_index), conditioning, sigma)
        t, next_t = self.transitions.index_select(0, step_index).view(-1, 2, 1, 1, 1).unbind(1)
        return advance(x, velocity, t, next_t, noise)
