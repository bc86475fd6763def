"""FP8 stage: calibrates and quantises a folded network, and measures the error over whole images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from engines.bundle import writing
from engines.compile import verify_fold
from engines.compile.choose_attention import choose_attention, describe_attention
from engines.compile.comparison import psnr
from engines.compile.inputs.calibrate import (
    Calibration,
    Ranges,
    calibrate,
    crop_for_device,
    decode,
    load_calibration,
    output_size,
    synthetic_calibration,
)
from engines.compile.inputs.photo_calibration import photo_calibration
from engines.compile.planning.attention import AttentionKinds
from engines.compile.planning.layer_rules import Rule, attention_kind, attention_names, network_rules
from engines.compile.planning.options import Progress
from engines.compile.planning.plan import BuildPlan
from engines.compile.results import (
    AttentionCandidate,
    AttentionResult,
    CheckResult,
    ImageResult,
    LayerResult,
    QuantisationResult,
    mean_psnr,
)
from engines.compile.sensitivity import measure_errors
from engines.compile.variants import emulate_fp8, set_fp8_attention, with_fp8
from engines.compile.verify_fold import Probe
from engines.compile.verify_onnx import verify_layer_kinds
from engines.errors import PidError
from engines.pid import FoldedDecoder
from engines.pid.blocks import attentions
from engines.pid.fp8_attention import AttentionRange
from engines.pixels import to_uint8
from engines.runtime.devices import default_device

SAVED_IMAGES = 4  # calibration images that the report shows
LAYERS_PER_REPORT = 10  # layers measured per call of the progress callback


class QualityError(PidError):
    """The images of the quantised network, or of the engines, differ too much from the reference."""

    code = "below-quality-floor"


@dataclass(frozen=True)
class QuantisationInputs:
    """Inputs of the FP8 stage."""

    plan: BuildPlan
    network: FoldedDecoder  # float32, on the CPU; the stage changes it
    probe: Probe
    expected: Tensor  # velocities of the original network for the probe
    empty_caption: Tensor  # [T, E]
    folder: Path  # for temporary files, and for the images of the report
    progress: Progress


def quantise(inputs: QuantisationInputs) -> tuple[FoldedDecoder, QuantisationResult]:
    """Quantise a network to FP8, choose the kinds of attention to compute in FP8, and measure the result.

    Returns:
        The quantised network on the CPU, and the measurements.

    Raises:
        ConfigError: A calibration file does not match the decoder.
        GraphError: An exported FP8 layer does not compute what PyTorch does.
    """
    plan, network, caption = inputs.plan, inputs.network, inputs.empty_caption
    device = default_device()
    calibration = crop_for_device(select_calibration(plan, len(caption)), network.config, device)
    possible = attention_names(network, plan.attention_kinds)
    rules = network_rules(network, plan.attention_kinds, plan.options.keep)
    layers = [name for name, rule in rules.items() if rule.fp8 and name not in possible]
    names = [name for name in possible if rules[name].fp8]

    network.to(device)
    ranges, images = calibrate(network, calibration, caption, layers, names, partial(inputs.progress, "calibrate"))
    network.to("cpu")
    quantised = with_fp8(network, ranges.inputs)

    errors = _measure_errors(inputs, ranges)
    checks: tuple[CheckResult, ...] = ()
    if plan.target.compiled:
        checks = verify_layer_kinds(network, ranges, inputs.folder, partial(inputs.progress, "check"))

    in_fp8 = quantised.to(device) if device.type == "cuda" else emulate_fp8(network, quantised)
    candidates, pictures = _choose_attention(inputs, in_fp8, ranges, calibration, images)
    chosen = _ranges_of(candidates[-1].kinds, ranges)
    quantised.to("cpu")
    set_fp8_attention(quantised, chosen)
    result = QuantisationResult(
        calibration=calibration.description,
        synthetic=calibration.synthetic,
        velocity_error=candidates[-1].velocity_error,
        pictures=pictures,
        kinds=checks,
        layers=tuple(
            _layer_result(quantised, name, rules[name], ranges, errors) for name in rules if name not in possible
        ),
        attentions=tuple(
            _attention_result(name, rules.get(name), name in chosen, ranges, errors) for name in attentions(quantised)
        ),
        candidates=candidates,
    )
    return quantised, result


def _choose_attention(
    inputs: QuantisationInputs,
    in_fp8: FoldedDecoder,
    ranges: Ranges,
    calibration: Calibration,
    images: Sequence[Tensor],
) -> tuple[tuple[AttentionCandidate, ...], tuple[ImageResult, ...]]:
    """Decide by the images of `in_fp8`, whose attentions this changes. Return the candidates, and the chosen images."""
    kinds_in_fp8 = {attention_kind(name) for name in ranges.attentions}  # --keep may exclude others
    candidates = dict.fromkeys(
        tuple(kind for kind in candidate if kind in kinds_in_fp8) for candidate in inputs.plan.attention
    )
    probe = inputs.probe.to(in_fp8.y_pos_embedding.device)
    pictures: list[ImageResult] = []

    def measure(kinds: AttentionKinds) -> AttentionCandidate:
        set_fp8_attention(in_fp8, _ranges_of(kinds, ranges))
        pictures[:] = _compare_images(inputs, in_fp8, calibration, images, describe_attention(kinds))
        velocities = verify_fold.velocities(in_fp8, probe).cpu()
        error = verify_fold.relative_errors(velocities, inputs.expected)
        return AttentionCandidate(kinds=kinds, velocity_error=error, image_psnr=mean_psnr(pictures))

    measured = choose_attention(tuple(candidates), inputs.plan.options.min_psnr, measure)
    return measured, tuple(pictures)


def _ranges_of(kinds: AttentionKinds, ranges: Ranges) -> dict[str, AttentionRange]:
    return {name: found for name, found in ranges.attentions.items() if attention_kind(name) in kinds}


def select_calibration(plan: BuildPlan, caption_tokens: int) -> Calibration:
    """Return the operator's latents, those of the bundled photo for the bundled decoder, or synthetic ones.

    Raises:
        ConfigError: A calibration file does not match the decoder.
    """
    if plan.options.calibration is not None:
        return load_calibration(plan.options.calibration, plan.decoder.config, caption_tokens)
    return photo_calibration() if plan.bundled_decoder else synthetic_calibration(plan.decoder.config)


def check_quality(plan: BuildPlan, result: QuantisationResult) -> None:
    """Compare the images decoded with FP8 with the minimum PSNR.

    Random weights are exempt: they decode to noise, whose PSNR means nothing.

    Raises:
        QualityError: The mean PSNR is too low, and the build is not forced.
    """
    options = plan.options
    if plan.random_weights or options.force or result.mean_psnr >= options.min_psnr:
        return
    measured: tuple[LayerResult | AttentionResult, ...] = (*result.layers, *result.attentions)
    worst = max((found for found in measured if found.fp8), key=lambda found: found.velocity_error or 0)
    attention = "the attention with --attention 16bit, " if result.attention else ""
    raise QualityError(
        f"With FP8 the calibration images have a PSNR of {result.mean_psnr:.1f} dB relative to those without, below "
        f"--min-psnr {options.min_psnr:g}. Leave the worst layer unquantised with --keep {worst.name}, {attention}or "
        "everything with --precision bf16; --force writes the bundle anyway."
    )


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module, including FP8 weights, which are buffers."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return parameters + sum(buffer.numel() for name, buffer in module.named_buffers() if name.endswith("weight"))


def image_files(index: int) -> tuple[str, str, str]:
    """Return the file names of a calibration image: without FP8, with FP8, their difference."""
    return f"picture-{index}.png", f"picture-{index}-fp8.png", f"picture-{index}-difference.png"


def _measure_errors(inputs: QuantisationInputs, ranges: Ranges) -> dict[str, float]:
    errors: dict[str, float] = {}
    total = len(ranges.inputs) + len(ranges.attentions)
    for name, error in measure_errors(inputs.network, ranges, inputs.probe, inputs.expected):
        errors[name] = error
        if len(errors) % LAYERS_PER_REPORT == 0 or len(errors) == total:
            inputs.progress("measure", f"error per layer and attention, {len(errors)} of {total}")
    return errors


def _compare_images(
    inputs: QuantisationInputs,
    in_fp8: FoldedDecoder,
    calibration: Calibration,
    images: Sequence[Tensor],
    attention: str,
) -> list[ImageResult]:
    """Decode the calibration samples with FP8, with the same noise as `images`, and save the first few images."""
    results = []
    for seed, (item, image) in enumerate(zip(calibration.samples, images, strict=True)):
        inputs.progress("compare", f"image {seed + 1} of {len(images)}, with and without FP8; {attention}")
        image_fp8 = decode(in_fp8, item, inputs.empty_caption, seed)
        size = output_size(item.latent, in_fp8.config)
        results.append(ImageResult(source=item.source, sigma=item.sigma, size=size, psnr=psnr(image, image_fp8)))
        if seed < SAVED_IMAGES:
            _save_images(inputs.folder, seed, image, image_fp8)
    return results


def _save_images(folder: Path, index: int, image: Tensor, image_fp8: Tensor) -> None:
    """Save an image without FP8, with FP8, and the tenfold difference on grey."""
    difference = (10 * (image_fp8 - image)).clamp(-1, 1)
    for name, pixels in zip(image_files(index), (image, image_fp8, difference), strict=True):
        with writing(folder / name):
            Image.fromarray(to_uint8(pixels).permute(1, 2, 0).numpy()).save(folder / name)


def _layer_result(
    network: FoldedDecoder, name: str, rule: Rule, ranges: Ranges, errors: Mapping[str, float]
) -> LayerResult:
    return LayerResult(
        name=name,
        fp8=rule.fp8,
        reason=rule.reason,
        parameters=count_parameters(network.get_submodule(name)),
        largest_input=ranges.inputs.get(name),
        velocity_error=errors.get(name),
    )


def _attention_result(
    name: str, rule: Rule | None, chosen: bool, ranges: Ranges, errors: Mapping[str, float]
) -> AttentionResult:
    found = ranges.attentions.get(name)
    if rule is None:
        reason = "16 bit by --attention, or the default of the target"
    elif rule.fp8 and not chosen:
        reason = "in FP8, the calibration images are below --min-psnr"
    else:
        reason = rule.reason
    return AttentionResult(
        name=name,
        fp8=chosen,
        reason=reason,
        largest=None if found is None else (found.q, found.k, found.v),
        velocity_error=errors.get(name),
    )
