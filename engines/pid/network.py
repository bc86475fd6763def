"""The PiD network: a latent and a caption to a conditioning, once; noisy pixels and that to a velocity, each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.errors import InputError
from engines.pid.adapter import Adapter, SigmaGate
from engines.pid.blocks import PatchBlock, PixelBlock, RMSNorm, in_chunks
from engines.pid.config import PATCH, PATCH_PIXELS, PidConfig
from engines.pid.positions import Geometry
from engines.size import Size

PIXEL_MEMORY_BUDGET = 128 * 2**20  # bytes that one chunk of the pixel blocks may take


@dataclass(frozen=True)
class Conditioning:
    """What all steps of a batch share."""

    size: Size
    adapter: Sequence[Tensor]  # one [B, L, D] per injection
    pixel: Tensor | None  # [B, L, D] for the pixel blocks (v1.5)
    caption: Tensor  # [B, T, D]


class Embedder(nn.Module):
    def __init__(self, inputs: int, width: int, norm: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, width)
        self.norm = RMSNorm(width) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x if self.norm is None else self.norm(x)


class TimeEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t [B] float32 in 0..1 -> [B, 1, D]."""
        frequencies = torch.exp(-math.log(10) / 128 * torch.arange(128, device=t.device, dtype=torch.float32))
        angles = 1000 * t[:, None, None] * frequencies  # [B, 1, 128]
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(next(self.mlp.parameters()).dtype))


class FinalLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.linear = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class Network(nn.Module):
    """Everything but where the time modulations come from; `live` and folded decoders differ only in that."""

    def __init__(self, config: PidConfig, live: bool) -> None:
        super().__init__()
        self.config = config
        self.pixel_memory_budget = PIXEL_MEMORY_BUDGET
        self.pixel_chunk: int | None = None  # tokens in a chunk of the pixel blocks; None: by the budget
        width = config.hidden_size
        last = config.patch_depth - 1
        self.s_embedder = Embedder(3 * PATCH_PIXELS, width)
        self.y_embedder = Embedder(config.caption_width, width, norm=True)
        self.y_pos_embedding = nn.Parameter(torch.zeros(1, config.caption_tokens, width))
        self.pixel_embedder = Embedder(3, config.pixel_channels)
        self.patch_blocks = nn.ModuleList(
            PatchBlock(config, live, caption_output=live or i != last) for i in range(config.patch_depth)
        )
        self.pixel_blocks = nn.ModuleList(PixelBlock(config, live) for _ in range(config.pixel_depth))
        self.final_layer = FinalLayer(config.pixel_channels)
        self.lq_proj = Adapter(config)
        self.pit_lq_gate = SigmaGate(config) if config.pixel_injection else None
        self._geometries: dict[tuple[Size, int, torch.device], Geometry] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self.y_pos_embedding.dtype

    def condition(self, latent: Tensor, caption: Tensor, size: Size) -> Conditioning:
        """Adapter and caption tokens: all that does not depend on the step.

        latent [B, c, h, w], normalised as the diffusion model has it; caption [B, T, E], T at most the configured
        length; size (H, W) is the output in pixels. Any float dtype. Raises InputError on shapes that do not fit.
        """
        config = self.config
        expected = (config.latent_channels, *config.latent_size(size))
        if latent.ndim != 4 or tuple(latent.shape[1:]) != expected:
            raise InputError(f"A {size} output takes latents {expected}, got {tuple(latent.shape[1:])}.")
        tokens = caption.shape[1] if caption.ndim == 3 else 0
        if caption.ndim != 3 or caption.shape[2] != config.caption_width or not 1 <= tokens <= config.caption_tokens:
            raise InputError(
                f"A caption has shape [B, 1..{config.caption_tokens}, {config.caption_width}], "
                f"got {list(caption.shape)}."
            )
        y = self.y_embedder(caption.to(self.dtype)) + self.y_pos_embedding[:, :tokens]
        injections, pixel = self.lq_proj(latent.to(self.dtype))
        return Conditioning(size, injections, pixel, y)

    def geometry(self, size: Size, caption_tokens: int, device: torch.device) -> Geometry:
        """Position tables, made once per size; sizes are few, so they are all kept."""
        key = (size, caption_tokens, device)
        if key not in self._geometries:
            self._geometries[key] = Geometry(self.config, size, caption_tokens, device)
        return self._geometries[key]

    def chunk_tokens(self, batch: int) -> int:
        """Tokens that the pixel blocks take at once: `pixel_chunk`, or as many as `pixel_memory_budget` allows."""
        if self.pixel_chunk is not None:
            return self.pixel_chunk
        values = PATCH_PIXELS * self.config.pixel_channels
        # After the attention: four modulations, two inner widths of the MLP, pixels before and after; float32 norms.
        per_token = values * (16 * self.dtype.itemsize + 8)
        return max(1, self.pixel_memory_budget // (per_token * batch))

    def denoise(
        self,
        x: Tensor,
        conditioning: Conditioning,
        sigma: Tensor,
        e: Tensor,
        modulation_x: Sequence[Tensor],
        modulation_y: Sequence[Tensor],
    ) -> Tensor:
        """Velocity [B, 3, H, W] float32, given the time embedding e [B, 1, D] and a modulation [B, 1, 6D] per block."""
        size, y = conditioning.size, conditioning.caption
        geometry = self.geometry(size, y.shape[1], x.device)
        patches = F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2).to(self.dtype)  # [B, L, 3·256]
        tokens = self.s_embedder(patches)  # [B, L, D]
        for i, block in enumerate(self.patch_blocks):
            injection, offset = divmod(i, self.config.injection_interval)
            if offset == 0:
                gate = self.lq_proj.gate_modules[injection]
                tokens = gate(tokens, conditioning.adapter[injection], sigma)
            tokens, y = block(tokens, y, modulation_x[i], modulation_y[i], geometry)
        s = F.silu(e + tokens)
        if self.pit_lq_gate is not None:
            assert conditioning.pixel is not None  # noqa: S101  condition() always sets it when the gate exists
            s = self.pit_lq_gate(s, conditioning.pixel, sigma)
        rgb = self._decode_pixels(patches, s, geometry)  # [B, L, 3·256]
        return F.pixel_shuffle(rgb.transpose(1, 2).unflatten(2, geometry.grid).float(), PATCH)

    def _decode_pixels(self, patches: Tensor, s: Tensor, geometry: Geometry) -> Tensor:
        """patches [B, L, 3·256] and their condition s [B, L, D] -> [B, L, 3·256], in chunks of tokens."""
        batch, length, _ = patches.shape
        chunk = self.chunk_tokens(batch)

        def embed(patches: Tensor, positions: Tensor) -> Tensor:
            return self.pixel_embedder(patches.unflatten(2, (3, PATCH_PIXELS)).transpose(2, 3)) + positions

        pieces = [
            embed(piece, geometry.pixels(i * chunk, i * chunk + piece.shape[1], patches.dtype))
            for i, piece in enumerate(patches.split(min(chunk, length), dim=1))
        ]
        pixels = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)  # [B, L, 256, C]
        del pieces
        for block in self.pixel_blocks:
            pixels = block(pixels, s, geometry.pixel_tokens, chunk)
        return in_chunks(lambda piece: self.final_layer(piece).transpose(2, 3).flatten(2), chunk, pixels)


