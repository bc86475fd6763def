"""Time of the adapter by memory layout, compilation and choice of convolutions: it took longer than predicted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from engines.accuracy import relative_error
from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Finding, Measurement
from engines.benchmark.gpu_check.networks import folded_network
from engines.benchmark.gpu_check.rows import milliseconds
from engines.runtime.kernels.timing import Timer, cuda_seconds

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def adapter_variants(config: RunConfig, timer: Timer = cuda_seconds) -> Iterator[Finding]:
    """Time the adapter at the main size, in bf16. The first row is how the runtime runs it."""
    network = config.description.config
    adapter = folded_network(config).lq_proj
    shape = (1, network.latent_channels, *network.latent_size(config.main_size))
    latent = torch.randn(shape, dtype=torch.bfloat16, device=config.device)
    with torch.no_grad():
        expected = adapter(latent)[0][0]
        for (layout, memory_format), compiled in itertools.product(LAYOUTS.items(), (False, True)):
            adapter.to(memory_format=memory_format)  # type: ignore[call-overload]  # missing in the stubs of PyTorch
            run = torch.compile(adapter, dynamic=False) if compiled else adapter
            x = latent.to(memory_format=memory_format)
            for search in (False, True):
                with torch.backends.cudnn.flags(benchmark=search):
                    error = relative_error(run(x)[0][0], expected)  # compiles, and chooses the convolutions
                    yield Measurement(
                        {
                            "layout": layout,
                            "torch.compile": "yes" if compiled else "no",
                            "convolutions": "fastest of all" if search else "heuristics",
                            "ms": milliseconds(timer(lambda run=run, x=x: run(x))),  # type: ignore[misc]
                            "error": f"{error:.1e}",
                        }
                    )
