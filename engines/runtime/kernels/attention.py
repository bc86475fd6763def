"""Choice of the fastest attention kernel of PyTorch on a device: attention is more than half of the work."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.pid.blocks import JointAttention, SelfAttention
from engines.pid.config import PATCH_PIXELS
from engines.pid.fold import FoldedDecoder
from engines.runtime.kernels.timing import Timer
from engines.size import Size

log = logging.getLogger(__name__)

# Without SDPBackend.MATH, which stores the scores of all pairs of tokens: hundreds of MB per head at 2048².
KERNELS: Mapping[str, SDPBackend] = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
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
class KernelChoice:
    """Measurements for one kind of attention; seconds are None for kernels that do not support it on this device."""

    attention: Attention
    seconds: Mapping[str, float | None]

    @property
    def chosen(self) -> str | None:
        """Name of the fastest kernel; None if no kernel supports it, which leaves the choice to PyTorch."""
        supported = {name: seconds for name, seconds in self.seconds.items() if seconds is not None}
        return min(supported, key=supported.__getitem__) if supported else None

    def __str__(self) -> str:
        times = ", ".join(
            f"{name} {'not supported' if seconds is None else f'{1000 * seconds:.3g} ms'}"
            for name, seconds in self.seconds.items()
        )
        shape = self.attention
        return (
            f"{shape.name} attention, {shape.tokens} tokens, {shape.heads} heads of {shape.width}: {times}; "
            f"using {self.chosen or 'PyTorch default'}"
        )


def attentions(decoder: FoldedDecoder, size: Size, caption_tokens: int) -> tuple[Attention, Attention]:
    """Return the attention of the patch blocks and that of the pixel blocks, for images of `size`."""
    config, tokens = decoder.config, size.area // PATCH_PIXELS

    def modules(kind: type[nn.Module]) -> tuple[nn.Module, ...]:
        return tuple(module for module in decoder.modules() if isinstance(module, kind))

    joint = modules(JointAttention), caption_tokens + tokens, config.num_heads, config.head_width
    pixel = modules(SelfAttention), tokens, config.pixel_num_heads, config.pixel_head_width
    return Attention("joint", *joint), Attention("pixel", *pixel)


def choose_kernels(
    decoder: FoldedDecoder,
    size: Size,
    caption_tokens: int,
    timer: Timer,
    kernels: Mapping[str, SDPBackend] = KERNELS,
) -> tuple[KernelChoice, ...]:
    """Measure all kernels for one image, and set the fastest on the attention modules of the decoder.

    Args:
        decoder: The network, on the device to measure.
        size: Output size of the image.
        caption_tokens: Length of the caption.
        timer: Runs a function and returns its duration in seconds.
        kernels: Kernels to choose from, by name.

    Returns:
        The measurements for the patch blocks and the pixel blocks.
    """
    device, choices = decoder.y_pos_embedding.device, []
    for attention in attentions(decoder, size, caption_tokens):
        shape = (1, attention.tokens, attention.heads, attention.width)
        q, k, v = (torch.randn(shape, dtype=decoder.dtype, device=device).transpose(1, 2) for _ in range(3))
        choice = KernelChoice(attention, {name: _seconds(kernel, q, k, v, timer) for name, kernel in kernels.items()})
        for module in attention.modules:
            module.kernel = None if choice.chosen is None else kernels[choice.chosen]  # type: ignore[assignment]
        log.info("%s", choice)
        choices.append(choice)
    return tuple(choices)


def _seconds(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, timer: Timer) -> float | None:
    def attend() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    try:
        with sdpa_kernel(kernel), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch explains at length why a kernel is not supported
            attend()
            return timer(attend)
    except torch.AcceleratorError:
        raise  # the device is broken
    except RuntimeError as error:
        log.debug("%s is not supported: %s", kernel, error)
        return None
