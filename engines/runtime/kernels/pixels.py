"""Choice for the second half of the pixel blocks: the passes that torch.compile makes, or one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from engines.accuracy import relative_error
from engines.pid.blocks import PixelBlock
from engines.pid.config import PATCH_PIXELS
from engines.pid.fold import FoldedDecoder
from engines.runtime.kernels.choice import Candidate, Operation
from engines.runtime.kernels.workload import Workload

MAX_ERROR = 0.02  # relative; rounding to bfloat16 between the passes is well below


def pixel_operations(decoder: FoldedDecoder, workload: Workload) -> Iterator[Operation]:
    """Yield the update of one chunk of pixels with random values, if there are kernels to choose from."""
    blocks = [block for block in decoder.modules() if isinstance(block, PixelBlock)]
    if workload.architecture is None or not blocks:
        return
    from engines.runtime.triton.pixel_update import CONFIGS, update

    tokens, channels = decoder.chunk_tokens(1, workload.tokens), decoder.config.pixel_channels
    values = PATCH_PIXELS * channels

    def random(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, dtype=decoder.dtype, device=decoder.y_pos_embedding.device)

    inputs = random(PATCH_PIXELS, channels), random(4 * values), random(values)
    exact = SimpleNamespace(norm2=deepcopy(blocks[0].norm2).float(), mlp=deepcopy(blocks[0].mlp).float())
    expected = PixelBlock.update(exact, *(t.float() for t in inputs))  # type: ignore[arg-type]

    def install(kernel: partial[None] | None) -> None:
        for block in blocks:
            block.kernel = kernel

    def in_place(kernel: partial[None]) -> Candidate:
        pixels = inputs[0].clone()  # only the first result is that of the inputs, which suffices for the comparison

        def run() -> Tensor:
            kernel(blocks[0], pixels, *inputs[1:])
            return pixels

        return Candidate(run, partial(install, kernel), MAX_ERROR, own=True)

    kernels = {f"fused, {config}": partial(update, config) for config in CONFIGS[workload.architecture]}
    plain = partial(workload.optimise(PixelBlock.update), blocks[0], *inputs)
    yield Operation(
        name="pixel update",
        shape=f"{tokens} tokens, {channels} channels per pixel",
        flops=16 * tokens * values * channels,
        nbytes=sum(t.nbytes for t in inputs) + inputs[0].nbytes,
        candidates={
            "PyTorch": Candidate(plain, partial(install, None), MAX_ERROR),
            **{name: in_place(kernel) for name, kernel in kernels.items()},
        },
        error=lambda result: relative_error(result, expected),
    )
