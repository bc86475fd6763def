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
from engines.cli import ArgumentParser
from engines.decoders import find_decoder
from engines.errors import ConfigError, PidError
from engines.manifest import Precision
from engines.runtime.devices import default_device, find_device
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
        device=find_device(arguments.device) if arguments.device else default_device(),
        batch=arguments.batch,
        precision=arguments.precision,
        checkpoint=arguments.checkpoint,
        compiled=arguments.compile,
        skip_reference=arguments.skip_reference,
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engines.benchmark",
        usage="%(prog)s --decoder NAME (--checkpoint FILE | --random-weights) [options]",
        description=(__doc__ or "").split("\n")[0],
    )
    _add_decoder_options(parser)
    _add_execution_options(parser)
    _add_measurement_options(parser)
    return parser


def _add_decoder_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("decoder").add_argument
    add("--decoder", required=True, metavar="NAME", help="name of a released decoder, or dct-demo (required)")
    add("--checkpoint", type=Path, metavar="FILE", help="weights, .pth or .safetensors")
    add("--random-weights", action="store_true", help="use random weights: same speed, no checkpoint needed")
    add(
        "--size",
        type=size_argument,
        default=Size(2048, 2048),
        help="output size, HEIGHTxWIDTH in pixels, or one number for a square (default: %(default)s)",
    )
    add("--batch", type=int, default=1, metavar="COUNT", help="images decoded together (default: %(default)s)")


def _add_execution_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("execution").add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cuda if this machine has a GPU, else cpu)")
    add("--precision", choices=get_args(Precision), help="precision of the network (default: bf16 on CUDA, else fp32)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile for both implementations (default: only on CUDA)",
    )


def _add_measurement_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("measurement").add_argument
    add("--repeats", type=int, default=5, metavar="COUNT", help="timed decodes per implementation (default: 5)")
    add(
        "--decodes",
        type=int,
        default=0,
        metavar="COUNT",
        help="continue up to this many decodes, to show whether memory grows (default: no more than the timed ones)",
    )
    add("--skip-reference", action="store_true", help="measure the serving runtime only")
    add("--skip-published", dest="skip_reference", action="store_true", help=argparse.SUPPRESS)  # former name
    add("--json", type=Path, metavar="FILE", help="also write the result to this file")


if __name__ == "__main__":
    sys.exit(main())
