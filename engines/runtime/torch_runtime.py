"""PyTorch on the CPU or on CUDA: weights resident in the bundle's precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engines.errors import ConfigError
from engines.pid.adapter import SigmaGate
from engines.pid.blocks import PatchBlock, PixelBlock, SelfAttention
from engines.pid.fold import FoldedDecoder
from engines.pid.graphs import ConditionGraph, StepGraph
from engines.pid.network import FinalLayer
from engines.runtime.attention import KernelChoice, choose_kernels, cuda_seconds
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.slots import LazyGather
from engines.size import Size

BACKEND = "inductor"  # of torch.compile


class TorchBackend:
    """The graphs that get exported elsewhere, called here."""

    non_torch_bytes = 0

    def __init__(self, decoder: FoldedDecoder, compiled: bool = False) -> None:
        """`decoder` on its device, folded for `sampler.MODEL_TIMESTEPS`.

        `compiled` has torch.compile fuse the elementwise work between the matrix products, which changes `decoder`.
        """
        self.decoder, self.config, self.dtype = decoder, decoder.config, decoder.dtype
        self.device = decoder.y_pos_embedding.device
        self._compiled = compiled
        if compiled:
            _compile_regions(decoder)
        self.kernels: tuple[KernelChoice, ...] = ()  # what was measured; only CUDA has a choice
        self._conditions: dict[Size, Callable[..., Sequence[Tensor]]] = {}
        self._steps: dict[Size, Callable[..., Tensor]] = {}

    def prepare(self, info: RuntimeInfo) -> None:
        if self.device.type == "cuda":
            largest = max(info.sizes, key=lambda size: size[0] * size[1])
            self.kernels = choose_kernels(self.decoder, largest, info.caption_tokens, cuda_seconds)
            torch.cuda.empty_cache()  # nothing that follows has these shapes
        for size in info.sizes:
            self.decoder.geometry(size, info.caption_tokens, self.device)  # made now: no compiled code has to make it
            self._conditions[size] = ConditionGraph(self.decoder, size)
            self._steps[size] = StepGraph(self.decoder, size)
        if self._compiled:
            _allow_code_for_each(4 * len(info.sizes) * info.max_batch)

    def condition(self, size: Size, latent: Tensor, caption: Tensor) -> Sequence[Tensor]:
        return self._conditions[size](latent, caption)

    def step(
        self,
        size: Size,
        x: Tensor,
        sigma: Tensor,
        step_index: Tensor,
        noise: Tensor,
        caption: Tensor,
        tokens: LazyGather,
    ) -> Tensor:
        with _compile_errors():
            return self._steps[size](x, sigma, step_index, noise, caption, tokens)

    def warmed_up(self) -> None:
        pass


def _compile_regions(decoder: FoldedDecoder) -> None:
    """Compile what repeats, once for all its repetitions: the blocks, gates, and what runs chunk by chunk.

    Compiled as a whole, a step has all its blocks and chunks written out, which takes many times as long; and little
    lies between these regions that could be fused.
    """
    for module in decoder.modules():
        if isinstance(module, PatchBlock | SelfAttention | SigmaGate | FinalLayer):
            module.compile(dynamic=False, backend=BACKEND)
        elif isinstance(module, PixelBlock):
            for name in ("compress", "expand"):
                setattr(module, name, torch.compile(getattr(module, name), dynamic=False, backend=BACKEND))


def _allow_code_for_each(count: int) -> None:
    """Sizes and batches are few and fixed, so each gets code of its own, and so do the last block and the last chunk.

    Past its limit PyTorch would quietly stop compiling what it meets in yet another shape.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, count)


@contextmanager
def _compile_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Told by name: importing the compiler to learn its errors takes seconds, and most starts do without it.
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise ConfigError("PyTorch cannot compile the decoder on this machine; start with --no-compile.") from error
        raise
