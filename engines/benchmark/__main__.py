"""Measure a decode against the same network run the published way, and against the floor that the device sets.

python -m engines.benchmark --decoder flux-2k --random-weights --size 2048 --json result.json

The published way: float32 weights (under bf16 autocast unless the precision is fp32), modulations computed live, the
adapter at every step, the pixel blocks whole. Both run in one process, in turn, on equal weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from engines.benchmark.compare import Options, measure, prepare, table
from engines.compile.plan import describe
from engines.errors import ConfigError, PidError
from engines.manifest import Precision
from engines.size import Size, size_argument


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engines.benchmark", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--decoder", required=True, help="a released decoder's name, or dct-demo")
    add("--checkpoint", type=Path, help="weights to measure with")
    add("--random-weights", action="store_true", help="full-size noise instead: as fast, and needs no checkpoint")
    add("--size", type=size_argument, default=Size(2048, 2048), help="output side, or HEIGHTxWIDTH (default 2048)")
    add("--batch", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=get_args(Precision), help="default bf16 on CUDA, fp32 on the CPU")
    add("--repeats", type=int, default=5, help="decodes timed each way (default 5)")
    add("--decodes", type=int, default=0, help="go on to this many of ours, to see that memory does not grow")
    add("--skip-published", action="store_true", help="measure the runtime alone")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile for both ways (default on CUDA)")
    add("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        if not (arguments.checkpoint or arguments.random_weights):
            raise ConfigError("Say --checkpoint FILE, or --random-weights.")
        options = Options(
            describe(arguments.decoder),
            arguments.size,
            torch.device(arguments.device),
            arguments.batch,
            arguments.precision,
            arguments.checkpoint,
            arguments.compile,
            arguments.skip_published,
        )
        result = measure(prepare(options), arguments.repeats, arguments.decodes)
    except PidError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
