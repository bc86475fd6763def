"""The two graphs of a decode, the same for every runtime: what PyTorch executes is what gets exported and compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engines.pid.fold import FoldedDecoder
from engines.pid.network import Conditioning
from engines.pid.sampler import STEP_TRANSITIONS, advance
from engines.size import Size

# Names of the graphs' inputs and outputs; an injection's tokens are numbered, those of the pixel blocks come last.
LATENT, CAPTION = "latent", "caption"
X, SIGMA, STEP_INDEX, NOISE, CAPTION_TOKENS = "x", "sigma", "step_index", "noise", "caption_tokens"
NEXT_X = "next_x"


def token_names(count: int) -> tuple[str, ...]:
    return tuple(f"tokens_{i}" for i in range(count))


class ConditionGraph(nn.Module):
    """Once an image: latent [1, c, h, w] and caption [1, T, E], float32 -> all that its steps share."""

    def __init__(self, decoder: FoldedDecoder, size: Size) -> None:
        super().__init__()
        self.decoder, self.size = decoder, size

    def forward(self, latent: Tensor, caption: Tensor) -> tuple[Tensor, ...]:
        """Caption tokens [1, T, D], then `PidConfig.token_sets` adapter tokens [1, L, D], in the network's dtype."""
        conditioning = self.decoder.condition(latent, caption, self.size)
        pixel = () if conditioning.pixel is None else (conditioning.pixel,)
        return (conditioning.caption, *conditioning.adapter, *pixel)


class StepGraph(nn.Module):
    """Each step: the velocity and the sampler's update, in float32."""

    times: Tensor  # [transitions, 2] float32: t, next t
    rows: Tensor  # [transitions]: the row of the folded tables that t has

    def __init__(self, decoder: FoldedDecoder, size: Size) -> None:
        super().__init__()
        self.decoder, self.size = decoder, size
        device = decoder.y_pos_embedding.device
        self.register_buffer("times", torch.tensor(STEP_TRANSITIONS, device=device), persistent=False)
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
        """x and noise [B, 3, H, W] float32, sigma [B] float32, step_index [B] int64 (rows of
        `sampler.STEP_TRANSITIONS`).

        caption_tokens [B, T, D] and tokens, each [B, L, D], are the condition graph's. Returns the next x. The noise
        must be finite, though a step to t = 0 adds none of it.
        """
        count = self.decoder.config.injections
        pixel = tokens[count] if self.decoder.config.pixel_injection else None
        conditioning = Conditioning(self.size, tokens[:count], pixel, caption_tokens)
        velocity = self.decoder.velocity_at(x, self.rows.index_select(0, step_index), conditioning, sigma)
        t, next_t = self.times.index_select(0, step_index).view(-1, 2, 1, 1, 1).unbind(1)
        return advance(x, velocity, t, next_t, noise)
