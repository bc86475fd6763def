"""Build plan: the validated options with defaults. Invalid options are rejected here, before minutes of work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import get_args

from engines.bundle import check_output
from engines.bundled import decoder as bundled
from engines.compile.planning.attention import AttentionKinds, attention_candidates, attention_warnings
from engines.compile.planning.layer_rules import check_keep_patterns
from engines.compile.planning.limits import check_limits
from engines.compile.planning.options import RELEASED, BuildOptions, Released
from engines.compile.planning.paths import check_inputs, check_output_path
from engines.compile.planning.targets import Target, check_torch_tensorrt, engine_package, find_target
from engines.decoders import find_decoder
from engines.errors import ConfigError
from engines.manifest import AttentionKind, Precision, Quantised
from engines.pid.config import ROW_LIMIT, PidConfig
from engines.pid.released import DecoderDescription
from engines.size import Size
from engines.size_profiles import SizeProfile, SizeRange, check_size_range, size_profiles


@dataclass(frozen=True)
class BuildPlan:
    """Validated options of a build, with the defaults filled in."""

    options: BuildOptions  # the output without symbolic links
    decoder: DecoderDescription
    target: Target
    checkpoint: Path | None  # None: random weights
    precision: Precision
    sizes: tuple[Size, ...]  # output sizes
    attention: tuple[AttentionKinds, ...]  # candidates for FP8 attention, see `attention_candidates`
    warnings: tuple[str, ...]

    @property
    def random_weights(self) -> bool:
        """Whether the weights are random, so that decoded images are noise."""
        return self.checkpoint is None

    @property
    def quantised(self) -> Quantised | None:
        """The precision, if layers are quantised."""
        return self.precision if self.precision in ("fp8", "fp4") else None

    @property
    def layer_precisions(self) -> tuple[Quantised, ...]:
        """Precisions that quantised layers may have, if layers are quantised."""
        return ("fp8", "fp4") if self.precision == "fp4" else ("fp8",)

    @property
    def exempt_from_quality(self) -> bool:
        """Whether images may be below `--min-psnr`: with --force, and for random weights, which decode to noise."""
        return self.options.force or self.random_weights

    @property
    def bundled_decoder(self) -> bool:
        """Whether the decoder is the one that ships with the project, perhaps with other weights."""
        return self.decoder.name == bundled.NAME

    @property
    def bundled_weights(self) -> bool:
        """Whether the weights are those that ship with the project."""
        return self.bundled_decoder and self.checkpoint == bundled.CHECKPOINT

    @property
    def attention_kinds(self) -> set[AttentionKind]:
        """Kinds of attention that may be computed in FP8."""
        return set(chain(*self.attention))

    @property
    def exports_onnx(self) -> bool:
        """Whether the graphs are exported to ONNX: to compile them, or for the bundle."""
        return self.target.compiled and (self.options.compiler != "torch-tensorrt" or self.options.keep_onnx)

    @property
    def profiles(self) -> tuple[SizeProfile, ...]:
        """Optimisation profiles of the engines."""
        return size_profiles(self.sizes, self.options.size_range)

    @property
    def largest_size(self) -> Size:
        """The output size with the most pixels."""
        return max((profile.largest for profile in self.profiles), key=lambda size: size.area)


def make_plan(options: BuildOptions, weights_done: bool = False) -> BuildPlan:
    """Check every option and fill in the defaults.

    Args:
        options: Options from the command line, or of the build to resume.
        weights_done: Whether an interrupted build has already made the weights, so that their source files are no
            longer needed.

    Raises:
        ConfigError: An option is invalid.
        CheckpointError: The checkpoint is undistilled according to its path.
        BundleError: The bundle cannot be written to the output path.
    """
    options = replace(options, output=_resolve(options.output))
    decoder = find_decoder(options.decoder)
    target = find_target(options.target)
    precision = options.precision or target.precisions[0]
    if precision not in target.precisions:
        reasons: dict[Precision, str] = {
            "fp16": " TensorRT's attention kernels sum in float16, where large images overflow.",
            "fp4": " Its tensor cores do not multiply FP4; those of rtx5090 and gb200 do.",
        }
        raise ConfigError(
            f"{target.name} does not support {precision}; choose one of {', '.join(target.precisions)}."
            f"{reasons.get(precision, '')}"
        )
    checkpoint = _find_checkpoint(options, decoder)
    if not weights_done:
        check_inputs(options, checkpoint)
        _check_caption(options, decoder)
    _check_applicable(options, target, precision)
    sizes = _expand(options.sizes, decoder) or _default_sizes(decoder)
    largest = tuple(profile.largest for profile in size_profiles((), options.size_range))
    if options.size_range is not None:
        _check_range(options.size_range, decoder.config)
    check_limits(options, target, decoder.config, (*sizes, *largest), precision)
    attention: tuple[AttentionKinds, ...] = ((),)
    if precision in get_args(Quantised):
        smallest = [profile.smallest for profile in size_profiles(sizes, options.size_range)]
        random = checkpoint is None
        attention = attention_candidates(options.attention or "auto", target, options.compiler, smallest, random)
        check_keep_patterns(decoder.config, options.keep, set(chain(*attention)))
    check_output_path(options, checkpoint)
    check_output(options.output, replace=options.overwrite)
    return BuildPlan(
        options=options,
        decoder=decoder,
        target=target,
        checkpoint=checkpoint,
        precision=precision,
        sizes=sizes,
        attention=attention,
        warnings=(
            *_warnings(options, decoder, target, precision, sizes),
            *attention_warnings(attention, target, options.compiler),
        ),
    )


def _find_checkpoint(options: BuildOptions, decoder: DecoderDescription) -> Path | None:
    if options.random_seed is not None:
        if options.checkpoint is not None:
            raise ConfigError("Use either a checkpoint or random weights, not both.")
        return None
    path = options.checkpoint or (bundled.CHECKPOINT if decoder.name == bundled.NAME else None)
    if path is None:
        raise ConfigError(f"{decoder.name} needs --checkpoint FILE, or --random-weights for benchmarks.")
    return path


def _check_caption(options: BuildOptions, decoder: DecoderDescription) -> None:
    """Demand a decision on the empty caption, which is easily forgotten: without it, images are worse but no error."""
    if options.zero_caption and options.empty_caption is not None:
        raise ConfigError("Use either an empty caption or zeros, not both.")
    decided = options.zero_caption or options.empty_caption is not None
    if decided or options.random_seed is not None or decoder.name == bundled.NAME:
        return
    raise ConfigError(
        f"{decoder.name} needs --empty-caption FILE, the text encoder's output for requests without a caption. Create "
        f'it with: python -m engines.captions --text-encoder DIR --prefix FILE --text "" --output FILE. With '
        "--zero-caption the builder uses zeros, which the decoder was not trained on."
    )


def _check_range(size_range: SizeRange, config: PidConfig) -> None:
    try:
        check_size_range(size_range, config)
    except ValueError as error:
        text = str(error)
        raise ConfigError(f"{text[0].upper()}{text[1:]}.") from error


def _resolve(output: Path) -> Path:
    try:
        return output.resolve()
    except (OSError, RuntimeError) as error:  # a RuntimeError for a loop of symbolic links
        raise ConfigError(f"--output {output} is not a possible path: {error}.") from error


def _check_applicable(options: BuildOptions, target: Target, precision: Precision) -> None:
    """Reject options that the target or the precision does not use."""
    for value, name, precisions in (
        (options.calibration, "--calibration", ("fp8", "fp4", "fp16")),
        (options.keep, "--keep", ("fp8", "fp4")),
        (options.attention, "--attention", ("fp8", "fp4")),
        (options.fp4_share is not None, "--fp4-share", ("fp4",)),
    ):
        if value and precision not in precisions:
            allowed = ", ".join(precisions)
            raise ConfigError(f"{name} does not apply to --precision {precision}, only to {allowed}.")
    if options.fp4_share is not None and not 0 <= options.fp4_share <= 1:
        raise ConfigError(f"--fp4-share {options.fp4_share:g} is not a share from 0 to 1.")
    if options.compiler and not target.compiled:
        raise ConfigError(f"--compiler applies only to compiled targets; PyTorch runs the weights on {target.name}.")
    if options.compiler and options.compiler not in target.compilers:
        available = ", ".join(target.compilers)
        raise ConfigError(f"{options.compiler} cannot compile for {target.name}. Available compilers: {available}.")
    if options.size_range and not target.compiled:
        raise ConfigError(
            f"--size-range applies only to compiled targets; PyTorch runs any size on {target.name}, see the server's "
            "--sizes."
        )
    if options.compiler == "torch-tensorrt":
        check_torch_tensorrt(target)
    if options.keep_onnx and not target.compiled:
        raise ConfigError(f"--keep-onnx applies only to compiled targets; {target.name} has no ONNX files.")


def _expand(sizes: Sequence[Size | Released], decoder: DecoderDescription) -> tuple[Size, ...]:
    """Replace `released` by the sizes of the decoder, and drop duplicates."""
    groups = [decoder.sizes if size == RELEASED else (size,) for size in sizes]
    return tuple(dict.fromkeys(size for group in groups for size in group))


def _default_sizes(decoder: DecoderDescription) -> tuple[Size, ...]:
    # Each size costs memory and start-up time in the server, except for the small bundled decoder.
    return decoder.sizes if decoder.name == bundled.NAME else decoder.sizes[:1]


def _warnings(
    options: BuildOptions, decoder: DecoderDescription, target: Target, precision: Precision, sizes: tuple[Size, ...]
) -> list[str]:
    warnings = []
    if options.random_seed is not None:
        warnings.append("The weights are random, so decoded images are noise. Use this bundle only for benchmarks.")
    if options.empty_caption is None and decoder.name != bundled.NAME:
        warnings.append(
            "Requests without a caption are decoded with zeros, which the decoder was not trained on. "
            "Pass the text encoder's output for the empty caption as --empty-caption."
        )
    if precision in get_args(Quantised) and options.calibration is None and decoder.name != bundled.NAME:
        warnings.append(
            "The FP8 scales were calibrated with synthetic latents; real latents may exceed their range and be "
            "clipped. Pass latents of your diffusion model as --calibration."
        )
    if precision == "fp4" and target.compiled and engine_package(target, options.compiler) == "tensorrt":
        warnings.append("FP4 has never been compiled with the full TensorRT; the engines may not multiply it.")
    if precision == "fp16" and options.calibration is None and decoder.name != bundled.NAME:
        warnings.append(
            "The range of float16 was checked with synthetic latents; real latents may exceed it, and fail to decode. "
            "Pass latents of your diffusion model as --calibration, or use bf16."
        )
    for size in sizes:
        if max(size) > decoder.max_side:
            warnings.append(f"{size} exceeds {decoder.max_side} pixels, the longest side this decoder is intended for.")
        elif size.height > ROW_LIMIT:
            warnings.append(f"{size} has more than the {ROW_LIMIT} pixel rows that the decoder was trained on.")
    return warnings
