"""FP8 stage: calibrates and quantises a folded network, and measures the error per layer and over whole images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from engines.bundle import writing
from engines.compile import verify_fold
from engines.compile.comparison import psnr
from engines.compile.inputs.calibrate import (
    Calibration,
    calibrate,
    crop_for_device,
    decode,
    load_calibration,
    output_size,
    synthetic_calibration,
)
from engines.compile.inputs.photo_calibration import photo_calibration
from engines.compile.planning.layer_rules import Rule, assign_rules, linear_layers
from engines.compile.planning.options import Progress
from engines.compile.planning.plan import BuildPlan
from engines.compile.results import CheckResult, ImageResult, LayerResult, QuantisationResult
from engines.compile.variants import emulate_fp8, shallow_copy, with_fp8
from engines.compile.verify_fold import Probe
from engines.compile.verify_onnx import verify_layer_kinds
from engines.errors import PidError
from engines.pid import FoldedDecoder, fp8
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
    """Quantise a network to FP8 and measure the result.

    Returns:
        The quantised network on the CPU, and the measurements.

    Raises:
        ConfigError: A calibration file does not match the decoder.
        GraphError: An exported FP8 layer does not compute what PyTorch does.
    """
    plan, network, caption = inputs.plan, inputs.network, inputs.empty_caption
    device = default_device()
    calibration = crop_for_device(select_calibration(plan, len(caption)), network.config, device)
    rules = assign_rules(linear_layers(network), plan.options.keep)
    layers = [name for name, rule in rules.items() if rule.fp8]

    network.to(device)
    largest, images = calibrate(network, calibration, caption, layers, partial(inputs.progress, "calibrate"))
    network.to("cpu")
    quantised = with_fp8(network, largest)

    velocity_error = verify_fold.relative_errors(verify_fold.velocities(quantised, inputs.probe), inputs.expected)
    layer_errors = _measure_layers(inputs, largest)
    kinds: tuple[CheckResult, ...] = ()
    if plan.target.compiled:
        kinds = verify_layer_kinds(network, largest, inputs.folder, partial(inputs.progress, "check"))

    in_fp8 = quantised.to(device) if device.type == "cuda" else emulate_fp8(network, quantised)
    result = QuantisationResult(
        calibration=calibration.description,
        synthetic=calibration.synthetic,
        velocity_error=velocity_error,
        pictures=_compare_images(inputs, in_fp8, calibration, images),
        kinds=kinds,
        layers=tuple(_layer_result(network, name, rule, largest, layer_errors) for name, rule in rules.items()),
    )
    return quantised.to("cpu"), result


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
    worst = max((layer for layer in result.layers if layer.fp8), key=lambda layer: layer.velocity_error or 0)
    raise QualityError(
        f"With FP8 the calibration images have a PSNR of {result.mean_psnr:.1f} dB relative to those without, below "
        f"--min-psnr {options.min_psnr:g}. Leave the worst layer unquantised with --keep {worst.name}, or all layers "
        "with --precision bf16; --force writes the bundle anyway."
    )


def measure_layer_errors(
    network: FoldedDecoder, largest_inputs: Mapping[str, float], probe: Probe, expected: Tensor
) -> Iterator[tuple[str, float]]:
    """Measure the relative velocity error that quantising each layer alone causes.

    There are over a hundred layers, and a full-size network takes seconds per run on a CPU. Therefore only the first
    and the last step at sigma 0 are measured.

    Args:
        network: The network before quantisation, on the CPU.
        largest_inputs: Layer name -> largest |input|, for the layers to quantise.
        probe: Inputs of all timesteps and sigmas.
        expected: Velocities of the original network for `probe`.

    Yields:
        Layer name, and the larger of the errors of both steps.
    """
    copy = shallow_copy(network)
    small_probe, rows = verify_fold.first_and_last_step(probe)
    for layer, largest in largest_inputs.items():
        original = copy.get_submodule(layer)
        fp8.quantise(copy, {layer: largest})
        errors = verify_fold.image_errors(verify_fold.velocities(copy, small_probe), expected[rows])
        yield layer, errors.max().item()
        copy.set_submodule(layer, original)


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module, including FP8 weights, which are buffers."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return parameters + sum(buffer.numel() for name, buffer in module.named_buffers() if name.endswith("weight"))


def image_files(index: int) -> tuple[str, str, str]:
    """Return the file names of a calibration image: without FP8, with FP8, their difference."""
    return f"picture-{index}.png", f"picture-{index}-fp8.png", f"picture-{index}-difference.png"


def _measure_layers(inputs: QuantisationInputs, largest_inputs: Mapping[str, float]) -> dict[str, float]:
    errors: dict[str, float] = {}
    for name, error in measure_layer_errors(inputs.network, largest_inputs, inputs.probe, inputs.expected):
        errors[name] = error
        if len(errors) % LAYERS_PER_REPORT == 0 or len(errors) == len(largest_inputs):
            inputs.progress("measure", f"error per layer, {len(errors)} of {len(largest_inputs)}")
    return errors


def _compare_images(
    inputs: QuantisationInputs, in_fp8: FoldedDecoder, calibration: Calibration, images: Sequence[Tensor]
) -> tuple[ImageResult, ...]:
    """Decode the calibration samples with FP8, with the same noise as `images`, and save the first few images."""
    results = []
    for seed, (item, image) in enumerate(zip(calibration.samples, images, strict=True)):
        inputs.progress("compare", f"image {seed + 1} of {len(images)}, with and without FP8")
        image_fp8 = decode(in_fp8, item, inputs.empty_caption, seed)
        size = output_size(item.latent, in_fp8.config)
        results.append(ImageResult(source=item.source, sigma=item.sigma, size=size, psnr=psnr(image, image_fp8)))
        if seed < SAVED_IMAGES:
            _save_images(inputs.folder, seed, image, image_fp8)
    return tuple(results)


def _save_images(folder: Path, index: int, image: Tensor, image_fp8: Tensor) -> None:
    """Save an image without FP8, with FP8, and the tenfold difference on grey."""
    difference = (10 * (image_fp8 - image)).clamp(-1, 1)
    for name, pixels in zip(image_files(index), (image, image_fp8, difference), strict=True):
        with writing(folder / name):
            Image.fromarray(to_uint8(pixels).permute(1, 2, 0).numpy()).save(folder / name)


def _layer_result(
    network: FoldedDecoder, name: str, rule: Rule, largest: Mapping[str, float], errors: Mapping[str, float]
) -> LayerResult:
    return LayerResult(
        name=name,
        fp8=rule.fp8,
        reason=rule.reason,
        parameters=count_parameters(network.get_submodule(name)),
        largest_input=largest.get(name),
        velocity_error=errors.get(name),
    )
