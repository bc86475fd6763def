"""Compare a decode with the reference implementation and with the lower bound of the device.

python -m engines.benchmark --decoder flux-2k --random-weights --size 2048 --json result.json

The reference runs as published: float32 weights (under bf16 autocast unless the precision is fp32), modulations and
adapter computed at every step, pixel blocks not chunked. Both implementations run in one process, in turn, on the same
weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from engines.benchmark.compare import Options, measure, prepare
from engines.decoders import find_decoder
from engines.errors import ConfigError, PidError
from engines.manifest import Precision
from engines.size import Size, size_argument


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    torch.manual_seed(0)
    try:
        result = measure(prepare(_options(arguments)), arguments.repeats, arguments.decodes)
    except PidError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    print(result.table())
    if arguments.json:
        arguments.json.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    return 0


def _options(arguments: argparse.Namespace) -> Options:
    if not (arguments.checkpoint or arguments.random_weights):
        raise ConfigError("Pass --checkpoint FILE or --random-weights.")
    return Options(
        description=find_decoder(arguments.decoder),
        size=arguments.size,
        device=torch.device(arguments.device),
        batch=arguments.batch,
        precision=arguments.precision,
        checkpoint=arguments.checkpoint,
        compiled=arguments.compile,
        skip_reference=arguments.skip_reference,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engines.benchmark", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--decoder", required=True, help="name of a released decoder, or dct-demo")
    add("--checkpoint", type=Path, help="checkpoint file with the weights")
    add("--random-weights", action="store_true", help="use random weights: same speed, no checkpoint needed")
    add("--size", type=size_argument, default=Size(2048, 2048), help="output side, or HEIGHTxWIDTH (default 2048)")
    add("--batch", type=int, default=1, help="number of images decoded together (default 1)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="device (default: cuda if available, else cpu)")
    add(
        "--precision",
        choices=get_args(Precision),
        help="precision of the runtime (default: bf16 on CUDA, fp32 on the CPU)",
    )
    add("--repeats", type=int, default=5, help="number of timed decodes per implementation (default 5)")
    add(
        "--decodes",
        type=int,
        default=0,
        help="total decodes of the runtime, to show whether memory grows (default: --repeats)",
    )
    add("--skip-reference", action="store_true", help="measure the serving runtime only")
    add("--skip-published", dest="skip_reference", action="store_true", help=argparse.SUPPRESS)  # former name
    add("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile for both (default: on CUDA)")
    add("--json", type=Path, help="also write the result to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
