"""The PiD network: encodes latent and caption once, then predicts a velocity from noisy pixels in each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.errors import InputError
from engines.pid.adapter import Adapter, SigmaGate
from engines.pid.blocks import PatchBlock, PixelBlock, RMSNorm
from engines.pid.chunks import chunk_length, in_chunks
from engines.pid.config import PATCH, PATCH_PIXELS, PidConfig
from engines.pid.positions import Geometry, PixelPositions, Rotary, caption_rotary, make_geometry, pixel_positions
from engines.size import Size

# Bytes that one chunk of tokens may need in the pixel blocks: 1024 tokens of a released decoder in bfloat16. Each chunk
# reads the weights again, and this is less than the patch blocks need for an image of 2048x2048.
PIXEL_MEMORY_BUDGET = 160 * 2**20


@dataclass(frozen=True)
class Conditioning:
    """Encoded latent and caption of a batch and their positions, shared by all its steps."""

    adapter: Sequence[Tensor]  # one [B, R, C, D] per injection
    pixel: Tensor | None  # [B, R, C, D] for the pixel blocks (v1.5)
    caption: Tensor  # [B, T, D]
    geometry: Geometry
    caption_rotary: Rotary  # [T, d/2]

    @property
    def size(self) -> Size:
        """Output size in pixels."""
        return Size(len(self.geometry.row_positions), len(self.geometry.column_positions))


class Embedder(nn.Module):
    """Linear projection, with an optional norm."""

    def __init__(self, inputs: int, width: int, norm: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, width)
        self.norm = RMSNorm(width) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., width]."""
        x = self.proj(x)
        return x if self.norm is None else self.norm(x)


class TimeEmbedder(nn.Module):
    """Sinusoidal embedding of the timestep, followed by a small MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed t [B] float32, in 0..1, as [B, 1, D]."""
        frequencies = torch.exp(-math.log(10) / 128 * torch.arange(128, device=t.device, dtype=torch.float32))
        angles = 1000 * t[:, None, None] * frequencies  # [B, 1, 128]
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(next(self.mlp.parameters()).dtype))


