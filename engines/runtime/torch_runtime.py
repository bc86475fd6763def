"""PyTorch backend for CPU and CUDA, with the weights in the precision of the bundle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engines.errors import ConfigError
from engines.pid.adapter import SigmaGate
from engines.pid.blocks import PatchBlock, PixelBlock, SelfAttention
from engines.pid.fold import FoldedDecoder
from engines.pid.fp8 import has_fp8_products
from engines.pid.graphs import ConditionGraph, StepGraph
from engines.pid.network import FinalLayer, PixelEmbedder
from engines.runtime.compiler_cache import prepare_compiler, replace_cache
from engines.runtime.compiler_errors import explain, failed_to_compile, lacks_compiler
from engines.runtime.kernels.accumulation import AccumulationChoice, choose_accumulation
from engines.runtime.kernels.attention import KernelChoice, choose_kernels
from engines.runtime.kernels.timing import cuda_seconds
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.slots import LazyGather
from engines.size import Size

COMPILE_BACKEND = "inductor"  # backend of torch.compile


class TorchBackend:
    """Runs the condition and step graphs in PyTorch; `TensorRTBackend` runs their compiled form.

    Attributes:
        decoder: The network.
        kernels: Measurements of the attention kernels; empty on the CPU, which has only one.
        accumulations: Measurements of the FP8 matrix products; empty if there are none.
    """

    def __init__(self, decoder: FoldedDecoder, compiled: bool = False) -> None:
        """Create a backend.

        Args:
            decoder: A network on its device, folded for `sampler.MODEL_TIMESTEPS`.
            compiled: Whether to fuse the elementwise operations with torch.compile. This modifies `decoder`.

        Raises:
            ConfigError: torch.compile does not work on this machine.
        """
        self.decoder, self.config, self.dtype = decoder, decoder.config, decoder.dtype
        self.device = decoder.y_pos_embedding.device
        self._compiled = compiled
        self._cache_replaced = False
        if self.dtype == torch.float16:  # partial sums in float16 can overflow although the result does not
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        if compiled:
            prepare_compiler(self.device, COMPILE_BACKEND)
            _compile_regions(decoder)
        self.kernels: tuple[KernelChoice, ...] = ()
        self.accumulations: tuple[AccumulationChoice, ...] = ()
        self._condition: Callable[..., Sequence[Tensor]] = ConditionGraph(decoder)
        self._step: Callable[..., Tensor]

    def prepare(self, info: RuntimeInfo) -> None:
        """Choose kernels of attention and FP8 products on CUDA; create the position tables of every size."""
        if self.device.type == "cuda":
            largest = max(info.sizes, key=lambda size: size.area)
            self.kernels = choose_kernels(self.decoder, largest, info.caption_tokens, cuda_seconds)
            if has_fp8_products(self.device):
                self.accumulations = choose_accumulation(self.decoder, largest, info.caption_tokens, cuda_seconds)
            torch.cuda.empty_cache()  # no later work has these shapes
        for size in info.sizes:
            self.decoder.geometry(size, self.device)  # cached, so that steps only look it up
        self._step = StepGraph(self.decoder, info.caption_tokens)
        if self._compiled:
            _allow_recompiles(4 * len(info.sizes) * info.max_batch)

    def condition(self, size: Size, latent: Tensor, caption: Tensor) -> Sequence[Tensor]:
        """Run `ConditionGraph`."""
        return self._condition(latent, caption)

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
        """Run `StepGraph`. If it cannot be compiled, try once more without the code in the compiler's cache.

        Raises:
            ConfigError: torch.compile does not work on this machine.
        """
        try:
            return self._step(x, sigma, step_index, noise, caption, tokens, self.decoder.geometry(size, self.device))
        except Exception as error:
            if type(error).__name__ == "FailOnRecompileLimitHit":
                raise ConfigError(
                    "PyTorch reached its recompile limit, which should suffice for all sizes and batches; part of the "
                    "decoder would run uncompiled. Please report this, and use --no-compile until it is fixed."
                ) from error
            if not self._compiled or not failed_to_compile(error):
                raise
            if self._cache_replaced or lacks_compiler(error):
                raise ConfigError(f"PyTorch cannot compile the decoder: {explain(error)}.") from error
            self._cache_replaced = True
            replace_cache(error)
        return self.step(size, x, sigma, step_index, noise, caption, tokens)

    def on_captured(self) -> None:
        """Do nothing."""


def _compile_regions(decoder: FoldedDecoder) -> None:
    """Compile the modules that occur repeatedly or move all pixels: blocks, gates, and the first and last pixel layer.

    Compiling a whole step would unroll all blocks and chunks, which takes many times as long, and there is little to
    fuse between these regions.
    """
    for module in decoder.modules():
        if isinstance(module, PatchBlock | SelfAttention | SigmaGate | PixelEmbedder | FinalLayer):
            module.compile(dynamic=False, backend=COMPILE_BACKEND)
        elif isinstance(module, PixelBlock):
            for name in ("compress", "expand_in_place"):
                setattr(module, name, torch.compile(getattr(module, name), dynamic=False, backend=COMPILE_BACKEND))


_recompiles = 0  # that the backends of this process need together: they share compiled code
_recompiles_lock = threading.Lock()


def _allow_recompiles(count: int) -> None:
    """Increase the recompile limit of PyTorch by `count` per device, and make reaching it an error.

    Each size and batch is compiled separately, as are the last block and, for sizes that cannot be divided into equal
    chunks, a second size of chunk, for every device: the compiled code of all decoders in a process counts together.
    PyTorch would run further shapes uncompiled and only warn.
    """
    global _recompiles
    from torch._dynamo import config  # takes seconds to import, and only --compile needs it

    with _recompiles_lock:
        _recompiles += count
        # The other devices may only be about to be prepared, and settings apply to this thread.
        limit = _recompiles * max(1, torch.cuda.device_count())
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)
    config.fail_on_recompile_limit_hit = True
