"""Check and measure a GPU, in under eight minutes.

python -m engines.benchmark.gpu_check --out DIR

Checks the runtime's results, then measures precisions, sizes, batches, memory, attention kernels, the reference
implementation, the roofline, TensorRT if it is installed, and the slowest kernels of a step. Needs torch, numpy,
safetensors and pydantic, and no network. Rewrites gpu_check.json and gpu_check.md after each part.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from engines.benchmark.gpu_check.config import VECTORS, Part, RunConfig
from engines.benchmark.gpu_check.findings import Finding, to_row
from engines.benchmark.gpu_check.parts import PARTS
from engines.benchmark.gpu_check.runner import IsolatedRunner, collect, run_in_process, run_parts
from engines.cli import ArgumentParser
from engines.errors import ConfigError, PidError
from engines.runtime.devices import find_device


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the command line; return the exit status: 1 if a check failed, 2 for invalid options."""
    arguments = _parser(parts).parse_args(argv)
    try:
        config = _config(arguments)
        torch.manual_seed(0)
        if arguments.child:
            name, rows = arguments.child
            _run_child(next(part for part in parts if part.name == name), config, Path(rows))
            return 0
        chosen = [part for part in parts if not arguments.parts or part.name in arguments.parts]
        # With --parts, every part keeps the limit that it has in a full check.
        seconds = arguments.seconds * sum(part.seconds for part in chosen) / sum(part.seconds for part in parts)
        run_part = run_in_process if arguments.in_process else IsolatedRunner(arguments.out)
        results = run_parts(chosen, config, arguments.out, seconds, run_part)
    except PidError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gpu_check: interrupted; the results so far are in {arguments.out}", file=sys.stderr)
        return 130
    print(arguments.out / "gpu_check.md")
    return int(any(result.status == "failed" for result in results.values()))


def _run_child(part: Part, config: RunConfig, rows: Path) -> None:
    """Run one part and append its findings to a file, one JSON object per line."""
    with rows.open("a", buffering=1) as file:  # line-buffered: findings survive if this process is killed

        def write(finding: Finding) -> None:
            print(json.dumps(to_row(finding)), file=file)

        collect(part, config, write)


def _config(arguments: argparse.Namespace) -> RunConfig:
    try:
        device = find_device(arguments.device)
    except ConfigError as error:
        raise ConfigError(f"{error} Use --device cpu --small for a rehearsal without a GPU.") from error
    if device.type != "cuda" and not arguments.small:
        raise ConfigError(f"Full-size networks take hours on {device}; add --small to use a toy network.")
    deadline = time.monotonic() + arguments.seconds
    return RunConfig(device, arguments.small, arguments.bundle, arguments.vectors, deadline)


def _parser(parts: Sequence[Part]) -> ArgumentParser:
    names, budget = [part.name for part in parts], sum(part.seconds for part in parts)
    parser = ArgumentParser(
        prog="python -m engines.benchmark.gpu_check",
        usage="%(prog)s --out DIR [options]",
        description=(__doc__ or "").split("\n")[0],
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory for the reports (required)",
    )
    add("--device", default="cuda", help="PyTorch device, cpu only with --small (default: cuda:0)")
    add("--small", action="store_true", help="use toy networks and sizes, to rehearse every part")
    add("--bundle", type=Path, metavar="DIR", help="also measure this bundle of TensorRT engines, built for this GPU")
    add("--vectors", type=Path, metavar="DIR", default=VECTORS, help="reference vectors (default: %(default)s)")
    add(
        "--parts",
        nargs="+",
        metavar="PART",
        choices=names,
        help=f"run only these parts: {', '.join(names)} (default: all)",
    )
    add("--seconds", type=float, default=budget, help="time limit for all parts together (default: %(default)g)")
    add("--in-process", action="store_true", help="run all parts in this process, without enforcing time limits")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
