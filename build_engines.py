"""Command line that builds a bundle, the directory that the server decodes from. See --help."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO, get_args

import engines
from engines.bundled import decoder as bundled
from engines.cli import ArgumentParser, program_name
from engines.compile.build import build, resume
from engines.compile.interrupts import Interrupts, exit_status
from engines.compile.planning.estimate import format_estimate
from engines.compile.planning.options import RELEASED, AttentionOption, BuildOptions, Compiler, Released
from engines.compile.planning.plan import make_plan
from engines.compile.planning.targets import TARGETS
from engines.compile.progress import shown_on
from engines.compile.report import format_summary
from engines.errors import PidError
from engines.manifest import Precision
from engines.pid.released import released_names
from engines.size import Size, size_argument
from engines.size_profiles import SizeRange


def main(argv: Sequence[str] | None = None) -> int:
    """Run the builder's command line.

    Returns:
        Exit status: 0 for success; 2 if an option is invalid or a stage failed, with one line on stderr; 128 plus the
        number of the signal (130 for SIGINT, 143 for SIGTERM) if interrupted. No bundle is written unless the status
        is 0.
    """
    command_line = parser()
    arguments = command_line.parse_args(argv)
    try:
        with Interrupts() as interrupts, shown_on(sys.stderr, interrupts.check) as progress:
            if arguments.resume is not None:
                _reject_other_options(command_line, arguments)
                finished = resume(arguments.resume, progress)
            else:
                options = _options(command_line, arguments)
                if arguments.dry_run:
                    print(format_estimate(make_plan(options)))
                    return 0
                finished = build(options, progress)
    except PidError as error:
        return _fail(str(error), error, 2)
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        return _fail(f"{file}{error.strerror or error}.", error, 2)
    except KeyboardInterrupt as error:
        return _fail("interrupted; no bundle was written.", error, exit_status(error))
    _print(format_summary(finished.bundle, finished.report), sys.stdout)
    return 0


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(
        prog=program_name("pid-build-engines", "build_engines.py"),
        usage="%(prog)s --decoder NAME --target TARGET --output DIR [options]\n       %(prog)s --resume DIR",
        description="Turn a PiD checkpoint into a bundle, the directory that the server loads.",
        epilog=f"Decoders: {bundled.NAME} (ships with the project), {', '.join(released_names())}. "
        "The name of a diffusion model, in any spelling (Z-Image-Turbo, flux2_klein_4b, krea2, …), selects the newest "
        "decoder for its latents; docs/engines.md lists the models.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {engines.__version__}")
    _add_decoder_options(parser)
    _add_target_options(parser)
    _add_size_options(parser)
    _add_quality_options(parser)
    _add_output_options(parser)
    return parser


def _add_decoder_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("decoder").add_argument
    add("--decoder", metavar="NAME", help="name of the decoder (cannot be inferred from the checkpoint); see below")
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights of the distilled network, .pth or .safetensors "
        f"(default for {bundled.NAME}: the weights that ship with it)",
    )
    add("--random-weights", action="store_true", help="use random weights instead of a checkpoint, for benchmarks")
    add("--seed", type=int, default=0, help="seed of --random-weights (default: %(default)s)")
    add(
        "--empty-caption",
        type=Path,
        metavar="FILE",
        help="safetensors file with a tensor caption [tokens, width], the text encoder's output for the empty caption, "
        "as python -m engines.captions writes it (required for released decoders; "
        f"default for {bundled.NAME} and for random weights: zeros)",
    )
    add(
        "--zero-caption",
        action="store_true",
        help="use zeros as the empty caption of a released decoder, although it was not trained on them",
    )


def _add_target_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("target and precision").add_argument
    add(
        "--target",
        metavar="TARGET",
        help=f"device to build for: {', '.join(TARGETS)}; PyTorch runs the weights on cpu and cuda, TensorRT engines "
        "are compiled for the others",
    )
    add(
        "--precision",
        choices=get_args(Precision),
        help="precision of the weights; fp8 and fp4 quantise the large linear layers, as far as the images reach "
        "--min-psnr, and leave the others in bf16; fp16 and fp32 are for cpu and cuda only, fp4 is not for h200 "
        "(default: fp32 for cpu, bf16 otherwise)",
    )
    add(
        "--compiler",
        choices=get_args(Compiler),
        help="TensorRT package that compiles exported ONNX graphs, or torch-tensorrt, which needs no ONNX but a GPU "
        "(default: the first package that can compile for the target on this machine)",
    )


def _add_size_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("sizes").add_argument
    add(
        "--sizes",
        type=_sizes,
        default=(),
        metavar="SIZES",
        help=f"output sizes, HEIGHTxWIDTH in pixels, such as 2048x2048,1536x2688; {RELEASED} stands for all that the "
        f"decoder is intended for (default: the decoder's main size; all sizes for {bundled.NAME})",
    )
    add(
        "--size-range",
        type=_size_range,
        metavar="MIN-MAX",
        help="let the engines also run sizes that --sizes does not list, with sides from MIN to MAX pixels such as "
        "1024-4096; select them with the server's --sizes",
    )
    add("--max-batch", type=int, default=1, metavar="COUNT", help="maximum images per step (default: %(default)s)")


def _add_quality_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("quality").add_argument
    add(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="for fp8, fp4 and fp16: directory of safetensors files, each with a latent [c, h, w] and optionally a "
        "caption [tokens, width] and a sigma, to set the scales of fp8 and fp4 or to check the range of fp16 (default: "
        f"synthetic latents; for {bundled.NAME} the photo that ships with it)",
    )
    add(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="for fp8 and fp4: leave the layers and attentions that match PATTERN in bf16, such as "
        "'pixel_blocks.*.expand_from_attn' or 'patch_blocks.0.attn'; may be repeated",
    )
    add(
        "--attention",
        choices=get_args(AttentionOption),
        help="for fp8 and fp4: precision of the attention; auto uses fp8 where it is faster, as far as the calibration "
        "images reach --min-psnr (default: auto)",
    )
    add(
        "--fp4-share",
        type=float,
        metavar="SHARE",
        help="for fp4: maximum share, from 0 to 1, of the quantised weights in FP4; the layers with the largest errors "
        "are in FP8 instead (default: 1)",
    )
    add(
        "--min-psnr",
        type=float,
        default=BuildOptions.min_psnr,
        metavar="DB",
        help="minimum mean PSNR of the calibration images with quantised layers against those without, which decides "
        "how many layers are in FP4, FP8 and 16 bit; also the minimum PSNR of engines against PyTorch "
        "(default: %(default)g)",
    )
    add("--force", action="store_true", help="write the bundle even if its images are below --min-psnr")


def _add_output_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, metavar="DIR", help="bundle to create, a directory")
    add("--keep-onnx", action="store_true", help="include the exported graphs in the bundle")
    add("--overwrite", action="store_true", help="replace an existing bundle or an interrupted build")
    add(
        "--dry-run",
        action="store_true",
        help="print the stages, the memory and disk space that they need, and the machines that can run them, without "
        "building",
    )
    add("--resume", type=Path, metavar="DIR", help="continue the interrupted build in DIR; not with other options")


def _fail(message: str, error: BaseException, status: int) -> int:
    _print(" ".join((f"build_engines.py: {message}", *getattr(error, "__notes__", ()))), sys.stderr)
    return status


def _print(text: str, stream: TextIO) -> None:
    with contextlib.suppress(OSError):  # the stream may be a closed pipe, or a file on the disk that is full
        print(text, file=stream, flush=True)


def _reject_other_options(parser: ArgumentParser, arguments: argparse.Namespace) -> None:
    others = [name for name, value in vars(arguments).items() if name != "resume" and value != parser.get_default(name)]
    if others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
        parser.error(f"--resume uses the options of the interrupted build; omit {names}")


def _options(parser: ArgumentParser, arguments: argparse.Namespace) -> BuildOptions:
    missing = [f"--{name}" for name in ("decoder", "target", "output") if getattr(arguments, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if arguments.random_weights and arguments.checkpoint is not None:
        parser.error("argument --random-weights: not allowed with argument --checkpoint")
    if arguments.zero_caption and arguments.empty_caption is not None:
        parser.error("argument --zero-caption: not allowed with argument --empty-caption")
    return BuildOptions(
        decoder=arguments.decoder,
        target=arguments.target,
        output=arguments.output,
        checkpoint=_absolute(arguments.checkpoint),
        random_seed=arguments.seed if arguments.random_weights else None,
        precision=arguments.precision,
        sizes=arguments.sizes,
        size_range=arguments.size_range,
        max_batch=arguments.max_batch,
        empty_caption=_absolute(arguments.empty_caption),
        zero_caption=arguments.zero_caption,
        calibration=_absolute(arguments.calibration),
        keep=tuple(arguments.keep),
        attention=arguments.attention,
        fp4_share=arguments.fp4_share,
        min_psnr=arguments.min_psnr,
        force=arguments.force,
        compiler=arguments.compiler,
        keep_onnx=arguments.keep_onnx,
        overwrite=arguments.overwrite,
    )


def _absolute(path: Path | None) -> Path | None:
    """Make a path absolute, since a build may be resumed from another working directory; keep its symbolic links.

    A link may have a name that its target lacks, as those in the cache of Hugging Face have.
    """
    return None if path is None else path.absolute()


def _sizes(text: str) -> tuple[Size | Released, ...]:
    """Read comma-separated sizes."""
    return tuple(RELEASED if part == RELEASED else size_argument(part) for part in text.split(","))


def _size_range(text: str) -> SizeRange:
    smallest, _, largest = text.partition("-")
    if not (smallest.isdecimal() and largest.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of sides such as 1024-4096")
    try:
        return SizeRange(smallest_side=int(smallest), largest_side=int(largest))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a possible range of sides in pixels") from error


def run() -> int:
    """Run the builder with the arguments of the process; return as `main`."""
    logging.getLogger("engines.runtime.trt").setLevel(logging.ERROR)  # its warnings concern the exported graph
    return main()


if __name__ == "__main__":
    sys.exit(run())
