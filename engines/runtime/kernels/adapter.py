"""Choice of the memory layout of the adapter's convolutions, and whether torch.compile compiles them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engines.accuracy import relative_error
from engines.pid.adapter import Adapter
from engines.pid.fold import FoldedDecoder
from engines.runtime.kernels.choice import Candidate, Operation
from engines.runtime.kernels.workload import Workload

MAX_ERROR = 0.02  # relative; another order of summation in bfloat16 is well below


def adapter_operations(decoder: FoldedDecoder, workload: Workload) -> Iterator[Operation]:
    """Yield the adapter for one random latent."""
    adapter, config = decoder.lq_proj, decoder.config
    shape = (1, config.latent_channels, *config.latent_size(workload.size))
    latent = torch.randn(shape, dtype=decoder.dtype, device=decoder.y_pos_embedding.device)
    channels_last = deepcopy(adapter)
    lay_out(channels_last, torch.channels_last)

    def candidate(
        run: Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor | None]], layout: torch.memory_format, compiled: bool
    ) -> Candidate:
        def install() -> None:
            lay_out(adapter, layout)
            if compiled:
                adapter.compile(dynamic=False, backend=workload.backend)

        return Candidate(lambda: run(latent)[0][0], install, MAX_ERROR)

    candidates = {
        "NCHW": candidate(adapter.forward, torch.contiguous_format, False),
        "NHWC": candidate(channels_last, torch.channels_last, False),
    }
    if workload.compiled:
        candidates["NHWC, compiled"] = candidate(workload.optimise(channels_last), torch.channels_last, True)
    with FlopCounterMode(display=False) as counter:
        tokens, _ = adapter.forward(latent)
    yield Operation(
        name="adapter",
        shape=f"latent of {'x'.join(map(str, shape[1:]))}",
        flops=counter.get_total_flops(),
        nbytes=latent.nbytes + sum(t.nbytes for t in (*adapter.parameters(), *tokens)),
        candidates=candidates,
        error=lambda result: relative_error(result, tokens[0]),
    )


def lay_out(adapter: Adapter, layout: torch.memory_format) -> None:
    """Bring the weights of the convolutions into a memory layout, in the memory where they are.

    In new memory, the former weights would leave holes in the blocks of the allocator, which remain reserved.
    """
    for layer in adapter.modules():
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.data
            rearranged = weight.contiguous(memory_format=layout)
            layer.weight.data = weight.as_strided(weight.shape, rearranged.stride()).copy_(rearranged)
