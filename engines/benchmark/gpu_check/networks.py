"""Networks with random weights."""

from __future__ import annotations

from engines.benchmark.decoders import calibrate_and_quantise
from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.memory import reset_memory
from engines.bundle import DTYPES
from engines.compile.inputs.random_weights import random_decoder
from engines.compile.variants import cast
from engines.manifest import Precision
from engines.pid import FoldedDecoder, fold
from engines.pid.sampler import MODEL_TIMESTEPS


def folded_network(config: RunConfig, precision: Precision = "bf16") -> FoldedDecoder:
    """Return the folded network on the device, with random weights drawn there."""
    folded = fold(random_decoder(config.description.config, 0, config.device), MODEL_TIMESTEPS)
    cast(folded, DTYPES[precision])
    if precision == "fp8":
        calibrate_and_quantise(folded)
    if config.on_cuda:
        # Small weights would keep large blocks of the float32 weights alive; a server loads its weights into new ones.
        folded.to("cpu")
        reset_memory(config.device)
        folded.to(config.device)
    return folded
