"""Choice of the fastest correct attention kernel of PyTorch on a device: attention is more than half of the work."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from engines.accuracy import relative_error
from engines.errors import ConfigError
from engines.pid.blocks import AttentionKernel, JointAttention, SelfAttention
from engines.pid.config import PATCH_PIXELS
from engines.pid.fold import FoldedDecoder
from engines.runtime.kernels.timing import Timer, if_supported
from engines.size import Size

log = logging.getLogger(__name__)

MAX_ERROR = 0.02  # relative; one wrong row in one of 24 heads is above it, rounding to bfloat16 well below
CHECKED_ROWS = 64  # queries whose result is checked, spread over all tokens


# Operators rather than `sdpa_kernel`, which changes flags of the whole process, and so of other devices' threads. None
# of them stores the scores of all pairs of tokens, which are hundreds of MB per head at 2048².


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by cuDNN; q, k, v [B, heads, N, d]."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by FlashAttention; q, k, v [B, heads, N, d]."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def memory_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the memory-efficient kernels of PyTorch; q, k, v [B, heads, N, d]."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]


@dataclass(frozen=True)
class Kernel:
    """One implementation of attention, and PyTorch's test whether it supports a device, dtype and shape."""

    attend: AttentionKernel
    supports: Callable[[SDPAParams], bool]


KERNELS: Mapping[str, Kernel] = {
    "cuDNN": Kernel(cudnn, can_use_cudnn_attention),
    "flash": Kernel(flash, can_use_flash_attention),
    "memory-efficient": Kernel(memory_efficient, can_use_efficient_attention),
}


@dataclass(frozen=True)
class Attention:
    """Shape of one kind of attention, in the patch blocks or the pixel blocks, and the modules that use it."""

    name: str
    modules: tuple[nn.Module, ...]
    tokens: int
    heads: int
    width: int  # channels per head


@dataclass(frozen=True)
class KernelResult:
    """Measurement of one kernel."""

    seconds: float
    error: float  # relative, against `expected_rows`

    @property
    def correct(self) -> bool:
        """Whether the error is in the range of rounding; false for NaN."""
        return self.error <= MAX_ERROR

    def __str__(self) -> str:
        return f"{1000 * self.seconds:.3g} ms" + ("" if self.correct else f" but wrong (error {self.error:.2g})")


@dataclass(frozen=True)
class KernelChoice:
    """Measurements for one kind of attention; None for kernels that do not support it on this device."""

    attention: Attention
    results: Mapping[str, KernelResult | None]

    @property
    def chosen(self) -> str | None:
        """Name of the fastest correct kernel; None if no kernel supports it, which leaves the choice to PyTorch."""
        correct = {name: result.seconds for name, result in self.results.items() if result and result.correct}
        return min(correct, key=correct.__getitem__) if correct else None

    def __str__(self) -> str:
        results = ", ".join(f"{name} {result or 'not supported'}" for name, result in self.results.items())
        shape = self.attention
        return (
            f"{shape.name} attention, {shape.tokens} tokens, {shape.heads} heads of {shape.width}: {results}; "
            f"using {self.chosen or 'PyTorch default'}"
        )


def attentions(decoder: FoldedDecoder, size: Size, caption_tokens: int) -> tuple[Attention, Attention]:
    """Return the attention of the patch blocks and that of the pixel blocks, for images of `size`.

    Attentions in FP8 are left out, because no kernel of PyTorch computes them.
    """
    config, tokens = decoder.config, size.area // PATCH_PIXELS

    def modules(kind: type[JointAttention] | type[SelfAttention]) -> tuple[nn.Module, ...]:
        return tuple(module for module in decoder.modules() if isinstance(module, kind) and module.fp8 is None)

    joint = modules(JointAttention), caption_tokens + tokens, config.num_heads, config.head_width
    pixel = modules(SelfAttention), tokens, config.pixel_num_heads, config.pixel_head_width
    return Attention("joint", *joint), Attention("pixel", *pixel)


def choose_kernels(
    decoder: FoldedDecoder,
    size: Size,
    caption_tokens: int,
    timer: Timer,
    kernels: Mapping[str, Kernel] = KERNELS,
) -> tuple[KernelChoice, ...]:
    """Measure all kernels for one image, and set the fastest correct one on the attention modules of the decoder.

    Args:
        decoder: The network, on the device to measure.
        size: Output size of the image.
        caption_tokens: Length of the caption.
        timer: Runs a function and returns its duration in seconds.
        kernels: Kernels to choose from, by name.

    Returns:
        The measurements for the patch blocks and the pixel blocks, without those whose attention is in FP8.

    Raises:
        ConfigError: All kernels that the device supports compute wrong results.
    """
    choices = []
    for attention in attentions(decoder, size, caption_tokens):
        if not attention.modules:
            continue
        choice = _measure_all(attention, decoder.y_pos_embedding, kernels, timer)
        if choice.chosen is None and any(choice.results.values()):
            raise ConfigError(f"PyTorch computes attention incorrectly on this device: {choice}. Update PyTorch.")
        for module in attention.modules:
            module.kernel = None if choice.chosen is None else kernels[choice.chosen].attend  # type: ignore[assignment]
        choices.append(choice)
    if choices:
        log.info("%s", "\n".join(map(str, choices)))
    return tuple(choices)


def _measure_all(attention: Attention, like: Tensor, kernels: Mapping[str, Kernel], timer: Timer) -> KernelChoice:
    """Measure the kernels on random inputs with the device and dtype of `like`."""
    shape = (1, attention.tokens, attention.heads, attention.width)
    q, k, v = (torch.randn(shape, dtype=like.dtype, device=like.device).transpose(1, 2) for _ in range(3))
    rows = checked_rows(attention.tokens, like.device)
    expected = expected_rows(q, k, v, rows)

    def measure(kernel: Kernel) -> KernelResult:
        error = relative_error(kernel.attend(q, k, v)[:, :, rows], expected)
        return KernelResult(timer(lambda: kernel.attend(q, k, v)), error)

    def measure_if_supported(kernel: Kernel) -> KernelResult | None:
        if not kernel.supports(SDPAParams(q, k, v, None, 0.0, False, False)):
            return None
        return if_supported(lambda: measure(kernel))  # called directly, an operator may support less than PyTorch says

    return KernelChoice(attention, {name: measure_if_supported(kernel) for name, kernel in kernels.items()})


def checked_rows(tokens: int, device: torch.device) -> Tensor:
    """Return the indices of the queries to check: evenly spaced, with the first and the last."""
    return torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=device).round().long()


def expected_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Compute attention of some queries in float32 by its definition; q, k, v [B, heads, N, d]."""
    scores = q[:, :, rows].float() @ k.float().transpose(2, 3) / math.sqrt(q.shape[3])
    return F.softmax(scores, dim=3) @ v.float()
