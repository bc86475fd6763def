"""Build a bundle, the folder that the server decodes from: python build_engines.py --help"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from engines.compile.build import Report, build
from engines.compile.plan import DEMO, BuildOptions
from engines.compile.targets import TARGETS
from engines.errors import PidError
from engines.manifest import Precision
from engines.pid.config import Size
from engines.pid.released import released_names


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 built, 2 refused with a sentence on stderr, 130 interrupted with nothing written."""
    arguments = _parser().parse_args(argv)
    options = BuildOptions(
        decoder=arguments.decoder,
        target=arguments.target,
        output=arguments.output,
        checkpoint=arguments.checkpoint,
        random_seed=arguments.seed if arguments.random_weights else None,
        precision=arguments.precision,
        sizes=arguments.sizes,
        max_batch=arguments.max_batch,
        empty_caption=arguments.empty_caption,
        overwrite=arguments.overwrite,
    )
    start = time.monotonic()

    def progress(stage: str, detail: str) -> None:
        print(f"[{time.monotonic() - start:7.1f} s] {stage:<7} {detail}", file=sys.stderr, flush=True)

    try:
        print(_summary(build(options, progress)))
    except PidError as error:
        print(f"build_engines.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build_engines.py: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_engines.py",
        description="Turn a PiD checkpoint into a bundle, the folder that the server decodes from.",
        epilog=f"Decoders: {DEMO} (ships with the project), {', '.join(released_names())}, "
        "or the name of a diffusion model (zimage-turbo, flux2-klein-4b, …) for the newest decoder of its latents.",
    )
    add = parser.add_argument
    add("--decoder", required=True, metavar="NAME", help="which decoder the checkpoint is; it cannot be told by itself")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help=f".pth or .safetensors; {DEMO} has its own")
    weights.add_argument("--random-weights", action="store_true", help="a full-size network of noise, for benchmarks")
    add("--seed", type=int, default=0, help="of the random weights (default 0)")
    add("--target", required=True, metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    add("--precision", choices=get_args(Precision), help="of the weights (default fp32 for cpu, bf16 for cuda)")
    add("--sizes", type=_sizes, default=(), metavar="HxW,…", help="output HEIGHTxWIDTH in pixels, such as 2048x2048,"
        "1536x2688 (default: the decoder's most typical)")  # fmt: skip
    add("--max-batch", type=int, default=1, metavar="N", help="images that may share a step (default 1)")
    add("--empty-caption", type=Path, metavar="FILE", help="safetensors with the encoder's output for the empty caption"
        ", tensor caption [tokens, width] (default: zeros)")  # fmt: skip
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--overwrite", action="store_true", help="replace the bundle that is there")
    return parser


def _sizes(text: str) -> tuple[Size, ...]:
    """ "2048x2048,1536x2688" -> ((2048, 2048), (1536, 2688))."""

    def size(part: str) -> Size:
        height, _, width = part.strip().lower().partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise argparse.ArgumentTypeError(f"{part!r} is not HEIGHTxWIDTH, such as 2048x2048")
        return int(height), int(width)

    return tuple(size(part) for part in text.split(","))


def _summary(report: Report) -> str:
    manifest = report.bundle.manifest
    total = sum(entry.bytes for entry in manifest.files.values())
    saved = 1 - report.folded_bytes / report.live_bytes
    verification = manifest.verification
    lines = [
        f"bundle      {report.bundle.path}, {total / 1e9:.3f} GB",
        f"decoder     {manifest.decoder} for {manifest.latent_space.name} latents, {manifest.precision}",
        f"parameters  {report.live_parameters:,}, folded {report.folded_parameters:,}: {saved:.0%} fewer weight bytes",
        f"sizes       {', '.join(f'{height}x{width}' for height, width in manifest.sizes)} (HEIGHTxWIDTH), "
        f"up to {manifest.max_batch} in a batch",
        f"error       {verification.max_velocity_error:.1e} from folding, {verification.precision_error:.1e} in "
        f"{manifest.precision} (of the velocity, relative)",
        *(f"warning     {warning}" for warning in manifest.warnings),
        f"licence     {manifest.licence}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
