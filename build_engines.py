"""Build a bundle, the folder that the server decodes from: python build_engines.py --help"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from engines.compile.build import Report, build, resume
from engines.compile.estimate import describe
from engines.compile.options import BuildOptions
from engines.compile.plan import DEMO, make_plan
from engines.compile.targets import TARGETS
from engines.errors import PidError
from engines.manifest import Package, Precision
from engines.pid.released import released_names
from engines.size import Size, size_argument


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 built, 2 refused with a sentence on stderr, 130 interrupted; then there is no bundle."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.resume is not None:
            _resume_alone(parser, arguments)
            print(_summary(resume(arguments.resume, _Progress())))
            return 0
        options = _options(parser, arguments)
        if arguments.dry_run:
            print(describe(make_plan(options)))
            return 0
        print(_summary(build(options, _Progress())))
    except PidError as error:
        return _refuse(str(error), error, 2)
    except KeyboardInterrupt as error:
        return _refuse("interrupted; there is no bundle.", error, 130)
    return 0


def _refuse(sentence: str, error: BaseException, status: int) -> int:
    print(" ".join((f"build_engines.py: {sentence}", *getattr(error, "__notes__", ()))), file=sys.stderr)
    return status


class _Progress:
    """A line on stderr for everything that begins."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, stage: str, detail: str) -> None:
        print(f"[{time.monotonic() - self._start:7.1f} s] {stage:<9} {detail}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_engines.py",
        description="Turn a PiD checkpoint into a bundle, the folder that the server decodes from.",
        epilog=f"Decoders: {DEMO} (ships with the project), {', '.join(released_names())}, "
        "or the name of a diffusion model (zimage-turbo, flux2-klein-4b, …) for the newest decoder of its latents. "
        "For cpu and cuda PyTorch runs the weights; for the others engines are compiled.",
    )
    what = parser.add_argument_group("what to build").add_argument
    what("--decoder", metavar="NAME", help="which decoder the checkpoint is; it cannot be told by itself")
    what("--checkpoint", type=Path, metavar="FILE", help=f".pth or .safetensors; {DEMO} has its own")
    what("--random-weights", action="store_true", help="a full-size network of noise, for benchmarks")
    what("--seed", type=int, default=0, help="of the random weights (default 0)")
    what("--target", metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    what("--precision", choices=get_args(Precision), help="of the weights (default fp32 for cpu, bf16 elsewhere); "
         "fp8 quantises the large linear layers and leaves the others in bf16")  # fmt: skip
    what("--sizes", type=_sizes, default=(), metavar="HxW,…", help="output HEIGHTxWIDTH in pixels, such as 2048x2048,"
         "1536x2688 (default: the decoder's most typical)")  # fmt: skip
    what("--max-batch", type=int, default=1, metavar="N", help="images that may share a step (default 1)")
    what("--empty-caption", type=Path, metavar="FILE", help="safetensors with the encoder's output for the empty "
         "caption, tensor caption [tokens, width] (default: zeros)")  # fmt: skip
    what("--output", type=Path, metavar="DIR", help="folder to make")

    fp8 = parser.add_argument_group("fp8").add_argument
    fp8("--calibration", type=Path, metavar="DIR", help="safetensors files, each with a latent [c, h, w] and if wanted "
        "a caption [tokens, width] and a sigma")  # fmt: skip
    fp8("--keep", action="append", default=[], metavar="PATTERN", help="layers to leave in bf16, such as "
        "'pixel_blocks.*.expand_from_attn'; may be repeated")  # fmt: skip
    fp8("--min-psnr", type=float, default=BuildOptions.min_psnr, metavar="DB", help="least mean PSNR of the "
        "calibration's pictures with FP8 against those without, and of engines against PyTorch (default %(default)g: "
        "two correct bf16 implementations end 43 dB apart)")  # fmt: skip
    fp8("--force", action="store_true", help="write a bundle below that floor too; its manifest says so")

    how = parser.add_argument_group("how").add_argument
    how("--compiler", choices=get_args(Package), help="default: the first of the target's that works here")
    how("--keep-onnx", action="store_true", help="keep the exported graphs in the bundle")
    how("--overwrite", action="store_true", help="replace the bundle that is there, or an unfinished build")
    how("--dry-run", action="store_true", help="print stages, memory, disk, and where each stage can run; do nothing")
    how("--resume", type=Path, metavar="DIR", help="go on with the unfinished build in DIR; takes no other option")
    return parser


def _resume_alone(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    others = {
        action.option_strings[0]
        for action in parser._actions
        if action.dest not in ("help", "resume") and getattr(arguments, action.dest) != action.default
    }
    if others:
        parser.error(f"--resume goes on as the build was begun; it takes no {', '.join(sorted(others))}")


def _options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> BuildOptions:
    missing = [f"--{name}" for name in ("decoder", "target", "output") if getattr(arguments, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if arguments.random_weights and arguments.checkpoint is not None:
        parser.error("argument --random-weights: not allowed with argument --checkpoint")
    return BuildOptions(
        decoder=arguments.decoder,
        target=arguments.target,
        output=arguments.output,
        checkpoint=_absolute(arguments.checkpoint),
        random_seed=arguments.seed if arguments.random_weights else None,
        precision=arguments.precision,
        sizes=arguments.sizes,
        max_batch=arguments.max_batch,
        empty_caption=_absolute(arguments.empty_caption),
        calibration=_absolute(arguments.calibration),
        keep=tuple(arguments.keep),
        min_psnr=arguments.min_psnr,
        force=arguments.force,
        compiler=arguments.compiler,
        keep_onnx=arguments.keep_onnx,
        overwrite=arguments.overwrite,
    )


def _absolute(path: Path | None) -> Path | None:
    """A build may go on from another folder."""
    return None if path is None else path.resolve()


def _sizes(text: str) -> tuple[Size, ...]:
    """Read comma-separated sizes."""
    return tuple(map(size_argument, text.split(",")))


def _summary(report: Report) -> str:
    manifest, network = report.bundle.manifest, report.details.network
    total = sum(entry.bytes for entry in manifest.files.values())
    live = network.live_parameters * (4 if manifest.precision == "fp32" else 2)
    verification, quantisation = manifest.verification, manifest.quantisation
    lines = [
        f"bundle      {report.bundle.path}, {total / 1e9:.3f} GB",
        f"decoder     {manifest.decoder} for {manifest.latent_space.name} latents, {manifest.precision}",
        f"parameters  {network.live_parameters:,}, folded {network.folded_parameters:,}: "
        f"{1 - network.folded_bytes / live:.0%} fewer weight bytes",
        f"sizes       {', '.join(map(str, manifest.sizes))} (HEIGHTxWIDTH), up to {manifest.max_batch} in a batch",
        f"error       {verification.max_velocity_error:.1e} from folding, {verification.precision_error:.1e} in "
        f"{manifest.precision} (of the velocity, relative)",
    ]
    if quantisation is not None:
        over = f"{quantisation.image_psnr:.1f} dB over {quantisation.calibration}"
        lines.append(f"fp8         {quantisation.layers} layers, {over}")
    lines += (
        f"engine      {engine.graph} {engine.size}, {engine.bytes / 1e6:,.1f} MB, "
        f"by {report.details.compiler} in {engine.seconds:.1f} s"
        for engine in report.details.engines
    )
    lines += (f"warning     {warning}" for warning in manifest.warnings)
    return "\n".join((*lines, f"licence     {manifest.licence}"))


if __name__ == "__main__":
    logging.getLogger("engines.runtime.trt").setLevel(logging.ERROR)  # its warnings are for whoever wrote the graph
    sys.exit(main())
