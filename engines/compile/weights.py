"""The stage that makes the weights: load, fold, verify, calibrate and quantise where asked, cast, verify, save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.bundle import CAPTION_KEY, DTYPES, WEIGHTS
from engines.compile import quantise, verify_fold
from engines.compile.calibrate import (
    Calibration,
    calibrate,
    decode,
    fit,
    load_calibration,
    output_size,
    synthetic_calibration,
)
from engines.compile.load import load_decoder, load_empty_caption
from engines.compile.plan import BuildPlan
from engines.compile.results import CheckResult, LayerResult, NetworkResult, PictureResult, QuantisationResult
from engines.compile.verify_onnx import check_kinds, psnr
from engines.errors import PidError
from engines.pid import FoldedDecoder, fold
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.pixels import to_uint8

CAPTION_FILE = "empty_caption.safetensors"
SHOWN = 4  # calibration pictures in the report

Progress = Callable[[str, str], None]  # stage and what it does or did


class QualityError(PidError):
    """The quantised network decodes too differently from the unquantised one."""

    code = "below-quality-floor"


def prepare(plan: BuildPlan, folder: Path, progress: Progress) -> NetworkResult:
    """Write the weights and the empty caption to `folder`. Memory peaks at one network in float32.

    Raises CheckpointError, ConfigError, VerificationError, QualityError.
    """
    config = plan.description.config
    caption = load_empty_caption(plan.empty_caption, config, plan.description.empty_tokens)

    progress("load", f"{plan.description.name} from {plan.checkpoint or f'random weights, seed {plan.seed}'}")
    decoder, origin = load_decoder(plan)
    live_parameters = _count(decoder)

    progress("verify", f"live network, {live_parameters:,} parameters")
    probe = verify_fold.make_probe(config)
    expected = verify_fold.velocities(decoder, probe)

    progress("fold", f"for the times {', '.join(map(str, MODEL_TIMESTEPS))}")
    network = fold(decoder, MODEL_TIMESTEPS)
    del decoder  # and with it the layers that the tables replace

    folded_parameters = _count(network)
    progress("verify", f"folded network, {folded_parameters:,} parameters")
    folding = verify_fold.check_folding(network, probe, expected)

    quantisation = None
    if plan.precision == "fp8":
        network, quantisation = _quantise(plan, network, probe, expected, caption, folder, progress)
        _check_floor(plan, quantisation)

    progress("cast", f"what is not quantised to {DTYPES[plan.precision]}".replace("torch.", ""))
    verify_fold.cast(network, DTYPES[plan.precision])

    progress("verify", f"folded network in {plan.precision}")
    cast_error = max(verify_fold.relative_errors(verify_fold.velocities(network, probe), expected))

    save_file(network.state_dict(), folder / WEIGHTS)
    save_file({CAPTION_KEY: caption.to(DTYPES[plan.precision]).contiguous()}, folder / CAPTION_FILE)
    return NetworkResult(
        origin=origin,
        live_parameters=live_parameters,
        folded_parameters=folded_parameters,
        folded_bytes=sum(tensor.nbytes for tensor in network.state_dict().values()),
        verification=verify_fold.summarise(probe, plan.precision, folding, cast_error),
        quantisation=quantisation,
        empty_caption_tokens=len(caption),
        empty_caption_zeros=not caption.any(),
    )


def calibration_of(plan: BuildPlan, caption_tokens: int) -> Calibration:
    """The operator's latents, those of the photo that ships with the demo decoder, or made-up ones."""
    config = plan.description.config
    if plan.calibration is not None:
        return load_calibration(plan.calibration, config, caption_tokens)
    if plan.demo:
        from engines.compile.photo_calibration import photo_calibration

        return photo_calibration()
    return synthetic_calibration(config)


def _quantise(
    plan: BuildPlan,
    network: FoldedDecoder,
    probe: verify_fold.Probe,
    expected: Tensor,
    caption: Tensor,
    folder: Path,
    progress: Progress,
) -> tuple[FoldedDecoder, QuantisationResult]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calibration = fit(calibration_of(plan, len(caption)), network.config, device)
    rules = quantise.choose(quantise.linear_layers(network), plan.keep)
    layers = [name for name, rule in rules.items() if rule.fp8]

    network = network.to(device)
    largest, pictures = calibrate(network, calibration, caption, layers, lambda detail: progress("calibrate", detail))
    network = network.to("cpu")
    quantised = quantise.with_fp8(network, largest)

    together = verify_fold.relative_errors(verify_fold.velocities(quantised, probe), expected)
    alone = {}
    for name, error in quantise.sensitivities(network, largest, probe, expected):
        alone[name] = error
        if len(alone) % 10 == 0 or len(alone) == len(layers):
            progress("measure", f"the error of each layer alone, {len(alone)} of {len(layers)}")
    kinds: tuple[CheckResult, ...] = ()
    if plan.target.compiled:
        kinds = check_kinds(network, largest, folder, lambda detail: progress("check", detail))

    in_fp8 = quantised.to(device) if device.type == "cuda" else quantise.emulate(network, quantised)
    compared = []
    for seed, (one, picture) in enumerate(zip(calibration.samples, pictures, strict=True)):
        progress("compare", f"picture {seed + 1} of {len(pictures)}, with and without FP8")
        other = decode(in_fp8, one, caption, seed)
        size = output_size(one.latent, network.config)
        compared.append(PictureResult(source=one.source, sigma=one.sigma, size=size, psnr=psnr(picture, other)))
        if seed < SHOWN:
            _save_pictures(folder, seed, picture, other)
    result = QuantisationResult(
        calibration=calibration.description,
        synthetic=calibration.synthetic,
        velocity_error=together,
        pictures=tuple(compared),
        kinds=kinds,
        layers=tuple(
            LayerResult(
                name=name,
                fp8=rule.fp8,
                reason=rule.reason,
                parameters=_count(network.get_submodule(name)),
                largest_input=largest.get(name),
                velocity_error=alone.get(name),
            )
            for name, rule in rules.items()
        ),
    )
    return quantised.to("cpu"), result


def _check_floor(plan: BuildPlan, quantisation: QuantisationResult) -> None:
    """Pictures of random weights are noise, which there is no quality to protect."""
    if plan.random or plan.force or quantisation.mean_psnr >= plan.min_psnr:
        return
    worst = max((layer for layer in quantisation.layers if layer.fp8), key=lambda layer: layer.velocity_error or 0)
    raise QualityError(
        f"With FP8 the calibration's pictures are {quantisation.mean_psnr:.1f} dB from those without, below the floor "
        f"of {plan.min_psnr:g} dB. --keep {worst.name} would take the worst layer out; --precision bf16 all; --force "
        "builds it nevertheless."
    )


def picture_files(index: int) -> tuple[str, str, str]:
    """File names of a calibration picture: without FP8, with FP8, their difference."""
    return f"picture-{index}.png", f"picture-{index}-fp8.png", f"picture-{index}-difference.png"


def _save_pictures(folder: Path, index: int, picture: Tensor, in_fp8: Tensor) -> None:
    """The difference is shown ten times as strong, about grey."""
    shown = (picture, in_fp8, (10 * (in_fp8 - picture)).clamp(-1, 1))
    for name, image in zip(picture_files(index), shown, strict=True):
        Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).save(folder / name)


def _count(module: nn.Module) -> int:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return parameters + sum(buffer.numel() for name, buffer in module.named_buffers() if name.endswith("weight"))
