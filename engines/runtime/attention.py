"""Which of PyTorch's attention kernels is fastest on the device at hand: more than half of the work is attention."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.pid.blocks import JointAttention, SelfAttention
from engines.pid.config import PATCH_PIXELS
from engines.pid.fold import FoldedDecoder
from engines.size import Size

log = logging.getLogger(__name__)

# Not the plain one, which holds the products of all pairs of tokens: hundreds of MB a head at 2048².
KERNELS: Mapping[str, SDPBackend] = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
REPEATS = 3

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Attention:
    """The shape of one kind of attention: that of the patch blocks, or of the pixel blocks."""

    name: str
    modules: tuple[nn.Module, ...]
    tokens: int
    heads: int
    width: int  # of a head


@dataclass(frozen=True)
class KernelChoice:
    """What was measured for one kind of attention; seconds are None for a kernel that does not take it here."""

    attention: Attention
    seconds: Mapping[str, float | None]

    @property
    def chosen(self) -> str | None:
        """Name of the fastest kernel; None where none takes it, which leaves the choice to PyTorch."""
        taken = {name: seconds for name, seconds in self.seconds.items() if seconds is not None}
        return min(taken, key=taken.__getitem__) if taken else None

    def __str__(self) -> str:
        times = ", ".join(
            f"{name} {'not offered' if seconds is None else f'{1000 * seconds:.3g} ms'}"
            for name, seconds in self.seconds.items()
        )
        shape = self.attention
        return (
            f"{shape.name} attention, {shape.tokens} tokens, {shape.heads} heads of {shape.width}: {times}; "
            f"{self.chosen or 'left to PyTorch'}"
        )


def attentions(decoder: FoldedDecoder, size: Size, caption_tokens: int) -> tuple[Attention, Attention]:
    config, tokens = decoder.config, size[0] * size[1] // PATCH_PIXELS

    def modules(kind: type[nn.Module]) -> tuple[nn.Module, ...]:
        return tuple(module for module in decoder.modules() if isinstance(module, kind))

    joint = modules(JointAttention), caption_tokens + tokens, config.num_heads, config.head_width
    pixel = modules(SelfAttention), tokens, config.pixel_num_heads, config.pixel_head_width
    return Attention("joint", *joint), Attention("pixel", *pixel)


def choose_kernels(
    decoder: FoldedDecoder,
    size: Size,
    caption_tokens: int,
    time: Timer,
    kernels: Mapping[str, SDPBackend] = KERNELS,
) -> tuple[KernelChoice, ...]:
    """Measure every kernel at `size`, one image, and set the fastest on the decoder's attention modules.

    `time` takes work and returns its seconds. What a kernel allocates is free again afterwards.
    """
    device, choices = decoder.y_pos_embedding.device, []
    for attention in attentions(decoder, size, caption_tokens):
        shape = (1, attention.tokens, attention.heads, attention.width)
        q, k, v = (torch.randn(shape, dtype=decoder.dtype, device=device).transpose(1, 2) for _ in range(3))
        choice = KernelChoice(attention, {name: _seconds(kernel, q, k, v, time) for name, kernel in kernels.items()})
        for module in attention.modules:
            module.kernel = None if choice.chosen is None else kernels[choice.chosen]  # type: ignore[assignment]
        log.info("%s", choice)
        choices.append(choice)
    return tuple(choices)


def _seconds(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, time: Timer) -> float | None:
    def attend() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    try:
        with sdpa_kernel(kernel), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says at length why it does not offer a kernel
            attend()
            return time(attend)
    except torch.AcceleratorError:
        raise  # the device is broken, not the kernel missing
    except RuntimeError as error:
        log.debug("%s is not offered: %s", kernel, error)
        return None


def cuda_seconds(work: Callable[[], object]) -> float:
    """The shortest of a few runs on the current stream."""
    times = []
    for _ in range(REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1000)
    return min(times)
