"""Weights stage: loads, folds and verifies the network, quantises it if requested, casts it, and saves the result."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from engines.accuracy import largest
from engines.bundle import CAPTION_KEY, DTYPES, WEIGHTS, writing
from engines.compile import verify_fold
from engines.compile.inputs.calibrate import crop_for_device
from engines.compile.inputs.load import load_decoder, load_empty_caption
from engines.compile.planning.options import Progress
from engines.compile.planning.plan import BuildPlan
from engines.compile.quantise import QuantisationInputs, check_quality, count_parameters, quantise, select_calibration
from engines.compile.results import NetworkResult
from engines.compile.variants import cast
from engines.compile.verify_fold import Probe
from engines.compile.verify_range import verify_range
from engines.manifest import Origin
from engines.pid import FoldedDecoder, fold
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.devices import default_device

CAPTION_FILE = "empty_caption.safetensors"


@dataclass(frozen=True)
class _Reference:
    """Properties of the original network that are needed after it has been folded."""

    origin: Origin
    parameters: int
    probe: Probe
    velocities: Tensor  # for the probe
    folding_errors: tuple[float, ...]  # of the folded network, per timestep


def make_weights(plan: BuildPlan, folder: Path, progress: Progress) -> NetworkResult:
    """Write the weights and the empty caption to `folder`. Peak memory is about one network in float32.

    Raises:
        CheckpointError: The checkpoint is damaged or does not match the decoder.
        ConfigError: The empty caption or a calibration file does not match the decoder.
        VerificationError: The folded network does not compute what the original one does, or overflows.
        QualityError: Quantisation changes the images too much.
    """
    caption = load_empty_caption(plan.options.empty_caption, plan.decoder.config, plan.decoder.empty_tokens)
    network, reference = _load_and_fold(plan, progress)
    folded_parameters = count_parameters(network)

    quantisation = None
    if plan.quantised:
        inputs = QuantisationInputs(plan, network, reference.probe, reference.velocities, caption, folder, progress)
        network, quantisation = quantise(inputs)
        del inputs  # frees the original network
        check_quality(plan, quantisation)

    dtype = DTYPES[plan.precision]
    progress("cast", f"unquantised parameters to {dtype}".replace("torch.", ""))
    cast(network, dtype)

    progress("verify", f"folded network in {plan.precision}")
    velocities = verify_fold.velocities(network, reference.probe)
    precision_error = largest(verify_fold.relative_errors(velocities, reference.velocities))
    if plan.precision == "fp16":
        _verify_range(plan, network, caption, progress)

    with writing(folder / WEIGHTS):
        save_file(network.state_dict(), folder / WEIGHTS)
    with writing(folder / CAPTION_FILE):
        save_file({CAPTION_KEY: caption.to(dtype).contiguous()}, folder / CAPTION_FILE)
    return NetworkResult(
        origin=reference.origin,
        live_parameters=reference.parameters,
        folded_parameters=folded_parameters,
        folded_bytes=sum(tensor.nbytes for tensor in network.state_dict().values()),
        verification=verify_fold.summarise(reference.probe, plan.precision, reference.folding_errors, precision_error),
        quantisation=quantisation,
        empty_caption_tokens=len(caption),
        empty_caption_zeros=not caption.any(),
    )


def _verify_range(plan: BuildPlan, network: FoldedDecoder, caption: Tensor, progress: Progress) -> None:
    device = default_device()
    calibration = crop_for_device(select_calibration(plan, len(caption)), network.config, device)
    value = verify_range(network.to(device), calibration, caption, partial(progress, "verify"))
    network.to("cpu")
    progress("verify", f"largest value in float16: {value:,.0f}")


def _load_and_fold(plan: BuildPlan, progress: Progress) -> tuple[FoldedDecoder, _Reference]:
    """Load the network, fold it, and verify the folded form."""
    progress(
        "load", f"{plan.decoder.name} from {plan.checkpoint or f'random weights, seed {plan.options.random_seed}'}"
    )
    decoder, origin = load_decoder(plan)
    parameters = count_parameters(decoder)

    progress("verify", f"original network, {parameters:,} parameters")
    probe = verify_fold.make_probe(plan.decoder.config)
    velocities = verify_fold.velocities(decoder, probe)

    progress("fold", f"for the timesteps {', '.join(map(str, MODEL_TIMESTEPS))}")
    network = fold(decoder, MODEL_TIMESTEPS)
    del decoder  # frees the layers that the tables replace

    progress("verify", f"folded network, {count_parameters(network):,} parameters")
    errors = verify_fold.verify_folding(network, probe, velocities)
    return network, _Reference(origin, parameters, probe, velocities, errors)
