"""PyTorch backend for CPU and CUDA, with the weights in the precision of the bundle."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from engines.errors import ConfigError
from engines.machine import device_name
from engines.pid.adapter import SigmaGate
from engines.pid.blocks import PatchBlock, PixelBlock, SelfAttention
from engines.pid.fold import FoldedDecoder
from engines.pid.graphs import ConditionGraph, StepGraph
from engines.pid.network import FinalLayer, PixelEmbedder
from engines.pid.quantised import count_emulated
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.compiler_cache import prepare_compiler, replace_cache
from engines.runtime.compiler_errors import (
    explain,
    failed_to_compile,
    lacks_compiler,
    reached_recompile_limit,
)
from engines.runtime.kernels.choice import Choice, choose
from engines.runtime.kernels.operations import decoder_operations
from engines.runtime.kernels.timing import cuda_seconds
from engines.runtime.kernels.workload import Unavailable, Workload, own_kernels
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.slots import LazyGather
from engines.size import Size

log = logging.getLogger(__name__)

Kernels = Literal["auto", "pytorch"]
T = TypeVar("T")

COMPILE_BACKEND = "inductor"  # backend of torch.compile
_COMPILED_CANDIDATES = 8  # of one function, when kernels are chosen


class TorchBackend:
    """Runs the condition and step graphs in PyTorch; `TensorRTBackend` runs their compiled form.

    Attributes:
        decoder: The network.
        choices: Measurements by which kernels were chosen; empty on the CPU, which has no choice.
    """

    def __init__(
        self,
        decoder: FoldedDecoder,
        compiled: bool = False,
        kernels: Kernels = "auto",
        device: torch.device | None = None,
    ) -> None:
        """Create a backend.

        Args:
            decoder: A network folded for `sampler.MODEL_TIMESTEPS`.
            compiled: Whether to fuse the elementwise operations with torch.compile. This modifies `decoder`.
            kernels: Kernels to choose from on CUDA: all, or only those of PyTorch.
            device: Device on which the weights will be when `prepare` is called; by default where they are now.

        Raises:
            ConfigError: torch.compile does not work on this machine.
        """
        self.decoder, self.config, self.dtype = decoder, decoder.config, decoder.dtype
        self.device = device or decoder.y_pos_embedding.device
        self._compiled, self._kernels = compiled, kernels
        self._cache_replaced = False
        if self.dtype == torch.float16:  # partial sums in float16 can overflow although the result does not
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        if compiled:
            prepare_compiler(self.device, COMPILE_BACKEND)
            _compile_regions(decoder)
        self.choices: Sequence[Choice] = ()
        self._condition: Callable[..., Sequence[Tensor]] = ConditionGraph(decoder)
        self._step: Callable[..., Tensor]

    def buffer_counts(self, info: RuntimeInfo) -> Mapping[str, int]:
        """Return nothing: all memory of the network is in the pool of the graphs."""
        return {}

    def prepare(self, info: RuntimeInfo, buffers: DeviceBuffers) -> None:
        """Choose kernels on CUDA, for one image of the largest size; create the position tables of every size.

        Raises:
            ConfigError: torch.compile does not work on this machine, or PyTorch computes wrong results on the device.
        """
        for precision, count in count_emulated(self.decoder, self.device).items():
            log.info(
                "%d layers in %s are emulated: %s multiplies their rounded values in %s",
                count,
                precision.upper(),
                device_name(self.device),
                str(self.dtype).removeprefix("torch."),
            )
        if self._compiled:
            _allow_recompiles(_COMPILED_CANDIDATES + 4 * len(info.sizes) * info.max_batch)
        if self.device.type == "cuda" and not self.choices:
            workload = self._workload(info)
            self.choices = self._retry(lambda: choose(decoder_operations(self.decoder, workload), cuda_seconds))
            torch.cuda.empty_cache()  # no later work has these shapes
        for size in info.sizes:
            self.decoder.geometry(size, self.device)  # cached, so that steps only look it up
        self._step = StepGraph(self.decoder, info.caption_tokens)

    def _workload(self, info: RuntimeInfo) -> Workload:
        """Return what kernels are chosen for; log why, if only those of PyTorch are used."""
        architecture = own_kernels(self.device, self.dtype) if self._kernels == "auto" else None
        if isinstance(architecture, Unavailable):
            log.info("only kernels of PyTorch are used: %s", architecture.reason)
            architecture = None
        largest = max(info.sizes, key=lambda size: size.area)
        return Workload(largest, info.caption_tokens, architecture, self._compiled, COMPILE_BACKEND)

    def condition(self, size: Size, latent: Tensor, caption: Tensor) -> Sequence[Tensor]:
        """Run `ConditionGraph`; raises as `step` does."""
        return self._retry(lambda: self._condition(latent, caption))

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
        """Run `StepGraph`.

        Raises:
            ConfigError: torch.compile does not work on this machine.
        """
        tables = self.decoder.geometry(size, self.device)
        return self._retry(lambda: self._step(x, sigma, step_index, noise, caption, tokens, tables))

    def _retry(self, work: Callable[[], T]) -> T:
        """Run compiled work. If it cannot be compiled, try once more without the code in the compiler's cache."""
        try:
            return work()
        except Exception as error:
            if reached_recompile_limit(error):
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
        return self._retry(work)

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
