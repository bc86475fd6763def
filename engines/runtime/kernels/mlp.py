"""Choice for the gated MLPs of the patch blocks: two products and a third one, or the first two in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.accuracy import relative_error
from engines.pid.blocks import GatedMLP, PatchBlock
from engines.pid.fold import FoldedDecoder
from engines.pid.fp8 import Fp8Linear
from engines.runtime.kernels.choice import Candidate, Operation
from engines.runtime.kernels.workload import Workload

if TYPE_CHECKING:
    from engines.runtime.triton.architectures import Architecture

# The inputs of the third product are rounded to FP8, which has an error of 2.6 %. Slightly different values may be
# rounded to neighbours: an error of 0.8 % in the first two products, as of fast accumulation, becomes about 3 %.
MAX_ERROR = 0.05
_CHECKED_ROWS = 256

Compute = Callable[[GatedMLP, Tensor], Tensor]  # as GatedMLP.compute


def mlp_operations(decoder: FoldedDecoder, workload: Workload) -> Iterator[Operation]:
    """Yield the MLP of the image tokens for one image with random tokens, if there are kernels to choose from."""
    if workload.architecture is None:
        return
    from engines.runtime.triton.gated_product import supports

    mlps = [block.mlp_x for block in decoder.modules() if isinstance(block, PatchBlock)]
    mlps = [mlp for mlp in mlps if supports(mlp)]
    if mlps:
        yield _operation(mlps, decoder, workload, workload.architecture)


def _operation(
    mlps: Sequence[GatedMLP], decoder: FoldedDecoder, workload: Workload, architecture: Architecture
) -> Operation:
    from engines.runtime.triton.gated_product import CONFIGS, gated_mlp

    sample = mlps[0]
    width, inner = sample.w1.weight.shape[::-1]
    x = torch.randn(1, workload.tokens, width, dtype=decoder.dtype, device=decoder.y_pos_embedding.device)
    checked = slice(None, None, -(-workload.tokens // _CHECKED_ROWS))
    expected = _exact(sample, x[:, checked].float())

    def candidate(compute: Compute, kernel: Compute | None) -> Candidate:
        def install() -> None:
            for mlp in mlps:
                mlp.kernel = kernel

        return Candidate(partial(workload.optimise(compute), sample, x), install, MAX_ERROR, own=kernel is not None)

    kernels = {f"fused, {config}": partial(gated_mlp, config) for config in CONFIGS[architecture]}
    return Operation(
        name="MLP",
        shape=f"{workload.tokens} tokens, {width} to {inner} channels",
        flops=6 * workload.tokens * width * inner,
        nbytes=2 * x.nbytes + 3 * width * inner,
        candidates={
            "PyTorch": candidate(GatedMLP.compute, None),
            **{name: candidate(kernel, kernel) for name, kernel in kernels.items()},
        },
        error=lambda result: relative_error(result[:, checked], expected),
    )


def _exact(mlp: GatedMLP, x: Tensor) -> Tensor:
    """Compute the MLP in float32; the products of PyTorch may use fast accumulation."""

    def multiply(layer: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(layer, Fp8Linear)  # noqa: S101  `supports` accepts no others
        return layer.emulate(x)

    return multiply(mlp.w2, F.silu(multiply(mlp.w1, x)) * multiply(mlp.w3, x))
