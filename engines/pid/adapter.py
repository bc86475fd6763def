"""The adapter, which turns a latent into one set of tokens per injection, and the sigma-aware gates that add them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.pid.config import Padding, PidConfig


class SigmaGate(nn.Module):
    """Sigma-aware gate: x + g·a with g = sigmoid(content_proj([x, a]) − exp(log_alpha)·sigma).

    The noisier the latent, the less it influences the image.
    """

    def __init__(self, config: PidConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.content_proj = nn.Linear(2 * width, width if config.gate_per_channel else 1)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
        """Add adapter tokens a to image tokens x, both [B, L, D], given sigma [B] float32; returns [B, L, D]."""
        weight_x, weight_a = self.content_proj.weight.chunk(2, dim=1)
        content = F.linear(x, weight_x, self.content_proj.bias) + F.linear(a, weight_a)  # [B, L, D or 1]
        noise_level = self.log_alpha.float().exp() * sigma[:, None, None]
        return x + torch.sigmoid(content - noise_level).to(x.dtype) * a


class ResidualBlock(nn.Module):
    """Pre-norm residual block of two 3×3 convolutions with group norm."""

    def __init__(self, width: int, padding: Padding) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, padding_mode=padding),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, padding_mode=padding),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] to the same shape."""
        return x + self.block(x)


class Adapter(nn.Module):
    """Convolutional encoder of the latent, with one output head per injection (ControlNet style)."""

    def __init__(self, config: PidConfig) -> None:
        super().__init__()
        self.unpatchify, self.upsample = config.latent_unpatchify, config.adapter_upsample
        width, padding = config.adapter_width, config.adapter_padding
        channels = config.latent_channels // self.unpatchify**2
        self.latent_proj = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, padding_mode=padding),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, padding_mode=padding),
            *(ResidualBlock(width, padding) for _ in range(config.adapter_depth)),
        )
        self.output_heads = nn.ModuleList(nn.Linear(width, config.hidden_size) for _ in range(config.injections))
        self.gate_modules = nn.ModuleList(SigmaGate(config) for _ in range(config.injections))
        self.pit_head = nn.Linear(width, config.hidden_size) if config.pixel_injection else None

    def forward(self, latent: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Map a latent [B, c, h, w] to tokens [B, R, C, D]: a set per injection, in v1.5 one for the pixel blocks."""
        if self.unpatchify > 1:
            latent = F.pixel_shuffle(latent, self.unpatchify)  # channel = (c, row, column)
        if self.upsample > 1:
            latent = F.interpolate(latent, scale_factor=self.upsample, mode="nearest")
        tokens = self.latent_proj(latent).permute(0, 2, 3, 1)  # [B, R, C, width]
        injections = tuple(head(tokens) for head in self.output_heads)
        return injections, None if self.pit_head is None else self.pit_head(tokens)
