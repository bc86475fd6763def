"""From options to a plan: whatever can be refused is refused here, before minutes of work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engines.bundle import check_output
from engines.compile.options import BuildOptions
from engines.compile.quantise import check_patterns
from engines.compile.targets import Target, find_target
from engines.errors import ConfigError
from engines.manifest import Package, Precision
from engines.pid.config import ROW_LIMIT
from engines.pid.released import DecoderDescription, LatentSpace, released
from engines.size import Size

DEMO = "dct-demo"  # the decoder that ships with the project


@dataclass(frozen=True)
class BuildPlan:
    """A build that nothing speaks against, as far as can be told without reading the weights."""

    description: DecoderDescription
    target: Target
    output: Path
    checkpoint: Path | None  # None: random weights
    seed: int
    precision: Precision
    sizes: tuple[Size, ...]
    max_batch: int
    empty_caption: Path | None
    calibration: Path | None  # None: what ships with the decoder, or made-up latents
    keep: tuple[str, ...]
    min_psnr: float
    force: bool
    compiler: Package | None
    keep_onnx: bool
    overwrite: bool
    warnings: tuple[str, ...]

    @property
    def random(self) -> bool:
        return self.checkpoint is None

    @property
    def demo(self) -> bool:
        """Whether the decoder is the project's own."""
        return self.description.name == DEMO

    @property
    def bundled(self) -> bool:
        """Whether the weights are those that ship with the project."""
        return self.demo and self.checkpoint == _demo_checkpoint()


def describe(name: str) -> DecoderDescription:
    """A released decoder or the one that ships with the project. Raises ConfigError for an unknown name."""
    if name != DEMO:
        try:
            return released(name)
        except ConfigError as error:
            raise ConfigError(f"{error} The decoder that ships with the project is called {DEMO}.") from error
    from engines.bundled.decoder import CAPTION_TOKENS, CONFIG

    space = LatentSpace(
        "dct",
        CONFIG.latent_channels,
        CONFIG.pixels_per_cell,
        (),
        "4×4 block DCT of YCbCr, scaled to unit variance, by engines.bundled.dct",
    )
    sizes = (Size(512, 512), Size(256, 256), Size(384, 512), Size(512, 384))
    return DecoderDescription(DEMO, CONFIG, space, sizes, max_side=512, empty_tokens=CAPTION_TOKENS)


def make_plan(options: BuildOptions, weights_done: bool = False) -> BuildPlan:
    """Settle every default and check every option. Raises ConfigError or BundleError.

    `weights_done` when a build goes on whose weights are quantised: the files they came from are not needed again.
    """
    description = describe(options.decoder)
    target = find_target(options.target)
    precision = options.precision or target.precisions[0]
    if precision not in target.precisions:
        raise ConfigError(f"{target.name} has no {precision}; choose one of {', '.join(target.precisions)}.")
    if options.max_batch < 1:
        raise ConfigError(f"The largest batch must be at least 1, got {options.max_batch}.")
    checkpoint = _checkpoint(options, weights_done)
    if not weights_done:
        _check_inputs(options)
    _check_compiling(options, target, precision)
    sizes = tuple(dict.fromkeys(options.sizes)) or _default_sizes(description)
    for size in sizes:
        description.config.latent_size(size)
    if precision == "fp8":
        check_patterns(description.config, options.keep)
    check_output(options.output, replace=options.overwrite)
    return BuildPlan(
        description=description,
        target=target,
        output=options.output,
        checkpoint=checkpoint,
        seed=options.random_seed or 0,
        precision=precision,
        sizes=sizes,
        max_batch=options.max_batch,
        empty_caption=options.empty_caption,
        calibration=options.calibration,
        keep=options.keep,
        min_psnr=options.min_psnr,
        force=options.force,
        compiler=options.compiler,
        keep_onnx=options.keep_onnx,
        overwrite=options.overwrite,
        warnings=tuple(_warnings(options, description, precision, sizes)),
    )


def _check_inputs(options: BuildOptions) -> None:
    if options.empty_caption is not None and not options.empty_caption.is_file():
        raise ConfigError(f"There is no file {options.empty_caption} with the empty caption.")
    if options.calibration is not None and not options.calibration.is_dir():
        raise ConfigError(f"There is no folder {options.calibration} of calibration latents.")


def _check_compiling(options: BuildOptions, target: Target, precision: Precision) -> None:
    for given, name in ((options.calibration, "--calibration"), (options.keep, "--keep")):
        if given and precision != "fp8":
            raise ConfigError(f"{name} is for --precision fp8; {precision} needs none.")
    if options.compiler and options.compiler not in target.compilers:
        known = ", ".join(target.compilers) or "none: nothing is compiled for it"
        raise ConfigError(f"{options.compiler} does not compile for {target.name}. Compilers for it: {known}.")
    if options.keep_onnx and not target.compiled:
        raise ConfigError(f"--keep-onnx is for compiled targets; {target.name} needs no ONNX.")


def _checkpoint(options: BuildOptions, weights_done: bool) -> Path | None:
    if options.random_seed is not None:
        if options.checkpoint is not None:
            raise ConfigError("Weights are either random or from a checkpoint, not both.")
        return None
    path = options.checkpoint or (_demo_checkpoint() if options.decoder == DEMO else None)
    if path is None:
        raise ConfigError(f"{options.decoder} needs a checkpoint file, or random weights for a benchmark.")
    if not weights_done and not path.is_file():
        raise ConfigError(f"There is no checkpoint file {path}.")
    return path


def _demo_checkpoint() -> Path:
    from engines.bundled.decoder import CHECKPOINT

    return CHECKPOINT


def _default_sizes(description: DecoderDescription) -> tuple[Size, ...]:
    # Each size costs memory and start-up time while it is served: one is enough unless told, but for tiny ones.
    return description.sizes if description.name == DEMO else description.sizes[:1]


def _warnings(
    options: BuildOptions, description: DecoderDescription, precision: Precision, sizes: tuple[Size, ...]
) -> list[str]:
    warnings = []
    if options.random_seed is not None:
        warnings.append("The weights are random: pictures are noise. For benchmarks only.")
    if options.empty_caption is None and description.name != DEMO:
        warnings.append(
            "No embedding of the empty caption was given: requests without a caption are decoded with zeros, "
            "which the decoder was not trained on."
        )
    if precision == "fp8" and options.calibration is None and description.name != DEMO:
        warnings.append(
            "No calibration latents were given: the FP8 scales come from made-up ones, and real latents may exceed "
            "them. Give a folder of latents that your diffusion model made."
        )
    if precision == "fp16":
        warnings.append("Overflow in float16 was looked for on small random latents only; bfloat16 cannot overflow.")
    for size in sizes:
        if max(size) > description.max_side:
            warnings.append(f"{size} is larger than the {description.max_side} pixels this decoder is for.")
        elif size.height > ROW_LIMIT:
            warnings.append(f"{size}: rows below {ROW_LIMIT} are outside what the decoder was trained on.")
    return warnings
