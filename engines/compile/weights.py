"""Weights stage: loads, folds and verifies the network, quantises it if requested, casts it, and saves the result."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from engines.bundle import CAPTION_KEY, DTYPES, WEIGHTS
from engines.compile import verify_fold
from engines.compile.load import load_decoder, load_empty_caption
from engines.compile.options import Progress
from engines.compile.plan import BuildPlan
from engines.compile.quantise import QuantisationInputs, check_quality, count_parameters, quantise
from engines.compile.results import NetworkResult
from engines.compile.verify_fold import VerificationError
from engines.pid import FoldedDecoder, fold
from engines.pid.sampler import MODEL_TIMESTEPS

CAPTION_FILE = "empty_caption.safetensors"


def make_weights(plan: BuildPlan, folder: Path, progress: Progress) -> NetworkResult:
    """Write the weights and the empty caption to `folder`. Peak memory is one network in float32.

    Raises:
        CheckpointError: The checkpoint is damaged or does not match the decoder.
        ConfigError: The empty caption or a calibration file does not match the decoder.
        VerificationError: The folded network does not compute what the original one does, or overflows.
        QualityError: FP8 changes the images too much.
    """
    config = plan.decoder.config
    caption = load_empty_caption(plan.options.empty_caption, config, plan.decoder.empty_tokens)

    progress(
        "load", f"{plan.decoder.name} from {plan.checkpoint or f'random weights, seed {plan.options.random_seed}'}"
    )
    decoder, origin = load_decoder(plan)
    live_parameters = count_parameters(decoder)

    progress("verify", f"original network, {live_parameters:,} parameters")
    probe = verify_fold.make_probe(config)
    expected = verify_fold.velocities(decoder, probe)

    progress("fold", f"for the timesteps {', '.join(map(str, MODEL_TIMESTEPS))}")
    network = fold(decoder, MODEL_TIMESTEPS)
    del decoder  # frees the layers that the tables replace

    folded_parameters = count_parameters(network)
    progress("verify", f"folded network, {folded_parameters:,} parameters")
    folding = verify_fold.verify_folding(network, probe, expected)

    quantisation = None
    if plan.precision == "fp8":
        inputs = QuantisationInputs(plan, network, probe, expected, caption, folder, progress)
        network, quantisation = quantise(inputs)
        del inputs  # frees the network without FP8
        check_quality(plan, quantisation)

    dtype = DTYPES[plan.precision]
    progress("cast", f"parameters that are not quantised to {dtype}".replace("torch.", ""))
    cast(network, dtype)

    progress("verify", f"folded network in {plan.precision}")
    precision_error = max(verify_fold.relative_errors(verify_fold.velocities(network, probe), expected))

    save_file(network.state_dict(), folder / WEIGHTS)
    save_file({CAPTION_KEY: caption.to(dtype).contiguous()}, folder / CAPTION_FILE)
    return NetworkResult(
        origin=origin,
        live_parameters=live_parameters,
        folded_parameters=folded_parameters,
        folded_bytes=sum(tensor.nbytes for tensor in network.state_dict().values()),
        verification=verify_fold.summarise(probe, plan.precision, folding, precision_error),
        quantisation=quantisation,
        empty_caption_tokens=len(caption),
        empty_caption_zeros=not caption.any(),
    )


def cast(folded: FoldedDecoder, dtype: torch.dtype) -> None:
    """Cast the parameters in place, one at a time to save memory; the tables stay float32.

    Raises:
        VerificationError: A value is not finite in `dtype`.
    """
    for key, parameter in folded.named_parameters():
        parameter.data = parameter.data.to(dtype).contiguous()
        if not parameter.data.isfinite().all():
            name = str(dtype).removeprefix("torch.")
            raise VerificationError(f"The parameter {key} contains infinity or NaN in {name}.")
