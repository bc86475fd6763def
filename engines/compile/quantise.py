"""Quantisation stage: calibrates a folded network, chooses precisions by measured errors, and quantises it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from engines.compile.choose_attention import choose_attention
from engines.compile.choose_layers import Assignment, LayerErrors, choose_mixture, mixtures, share_in_fp4
from engines.compile.compare_images import SAVED_IMAGES, Originals, Trials, attentions_of, save_images
from engines.compile.inputs.calibrate import (
    Calibration,
    Ranges,
    calibrate,
    crop_for_device,
    load_calibration,
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
    LayerResult,
    MixtureResult,
    QuantisationResult,
)
from engines.compile.sensitivity import measure_errors
from engines.compile.variants import QuantisedLayers, set_fp8_attention
from engines.compile.verify_fold import Probe
from engines.compile.verify_onnx import verify_layer_kinds
from engines.errors import PidError
from engines.manifest import LayerPrecision, Quantised
from engines.pid import FoldedDecoder
from engines.pid.blocks import attentions
from engines.runtime.devices import default_device

LAYERS_PER_REPORT = 10  # errors measured per call of the progress callback

Errors = Mapping[Quantised, Mapping[str, float]]  # precision -> name of a layer or attention -> its error


class QualityError(PidError):
    """The images of the quantised network, or of the engines, differ too much from the reference."""

    code = "below-quality-floor"


@dataclass(frozen=True)
class QuantisationInputs:
    """Inputs of the quantisation stage."""

    plan: BuildPlan
    network: FoldedDecoder  # float32, on the CPU
    probe: Probe
    expected: Tensor  # velocities of the original network for the probe
    empty_caption: Tensor  # [T, E]
    folder: Path  # for temporary files, and for the images of the report
    progress: Progress


@dataclass(frozen=True)
class _Measured:
    """What the precisions are chosen by, and what was chosen."""

    calibration: Calibration
    ranges: Ranges
    errors: Errors
    layers: Mapping[str, LayerErrors]  # those that may be quantised
    trials: Trials
    candidates: tuple[AttentionCandidate, ...]  # the last one is chosen
    mixture: Assignment

    @property
    def kinds(self) -> AttentionKinds:
        """The kinds of attention in FP8."""
        return self.candidates[-1].kinds


def quantise(inputs: QuantisationInputs) -> tuple[FoldedDecoder, QuantisationResult]:
    """Quantise a network: choose the precision of each layer and kind of attention, and measure the result.

    Returns:
        The quantised network on the CPU, and the measurements.

    Raises:
        ConfigError: A calibration file does not match the decoder.
        GraphError: An exported layer does not compute what PyTorch does.
    """
    plan, network, caption = inputs.plan, inputs.network, inputs.empty_caption
    device = default_device()
    calibration = crop_for_device(select_calibration(plan, len(caption)), network.config, device)
    possible = attention_names(network, plan.attention_kinds)
    rules = network_rules(network, plan.attention_kinds, plan.options.keep)
    names = [name for name, rule in rules.items() if rule.quantised and name not in possible]
    attention = [name for name in possible if rules[name].quantised]

    network.to(device)
    ranges, images = calibrate(network, calibration, caption, names, attention, partial(inputs.progress, "calibrate"))
    network.to("cpu")
    layers = QuantisedLayers(network, ranges.inputs)
    errors = _measure_errors(inputs, layers, ranges)
    checks: tuple[CheckResult, ...] = ()
    if plan.target.compiled:
        check = partial(inputs.progress, "check")
        checks = verify_layer_kinds(network, ranges, plan.layer_precisions, inputs.folder, check)

    originals = Originals(calibration, images, caption, inputs.probe, inputs.expected)
    trials = Trials(network, layers, ranges, originals, device, inputs.progress)
    candidates = _choose_attention(plan, trials, ranges)
    sizes = {name: _layer_errors(network, name, errors) for name in names}
    mixture = _choose_mixture(plan, trials, sizes, candidates[-1].kinds)
    measured = _Measured(calibration, ranges, errors, sizes, trials, candidates, mixture)
    save_images(inputs.folder, images, trials.decode(mixture, measured.kinds, SAVED_IMAGES))

    quantised = layers.network(mixture)
    set_fp8_attention(quantised, attentions_of(measured.kinds, ranges))
    return quantised, _result(network, rules, measured, checks)


def _result(
    network: FoldedDecoder, rules: Mapping[str, Rule], measured: _Measured, checks: tuple[CheckResult, ...]
) -> QuantisationResult:
    found = measured.trials.measure(measured.mixture, measured.kinds)
    modules = attentions(network)
    return QuantisationResult(
        calibration=measured.calibration.description,
        synthetic=measured.calibration.synthetic,
        velocity_error=found.velocity_error,
        pictures=found.pictures,
        kinds=checks,
        layers=tuple(_layer_result(network, name, rules[name], measured) for name in rules if name not in modules),
        attentions=tuple(_attention_result(name, rules.get(name), measured) for name in modules),
        candidates=measured.candidates,
        mixtures=tuple(
            MixtureResult(
                fp4_layers=list(tried.values()).count("fp4"),
                fp8_layers=list(tried.values()).count("fp8"),
                fp4_share=share_in_fp4(tried, measured.layers),
                image_psnr=other.psnr,
                chosen=tried == measured.mixture,
            )
            for tried, kinds, other in measured.trials.measured
            if kinds == measured.kinds
        ),
    )


def _choose_attention(plan: BuildPlan, trials: Trials, ranges: Ranges) -> tuple[AttentionCandidate, ...]:
    """Decide by the images with all layers in FP8. Return the candidates; the last one is chosen."""
    all_fp8: Assignment = dict.fromkeys(ranges.inputs, "fp8")
    kinds_in_fp8 = {attention_kind(name) for name in ranges.attentions}  # --keep may exclude others
    candidates = dict.fromkeys(
        tuple(kind for kind in candidate if kind in kinds_in_fp8) for candidate in plan.attention
    )

    def measure(kinds: AttentionKinds) -> AttentionCandidate:
        found = trials.measure(all_fp8, kinds)
        return AttentionCandidate(kinds=kinds, velocity_error=found.velocity_error, image_psnr=found.psnr)

    return choose_attention(tuple(candidates), plan.options.min_psnr, measure)


def _choose_mixture(
    plan: BuildPlan, trials: Trials, layers: Mapping[str, LayerErrors], kinds: AttentionKinds
) -> Assignment:
    """Return the smallest mixture whose images reach the minimum PSNR, or the smallest of all if they are noise."""
    share = 1.0 if plan.options.fp4_share is None else plan.options.fp4_share
    possible = mixtures(layers, share)
    if plan.random_weights:
        return possible[0]
    return choose_mixture(possible, plan.options.min_psnr, lambda mixture: trials.measure(mixture, kinds).psnr)


def select_calibration(plan: BuildPlan, caption_tokens: int) -> Calibration:
    """Return the operator's latents, those of the bundled photo for the bundled decoder, or synthetic ones.

    Raises:
        ConfigError: A calibration file does not match the decoder.
    """
    if plan.options.calibration is not None:
        return load_calibration(plan.options.calibration, plan.decoder.config, caption_tokens)
    return photo_calibration() if plan.bundled_decoder else synthetic_calibration(plan.decoder.config)


def check_quality(plan: BuildPlan, result: QuantisationResult) -> None:
    """Compare the images decoded by the quantised network with the minimum PSNR.

    Raises:
        QualityError: The mean PSNR is too low, and the build is not exempt.
    """
    options = plan.options
    if plan.exempt_from_quality or result.mean_psnr >= options.min_psnr:
        return
    attention = " and attention in FP8" if result.attention else ""
    advice = "leave the attention in 16 bit with --attention 16bit, or " if result.attention else ""
    raise QualityError(
        f"Even with only one layer{attention}, the calibration images have a PSNR of {result.mean_psnr:.1f} dB "
        f"relative to those without quantisation, below --min-psnr {options.min_psnr:g}. Lower the limit, {advice}"
        "use --precision bf16; --force writes the bundle anyway."
    )


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module without quantised layers, whose weights are not parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _measure_errors(inputs: QuantisationInputs, layers: QuantisedLayers, ranges: Ranges) -> Errors:
    precisions = inputs.plan.layer_precisions
    errors: dict[Quantised, dict[str, float]] = {precision: {} for precision in precisions}
    in_fp4 = sum(layers.supports(name, "fp4") for name in ranges.inputs) if "fp4" in precisions else 0
    total = len(ranges.inputs) + len(ranges.attentions) + in_fp4
    measured = measure_errors(inputs.network, layers, ranges.attentions, precisions, inputs.probe, inputs.expected)
    for count, error in enumerate(measured, start=1):
        errors[error.precision][error.name] = error.value
        if count % LAYERS_PER_REPORT == 0 or count == total:
            inputs.progress("measure", f"errors of layers and attentions, {count} of {total}")
    return errors


def _layer_errors(network: FoldedDecoder, name: str, errors: Errors) -> LayerErrors:
    parameters = count_parameters(network.get_submodule(name))
    return LayerErrors(parameters, errors["fp8"][name], errors.get("fp4", {}).get(name))


def _layer_result(network: FoldedDecoder, name: str, rule: Rule, measured: _Measured) -> LayerResult:
    precision: LayerPrecision = measured.mixture.get(name, "16bit")
    fp4_error = measured.errors.get("fp4", {}).get(name)
    smallest: LayerPrecision = "16bit" if not rule.quantised else "fp8" if fp4_error is None else "fp4"
    moved = "moved here for --min-psnr" + " or --fp4-share" * ("fp4" in measured.errors)
    return LayerResult(
        name=name,
        precision=precision,
        reason=rule.reason if precision == smallest else moved,
        parameters=count_parameters(network.get_submodule(name)),
        largest_input=measured.ranges.inputs.get(name),
        fp8_error=measured.errors["fp8"].get(name),
        fp4_error=fp4_error,
    )


def _attention_result(name: str, rule: Rule | None, measured: _Measured) -> AttentionResult:
    found = measured.ranges.attentions.get(name)
    in_fp8 = found is not None and attention_kind(name) in measured.kinds
    if rule is None:
        reason = "16 bit by --attention, or the default of the target"
    elif rule.quantised and not in_fp8:
        reason = "in FP8, the calibration images are below --min-psnr"
    else:
        reason = rule.reason
    return AttentionResult(
        name=name,
        precision="fp8" if in_fp8 else "16bit",
        reason=reason,
        largest=None if found is None else (found.q, found.k, found.v),
        fp8_error=measured.errors["fp8"].get(name),
    )