def batch_vector(value: Tensor | float, batch: int, device: torch.device) -> Tensor:
    """A float, or one float an image, as [B] float32."""
    return torch.as_tensor(value, dtype=torch.float32, device=device).expand(batch)


class PidDecoder(Network):
    """The network as released: `state_dict` keys are the published ones, modulations are computed live."""

    def __init__(self, config: PidConfig) -> None:
        super().__init__(config, live=True)
        self.t_embedder = TimeEmbedder(config.hidden_size)

    def velocity(self, x: Tensor, t: Tensor | float, conditioning: Conditioning, sigma: Tensor | float) -> Tensor:
        """v(x_t, t): x [B, 3, H, W]; t and sigma floats or [B], in 0..1 -> [B, 3, H, W] float32."""
        batch = x.shape[0]
        e = self.t_embedder(batch_vector(t, batch, x.device))
        modulation_x, modulation_y = self.modulations(e)
        return self.denoise(x, conditioning, batch_vector(sigma, batch, x.device), e, modulation_x, modulation_y)

    def modulations(self, e: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Time embedding [B, 1, D] -> the modulations [B, 1, 6D] of all patch blocks: image stream, caption stream."""
        c = F.silu(e)
        blocks = [block for block in self.patch_blocks if isinstance(block, PatchBlock)]
        return [b.adaLN_modulation_img(c) for b in blocks], [b.adaLN_modulation_txt(c) for b in blocks]