class PixelEmbedder(nn.Module):
    """Linear projection of the pixels' colours, plus their positions.

    With three inputs, a matrix product would be a poor fit for matrix kernels, and its output would be written and read
    again to add the positions. As sums of elementwise products, a compiler fuses everything into one kernel.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(3, channels)

    def forward(self, patches: Tensor, positions: PixelPositions) -> Tensor:
        """Map patches [B, L, 3·256] to pixels [B, L, 256, C]."""
        colours = patches.unflatten(2, (3, PATCH_PIXELS, 1)).unbind(2)  # each [B, L, 256, 1]
        pixels = pixel_positions(positions, patches.dtype) + self.proj.bias  # [L, 256, C]
        for colour, weight in zip(colours, self.proj.weight.unbind(1), strict=True):
            pixels = torch.addcmul(pixels, colour, weight)
        return pixels


class FinalLayer(nn.Module):
    """Norm and projection of the pixel features to RGB; without a matrix product, as in `PixelEmbedder`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.linear = nn.Linear(channels, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [B, L, 256, C] to patches [B, L, 3·256], summing in float32."""
        normed = self.norm(pixels).float()
        weight, bias = self.linear.weight.float(), self.linear.bias.float()
        # Cast before the concatenation: Inductor then writes the colours directly into its result.
        colours = [((normed * weight[i]).sum(-1) + bias[i]).to(pixels.dtype) for i in range(3)]  # each [B, L, 256]
        return torch.cat(colours, dim=-1)


class Network(nn.Module):
    """Base of `PidDecoder`, whose blocks are live (see `blocks`), and of `FoldedDecoder`, whose blocks are folded."""

    def __init__(self, config: PidConfig, live: bool) -> None:
        super().__init__()
        self.config = config
        self.pixel_memory_budget = PIXEL_MEMORY_BUDGET
        self.pixel_chunks: int | None = None  # chunks that the pixel blocks run in; None: as the budget requires
        width = config.hidden_size
        last = config.patch_depth - 1
        self.s_embedder = Embedder(3 * PATCH_PIXELS, width)
        self.y_embedder = Embedder(config.caption_width, width, norm=True)
        self.y_pos_embedding = nn.Parameter(torch.zeros(1, config.caption_tokens, width))
        self.pixel_embedder = PixelEmbedder(config.pixel_channels)
        self.patch_blocks = nn.ModuleList(
            PatchBlock(config, live, caption_output=live or i != last) for i in range(config.patch_depth)
        )
        self.pixel_blocks = nn.ModuleList(PixelBlock(config, live) for _ in range(config.pixel_depth))
        self.final_layer = FinalLayer(config.pixel_channels)
        self.lq_proj = Adapter(config)
        self.pit_lq_gate = SigmaGate(config) if config.pixel_injection else None
        self._geometries: dict[tuple[Size, torch.device], Geometry] = {}
        self._caption_rotary: dict[tuple[int, torch.device], Rotary] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters that are not quantised."""
        return self.y_pos_embedding.dtype

    def condition(self, latent: Tensor, caption: Tensor, size: Size) -> Conditioning:
        """Compute adapter and caption tokens, which do not depend on the step.

        Args:
            latent: [B, c, h, w] of any float dtype, normalised as in the diffusion model.
            caption: [B, T, E] of any float dtype; T is at most the configured length.
            size: Output size in pixels.

        Raises:
            InputError: The shape of the latent or the caption does not match.
            ConfigError: `size` is not a multiple of the cell size.
        """
        config = self.config
        expected = (config.latent_channels, *config.latent_size(size))
        if latent.ndim != 4 or tuple(latent.shape[1:]) != expected:
            raise InputError(
                f"An output of {size} requires latents of shape {expected}, got {tuple(latent.shape[1:])}."
            )
        tokens = caption.shape[1] if caption.ndim == 3 else 0
        if caption.ndim != 3 or caption.shape[2] != config.caption_width or not 1 <= tokens <= config.caption_tokens:
            raise InputError(
                f"The caption must have shape [B, 1..{config.caption_tokens}, {config.caption_width}], "
                f"got {list(caption.shape)}."
            )
        adapter, pixel, y = self.encode(latent, caption)
        geometry, rotary = self.geometry(size, latent.device), self.caption_rotary(tokens, latent.device)
        return Conditioning(adapter, pixel, y, geometry, rotary)

    def encode(self, latent: Tensor, caption: Tensor) -> tuple[Sequence[Tensor], Tensor | None, Tensor]:
        """Compute `Conditioning.adapter`, `pixel` and `caption` without checking shapes, which exported graphs vary."""
        y = self.y_embedder(caption.to(self.dtype)) + self.y_pos_embedding[:, : caption.shape[1]]
        return *self.lq_proj(latent.to(self.dtype)), y

    def geometry(self, size: Size, device: torch.device) -> Geometry:
        """Return the position tables of an output size. They are cached: a decoder has few sizes."""
        key = (size, device)
        if key not in self._geometries:
            self._geometries[key] = make_geometry(self.config, size, device)
        return self._geometries[key]

    def caption_rotary(self, tokens: int, device: torch.device) -> Rotary:
        """Return the rotary tables of captions with this number of tokens. They are cached."""
        key = (tokens, device)
        if key not in self._caption_rotary:
            self._caption_rotary[key] = caption_rotary(tokens, self.config.head_width, device)
        return self._caption_rotary[key]

    def chunk_tokens(self, batch: int, tokens: int) -> int:
        """Return how many of an image's tokens the `pixel_memory_budget` allows at a time; see `chunk_length`."""
        values = PATCH_PIXELS * self.config.pixel_channels
        # Peak, after the attention: four modulations, two inner widths of the MLP, pixels in and out; float32 norms.
        per_token = values * (16 * self.dtype.itemsize + 8)
        return chunk_length(tokens, max(1, self.pixel_memory_budget // (per_token * batch)))

    def denoise(
        self,
        x: Tensor,
        conditioning: Conditioning,
        sigma: Tensor,
        e: Tensor,
        modulation_x: Sequence[Tensor],
        modulation_y: Sequence[Tensor],
    ) -> Tensor:
        """Predict the velocity of noisy pixels.

        Args:
            x: Noisy pixels [B, 3, H, W] float32.
            conditioning: Result of `condition`.
            sigma: Noise level of the latents, [B] float32.
            e: Time embedding [B, 1, D].
            modulation_x: One modulation [B, 1, 6D] of the image stream per patch block.
            modulation_y: The same for the caption stream.

        Returns:
            Velocity [B, 3, H, W] float32.
        """
        y, geometry = conditioning.caption, conditioning.geometry
        image, caption = geometry.image, conditioning.caption_rotary
        patches = F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2).to(self.dtype)  # [B, L, 3·256]
        tokens = self.s_embedder(patches)  # [B, L, D]
        for i, block in enumerate(self.patch_blocks):
            injection, offset = divmod(i, self.config.injection_interval)
            if offset == 0:
                gate = self.lq_proj.gate_modules[injection]
                tokens = gate(tokens, conditioning.adapter[injection].flatten(1, 2), sigma)
            tokens, y = block(tokens, y, modulation_x[i], modulation_y[i], image, caption)
        s = F.silu(e + tokens)
        if self.pit_lq_gate is not None:
            assert conditioning.pixel is not None  # noqa: S101  condition() always sets it if the gate exists
            s = self.pit_lq_gate(s, conditioning.pixel.flatten(1, 2), sigma)
        pixels = self.pixel_embedder(patches, geometry.pixels)  # [B, L, 256, C]
        del patches, tokens  # the attention of the pixel blocks needs much memory
        chunks = self.pixel_chunks
        if chunks is None:
            batch, length = pixels.shape[:2]
            chunks = -(-length // self.chunk_tokens(batch, length))
        for block in self.pixel_blocks:
            pixels = block(pixels, s, geometry.pixel_tokens, chunks)
        rgb = in_chunks(self.final_layer, chunks, pixels)  # [B, L, 3·256]
        return F.pixel_shuffle(rgb.transpose(1, 2).unflatten(2, geometry.grid).float(), PATCH)


def batch_vector(value: Tensor | float, batch: int, device: torch.device) -> Tensor:
    """Expand a float, or one float per image, to [B] float32."""
    return torch.as_tensor(value, dtype=torch.float32, device=device).expand(batch)


class PidDecoder(Network):
    """The network as released: `state_dict` has the published keys, and modulations are computed from t."""

    def __init__(self, config: PidConfig) -> None:
        super().__init__(config, live=True)
        self.t_embedder = TimeEmbedder(config.hidden_size)

    def velocity(self, x: Tensor, t: Tensor | float, conditioning: Conditioning, sigma: Tensor | float) -> Tensor:
        """Predict the velocity v(x_t, t).

        Args:
            x: Noisy pixels [B, 3, H, W].
            t: Timestep in 0..1, a float or [B].
            conditioning: Result of `condition`.
            sigma: Noise level of the latents in 0..1, a float or [B].

        Returns:
            Velocity [B, 3, H, W] float32.
        """
        batch = x.shape[0]
        e = self.t_embedder(batch_vector(t, batch, x.device))
        modulation_x, modulation_y = self.modulations(e)
        return self.denoise(x, conditioning, batch_vector(sigma, batch, x.device), e, modulation_x, modulation_y)

    def modulations(self, e: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the modulations [B, 1, 6D] of all patch blocks from e [B, 1, D]: image stream, caption stream."""
        c = F.silu(e)
        blocks = [block for block in self.patch_blocks if isinstance(block, PatchBlock)]
        return [b.adaLN_modulation_img(c) for b in blocks], [b.adaLN_modulation_txt(c) for b in blocks]
