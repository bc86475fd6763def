"""The two kinds of transformer block, `PatchBlock` and `PixelBlock`.

Both exist in two forms: *live*, as in the published network, and folded. A live patch block has the layers that compute
its modulation from the timestep; for a folded one the modulation is read from a table. In a folded pixel block the
modulation layer is split in two.

Shapes: B batch, L image tokens, T caption tokens, D hidden size, C channels per pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.pid.config import PATCH_PIXELS, PidConfig
from engines.pid.fp8_attention import Fp8Attention, scale_queries
from engines.pid.positions import Rotary, rotate

_TILE_ROWS = 128  # rows of the tiles in which kernels compute large matrix products


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, x / sqrt(mean(x²) + 1e-6) × weight, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; keeps shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: w2(SiLU(w1 x) · w3 x), without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to the same shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply adaLN modulation: x · (1 + scale) + shift."""
    return x * (1 + scale) + shift


AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # softmax attention over q, k, v [B, heads, N, d]


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: AttentionKernel | None) -> Tensor:
    """Softmax attention over q, k, v [B, N, heads, d] -> [B, N, heads·d]; without a `kernel`, PyTorch chooses one."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if kernel is not None:
        out = kernel(q, k, v)
    elif torch.compiler.is_exporting():  # TensorRT's parser would multiply q and k by a factor, rounded to 16 bits
        out = F.scaled_dot_product_attention(scale_queries(q), k, v, scale=1.0)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


class JointAttention(nn.Module):
    """Attention over the concatenation [caption, image]; each stream has its own projections and per-head norms."""

    kernel: AttentionKernel | None = None
    fp8: Fp8Attention | None

    def __init__(self, config: PidConfig, caption_output: bool) -> None:
        super().__init__()
        self.fp8 = None
        width, head = config.hidden_size, config.head_width
        self.head_width = head
        self.caption_output = caption_output
        self.qkv_x = nn.Linear(width, 3 * width, bias=False)
        self.q_norm_x, self.k_norm_x = RMSNorm(head), RMSNorm(head)
        self.proj_x = nn.Linear(width, width)
        self.k_norm_y = RMSNorm(head)
        # If nothing reads the caption output, only its keys and values are needed.
        self.qkv_y = nn.Linear(width, (3 if caption_output else 2) * width, bias=False)
        if caption_output:
            self.q_norm_y = RMSNorm(head)
            self.proj_y = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, image: Rotary, caption: Rotary) -> tuple[Tensor, Tensor | None]:
        """Attend over image tokens x [B, L, D] and caption tokens y [B, T, D].

        Returns:
            The attention output for x, and that for y, or None without `caption_output`.
        """

        def heads(stream: Tensor) -> tuple[Tensor, ...]:
            return stream.unflatten(-1, (-1, x.shape[-1] // self.head_width, self.head_width)).unbind(2)

        qx, kx, vx = heads(self.qkv_x(x))  # each [B, L, heads, d]
        *qy, ky, vy = heads(self.qkv_y(y))  # each [B, T, heads, d]
        q = rotate(self.q_norm_x(qx), image)
        k = torch.cat((rotate(self.k_norm_y(ky), caption), rotate(self.k_norm_x(kx), image)), dim=1)
        v = torch.cat((vy, vx), dim=1)
        if not self.caption_output:
            return self.proj_x(attend(q, k, v, self.fp8 or self.kernel)), None
        q = torch.cat((rotate(self.q_norm_y(qy[0]), caption), q), dim=1)
        out = attend(q, k, v, self.fp8 or self.kernel)
        length = y.shape[1]  # slices, because Torch-TensorRT cannot split an axis whose length varies
        return self.proj_x(out[:, length:]), self.proj_y(out[:, :length])


class PatchBlock(nn.Module):
    """Joint attention and MLP on the image and caption streams.

    A live block has the layers that compute its modulation from the time embedding. `caption_output` is False only in
    the last block of a folded network, because nothing reads its caption stream.
    """

    def __init__(self, config: PidConfig, live: bool, caption_output: bool = True) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_x1, self.norm_y1 = RMSNorm(width), RMSNorm(width)
        self.attn = JointAttention(config, caption_output)
        self.norm_x2 = RMSNorm(width)
        self.mlp_x = GatedMLP(width, config.mlp_width)
        if caption_output:
            self.norm_y2 = RMSNorm(width)
            self.mlp_y = GatedMLP(width, config.mlp_width)
        if live:
            self.adaLN_modulation_img = nn.Sequential(nn.Linear(width, 6 * width))
            self.adaLN_modulation_txt = nn.Sequential(nn.Linear(width, 6 * width))

    def forward(
        self, x: Tensor, y: Tensor, modulation_x: Tensor, modulation_y: Tensor, image: Rotary, caption: Rotary
    ) -> tuple[Tensor, Tensor]:
        """Transform image tokens x [B, L, D] and caption tokens y [B, T, D].

        Args:
            x: Image tokens.
            y: Caption tokens.
            modulation_x: Modulation of the image stream, [B, 1, 6D].
            modulation_y: Modulation of the caption stream.
            image: Rotary tables of the image tokens.
            caption: Rotary tables of the caption tokens.
        """
        shift_x, scale_x, gate_x, shift_mlp_x, scale_mlp_x, gate_mlp_x = modulation_x.chunk(6, dim=-1)
        shift_y, scale_y, gate_y, shift_mlp_y, scale_mlp_y, gate_mlp_y = modulation_y.chunk(6, dim=-1)
        out_x, out_y = self.attn(
            modulate(self.norm_x1(x), shift_x, scale_x),
            modulate(self.norm_y1(y), shift_y, scale_y),
            image,
            caption,
        )
        x = x + gate_x * out_x
        x = x + gate_mlp_x * self.mlp_x(modulate(self.norm_x2(x), shift_mlp_x, scale_mlp_x))
        if out_y is not None:
            y = y + gate_y * out_y
            y = y + gate_mlp_y * self.mlp_y(modulate(self.norm_y2(y), shift_mlp_y, scale_mlp_y))
        return x, y


class SelfAttention(nn.Module):
    """Self-attention with per-head norms and rotary positions."""

    kernel: AttentionKernel | None = None
    fp8: Fp8Attention | None

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.fp8 = None
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head_width), RMSNorm(head_width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Map x [B, L, width] to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_width)).unbind(2)  # each [B, L, heads, d]
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        return self.proj(attend(q, k, v, self.fp8 or self.kernel))


def attentions(network: nn.Module) -> dict[str, JointAttention | SelfAttention]:
    """Return the attentions of a network by name, in the order of execution."""
    return {name: m for name, m in network.named_modules() if isinstance(m, JointAttention | SelfAttention)}


class PixelBlock(nn.Module):
    """Attention between patches and an MLP on each pixel, both with a modulation per pixel.

    The modulation [B, L, 256, 6C] is six times as large as the pixels, so everything except the attention runs in
    chunks of tokens, and each half of the block computes only those parts of the modulation that it uses.
    """

    def __init__(self, config: PidConfig, live: bool) -> None:
        super().__init__()
        self.live = live
        channels = config.pixel_channels
        patch_width, width = PATCH_PIXELS * channels, config.pixel_attention_size
        self.norm1, self.norm2 = RMSNorm(channels), RMSNorm(channels)
        self.compress_to_attn = nn.Linear(patch_width, width)
        self.attn = SelfAttention(width, config.pixel_head_width)
        self.expand_from_attn = nn.Linear(width, patch_width)
        self.mlp = MLP(channels, 4 * channels)
        if live:
            self.adaLN_modulation = nn.Sequential(nn.Linear(config.hidden_size, 6 * patch_width))
        else:
            self.modulation_in = nn.Linear(config.hidden_size, 2 * patch_width)
            self.modulation_out = nn.Linear(config.hidden_size, 4 * patch_width)

    def split_modulation(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return weight and bias of the modulation before the attention (2 parts) and after it (4), part by part."""
        weight, bias = self.adaLN_modulation.parameters()  # [256·6·C, D] and [256·6·C], pixel by pixel
        by_part = [tensor.unflatten(0, (PATCH_PIXELS, 6, -1)).transpose(0, 1) for tensor in (weight, bias)]
        before = [tensor[:2].flatten(0, 2) for tensor in by_part]
        after = [tensor[2:].flatten(0, 2) for tensor in by_part]
        return (before[0], before[1]), (after[0], after[1])

    def _modulation(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        if not self.live:
            return self.modulation_in, self.modulation_out
        before, after = self.split_modulation()
        return lambda s: F.linear(s, *before), lambda s: F.linear(s, *after)

    def forward(self, pixels: Tensor, s: Tensor, rotary: Rotary, count: int) -> Tensor:
        """Transform pixels [B, L, 256, C], conditioned on s [B, L, D], in `count` chunks.

        At inference, the result replaces `pixels`, the largest tensor of a step: there is never a second one.
        """
        before, after = self._modulation()
        attended = self.attn(in_chunks(partial(self.compress, before), count, pixels, s), rotary)  # [B, L, width]
        if torch.is_grad_enabled() or torch.compiler.is_exporting():  # gradients need the input, graphs have no writes
            return in_chunks(partial(self.expand, after), count, pixels, s, attended)
        for piece in chunks(count, pixels, s, attended):
            self.expand_in_place(after, *piece)
        return pixels

    def compress(self, modulation: Callable[[Tensor], Tensor], pixels: Tensor, s: Tensor) -> Tensor:
        """First half: the attention input [B, chunk, width] of a chunk of tokens."""
        shift, scale = modulation(s).unflatten(-1, (2, PATCH_PIXELS, -1)).unbind(2)
        return self.compress_to_attn(modulate(self.norm1(pixels), shift, scale).flatten(2))

    def expand(self, modulation: Callable[[Tensor], Tensor], pixels: Tensor, s: Tensor, attended: Tensor) -> Tensor:
        """Second half: add the attention output [B, chunk, width] to a chunk of pixels and apply the MLP."""
        parts = modulation(s).unflatten(-1, (4, PATCH_PIXELS, -1))  # [B, chunk, 4, 256, C]
        gate, shift_mlp, scale_mlp, gate_mlp = parts.unbind(2)
        pixels = pixels + gate * self.expand_from_attn(attended).view_as(pixels)
        return pixels + gate_mlp * self.mlp(modulate(self.norm2(pixels), shift_mlp, scale_mlp))

    def expand_in_place(
        self, modulation: Callable[[Tensor], Tensor], pixels: Tensor, s: Tensor, attended: Tensor
    ) -> None:
        """Replace a chunk of pixels with the result of `expand`."""
        pixels.copy_(self.expand(modulation, pixels, s, attended))


def chunk_length(length: int, limit: int) -> int:
    """Return how many of `length` tokens to process at a time, at most `limit`.

    All of them if possible. Otherwise chunks should be of equal size, because each size is compiled separately, fill
    the tiles of matrix kernels, which have up to 128 rows, and be few. The result is, in this order of preference:

    1. the largest multiple of 128 that divides `length`, if that is more than half of `limit`;
    2. the largest divisor of `length`, if that is more than half of `limit`;
    3. the size of the largest chunk if `length` is divided evenly into as few as possible; see `chunks`.
    """
    if length <= limit:
        return length
    divisors = [size for size in range(limit, limit // 2, -1) if length % size == 0]  # the largest first
    aligned = [size for size in divisors if size % _TILE_ROWS == 0]
    return next(iter(aligned + divisors), -(-length // -(-length // limit)))


def chunks(count: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Divide tensors along axis 1 into `count` views.

    If `count` does not divide the length of the axis, the sizes differ by one entry, except in exported graphs: there
    the length varies and must be a multiple of `count`.
    """
    if torch.compiler.is_exporting():  # a split into sizes would be fixed in the graph, a reshape is not
        return zip(*(tensor.unflatten(1, (count, -1)).unbind(1) for tensor in tensors), strict=True)
    size, larger = divmod(tensors[0].shape[1], count)
    sizes = [size + 1] * larger + [size] * (count - larger)
    return zip(*(tensor.split(sizes, dim=1) for tensor in tensors), strict=True)


def in_chunks(function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
    """Apply a function to `count` chunks of axis 1, one at a time, and concatenate the results."""
    pieces = [function(*piece) for piece in chunks(count, *tensors)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
