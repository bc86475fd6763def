"""The two kinds of transformer block, `PatchBlock` and `PixelBlock`.

Both exist in two forms: *live*, as in the published network, and folded. A live patch block has the layers that compute
its modulation from the timestep; for a folded one the modulation is read from a table. In a folded pixel block the
modulation layer is split in two.

Shapes: B batch, L image tokens, T caption tokens, D hidden size, C channels per pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.pid.chunks import chunks, in_chunks
from engines.pid.config import PATCH_PIXELS, PidConfig
from engines.pid.fp8_attention import Fp8Attention, scale_queries
from engines.pid.positions import Rotary, rotate


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, x / sqrt(mean(x²) + 1e-6) × weight, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; keeps shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: w2(SiLU(w1 x) · w3 x), without biases.

    Attributes:
        kernel: What a runtime computes instead of `compute`; it takes this module and x.
    """

    kernel: Callable[[GatedMLP, Tensor], Tensor] | None = None

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to the same shape."""
        return self.compute(x) if self.kernel is None else self.kernel(self, x)

    def compute(self, x: Tensor) -> Tensor:
        """Compute `forward` in plain PyTorch."""
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


Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values, each [B, N, heads, d] with any strides


class JointAttention(nn.Module):
    """Attention over the concatenation [caption, image]; each stream has its own projections and per-head norms.

    Attributes:
        fp8: FP8 attention, which PyTorch emulates.
        heads: What a runtime computes instead of `make_heads`; it takes this module and the arguments of `forward`.
        kernel: What a runtime computes instead of PyTorch's choice, or of the emulation in `fp8`.
    """

    fp8: Fp8Attention | None
    heads: Callable[[JointAttention, Tensor, Tensor, Rotary, Rotary], Heads] | None = None
    kernel: AttentionKernel | None = None

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
        inputs = x, y, image, caption
        q, k, v = self.make_heads(*inputs) if self.heads is None else self.heads(self, *inputs)
        out = attend(q, k, v, self.fp8 if self.kernel is None else self.kernel)
        if not self.caption_output:
            return self.proj_x(out), None
        length = y.shape[1]  # slices, because Torch-TensorRT cannot split an axis whose length varies
        return self.proj_x(out[:, length:]), self.proj_y(out[:, :length])

    def make_heads(self, x: Tensor, y: Tensor, image: Rotary, caption: Rotary) -> Heads:
        """Project, normalise and rotate; keys and values are [caption, image], as are queries with `caption_output`."""

        def heads(stream: Tensor) -> tuple[Tensor, ...]:
            return stream.unflatten(-1, (-1, x.shape[-1] // self.head_width, self.head_width)).unbind(2)

        qx, kx, vx = heads(self.qkv_x(x))  # each [B, L, heads, d]
        *qy, ky, vy = heads(self.qkv_y(y))  # each [B, T, heads, d]
        q = rotate(self.q_norm_x(qx), image)
        k = torch.cat((rotate(self.k_norm_y(ky), caption), rotate(self.k_norm_x(kx), image)), dim=1)
        v = torch.cat((vy, vx), dim=1)
        if self.caption_output:
            q = torch.cat((rotate(self.q_norm_y(qy[0]), caption), q), dim=1)
        return q, k, v


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
    """Self-attention with per-head norms and rotary positions; the attributes are those of `JointAttention`."""

    fp8: Fp8Attention | None
    heads: Callable[[SelfAttention, Tensor, Rotary], Heads] | None = None
    kernel: AttentionKernel | None = None

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.fp8 = None
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head_width), RMSNorm(head_width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Map x [B, L, width] to the same shape."""
        q, k, v = self.make_heads(x, rotary) if self.heads is None else self.heads(self, x, rotary)
        return self.proj(attend(q, k, v, self.fp8 if self.kernel is None else self.kernel))

    def make_heads(self, x: Tensor, rotary: Rotary) -> Heads:
        """Project, normalise and rotate."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_width)).unbind(2)  # each [B, L, heads, d]
        return rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary), v


Attention = JointAttention | SelfAttention


def attentions(network: nn.Module) -> dict[str, Attention]:
    """Return the attentions of a network by name, in the order of execution."""
    return {name: m for name, m in network.named_modules() if isinstance(m, Attention)}


class PixelBlock(nn.Module):
    """Attention between patches and an MLP on each pixel, both with a modulation per pixel.

    The modulation [B, L, 256, 6C] is six times as large as the pixels, so everything except the attention runs in
    chunks of tokens, and each half of the block computes only those parts of the modulation that it uses.

    Attributes:
        kernel: What a runtime computes instead of `update`, in place; it takes this module and the same arguments.
    """

    kernel: Callable[[PixelBlock, Tensor, Tensor, Tensor], None] | None = None

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
        return self.update(pixels, modulation(s), self.expand_from_attn(attended))

    def expand_in_place(
        self, modulation: Callable[[Tensor], Tensor], pixels: Tensor, s: Tensor, attended: Tensor
    ) -> None:
        """Replace a chunk of pixels with the result of `expand`."""
        if self.kernel is None:
            pixels.copy_(self.expand(modulation, pixels, s, attended))
        else:
            self.kernel(self, pixels, modulation(s), self.expand_from_attn(attended))

    def update(self, pixels: Tensor, modulation: Tensor, expanded: Tensor) -> Tensor:
        """Add the expanded attention output [B, L, 256·C] to pixels [B, L, 256, C] and apply the MLP.

        The modulation, [B, L, 4·256·C], has the parts gate of the attention, and shift, scale and gate of the MLP.
        """
        gate, shift, scale, gate_mlp = modulation.unflatten(-1, (4, PATCH_PIXELS, -1)).unbind(2)  # each as pixels
        pixels = pixels + gate * expanded.view_as(pixels)
        return pixels + gate_mlp * self.mlp(modulate(self.norm2(pixels), shift, scale))
