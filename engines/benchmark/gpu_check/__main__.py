"""Check and measure a GPU that is available for 15 minutes.

python -m engines.benchmark.gpu_check --first --out DIR

Calls: --first checks correctness and measures decodes as the server runs them, --second measures kernels, further sizes
and batches, and runs the tests, --third measures the server. Each ends within its time. A part whose packages are
missing is skipped; --carry prints how to bring them. Writes gpu_check.json, gpu_check.md and gpu_check.log.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from engines.benchmark.gpu_check import carry, report
from engines.benchmark.gpu_check.config import VECTORS, Part, RunConfig
from engines.benchmark.gpu_check.device import find_device_in_fork
from engines.benchmark.gpu_check.findings import Result
from engines.benchmark.gpu_check.parts import CALLS
from engines.benchmark.gpu_check.runner import (
    KILL_SECONDS,
    IsolatedRunner,
    make_directory,
    process_age,
    run_child,
    run_in_process,
    run_parts,
)
from engines.cli import ArgumentParser
from engines.errors import ConfigError, PidError
from engines.runtime.devices import find_device


def main(
    argv: Sequence[str] | None = None, calls: Mapping[str, Sequence[Part]] = CALLS, already_used: float = 0.0
) -> int:
    """Run the command line.

    Args:
        argv: Arguments; by default those of this process.
        calls: The parts of each call.
        already_used: Seconds of the time limit that have passed, for example by importing PyTorch.

    Returns:
        The exit status: 1 if a check failed, 2 for invalid options.
    """
    started = time.monotonic() - already_used
    parser = _parser(calls)
    arguments = parser.parse_args(argv)
    try:
        if arguments.carry:
            print(carry.carry_instructions(arguments.carry, arguments.without))
            return 0
        if arguments.out is None:
            parser.error("the following arguments are required: --out")
        results = _run(arguments, calls, started)
    except PidError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gpu_check: interrupted; the results so far are in {arguments.out}", file=sys.stderr)
        return 130
    return int(any(result.status == "failed" for result in results.values()))


def _run(arguments: argparse.Namespace, calls: Mapping[str, Sequence[Part]], started: float) -> Mapping[str, Result]:
    torch.manual_seed(0)
    parts = [part for call in calls.values() for part in call]
    if arguments.child:
        name, rows = arguments.child
        config = _config(arguments, started + arguments.seconds - time.monotonic())  # importing PyTorch counts
        run_child(next(part for part in parts if part.name == name), config, Path(rows))
        return {}
    chosen = _chosen(arguments, calls, parts)
    if not chosen:  # needs no device
        header, merged = report.merge(_earlier(arguments))
        make_directory(arguments.out)
        report.write(arguments.out, header, parts, merged)
        print(arguments.out / report.TEXT_NAME)
        return {}
    seconds = arguments.seconds or sum(part.seconds for part in chosen)
    config = _config(arguments, seconds)
    _, earlier = report.merge(_earlier(arguments), report.header(config))
    make_directory(arguments.out)
    results = run_parts(
        chosen,
        config,
        arguments.out,
        started + seconds - KILL_SECONDS - time.monotonic(),
        run_in_process if arguments.in_process else IsolatedRunner(arguments.out),
        earlier=earlier,
        known=parts,
    )
    print(arguments.out / report.TEXT_NAME)
    return results


def _chosen(
    arguments: argparse.Namespace, calls: Mapping[str, Sequence[Part]], parts: Sequence[Part]
) -> Sequence[Part]:
    if arguments.call:
        return calls[arguments.call]
    if arguments.merge and not arguments.parts:
        return ()
    return [part for part in parts if not arguments.parts or part.name in arguments.parts]


def _earlier(arguments: argparse.Namespace) -> list[Path]:
    """Return the report in --out, if there is one, and those of --merge."""
    present = arguments.out / report.JSON_NAME
    return [*([present] if present.exists() else []), *arguments.merge]


def _config(arguments: argparse.Namespace, seconds: float) -> RunConfig:
    device = _find_device(arguments)
    if device.type != "cuda" and not arguments.small:
        raise ConfigError(f"Full-size networks take hours on {device}; add --small to use a toy network.")
    deadline = time.monotonic() + seconds
    return RunConfig(device, arguments.small, arguments.bundle, arguments.vectors, arguments.commit, deadline)


def _find_device(arguments: argparse.Namespace) -> torch.device:
    if arguments.child:
        return torch.device(arguments.device)  # tested by the parent
    try:
        return find_device(arguments.device) if arguments.in_process else find_device_in_fork(arguments.device)
    except ConfigError as error:
        raise ConfigError(f"{error} Use --device cpu --small for a rehearsal without a GPU.") from error


def _parser(calls: Mapping[str, Sequence[Part]]) -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engines.benchmark.gpu_check",
        usage="%(prog)s [--first | --second | --third | --parts PART ...] --out DIR [options]",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory for the report (required)")
    _add_calls(parser, calls)
    _add_options(parser)
    _add_carry(parser)
    return parser


_CALLS = {
    "first": "correctness, decodes of the main size, the reference, and a profile",
    "second": "kernels, tests, further sizes and batches, and TensorRT",
    "third": "the server: start, a request, memory, and a load test",
}


def _add_calls(parser: ArgumentParser, calls: Mapping[str, Sequence[Part]]) -> None:
    group = parser.add_argument_group("what to run (default: everything)").add_mutually_exclusive_group()
    for name, parts in calls.items():
        text = f"{_CALLS[name]}, in {sum(part.seconds for part in parts):g} seconds"
        group.add_argument(f"--{name}", dest="call", action="store_const", const=name, help=text)
    names = [part.name for parts in calls.values() for part in parts]
    group.add_argument("--parts", nargs="+", metavar="PART", choices=names, help=f"only these: {', '.join(names)}")


def _add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("options").add_argument
    add("--device", default="cuda", help="PyTorch device, cpu only with --small (default: cuda:0)")
    add("--small", action="store_true", help="use toy networks and sizes, to rehearse every part")
    add("--bundle", type=Path, metavar="DIR", help="also measure this bundle of TensorRT engines, built for this GPU")
    add("--vectors", type=Path, metavar="DIR", default=VECTORS, help="reference vectors (default: %(default)s)")
    add("--seconds", type=float, help="time limit of the whole call (default: the sum of its parts' limits)")
    add("--commit", metavar="TEXT", help="version of the code, for the report (default: as git describes it)")
    add(
        "--merge",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="include the results of these gpu_check.json; if nothing to run is named, only merge them",
    )
    add("--in-process", action="store_true", help="run all parts in this process, without enforcing time limits")
    add("--child", nargs=2, help=argparse.SUPPRESS)


def _add_carry(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("packages for a machine without a network").add_argument
    add(
        "--carry",
        nargs="?",
        const=carry.PYTHON,
        metavar="VERSION",
        help="print how to bring the packages that the parts need, for this version of Python "
        f"(default: {carry.PYTHON})",
    )
    add("--without", nargs="+", default=[], metavar="NAME", help="with --carry: packages that the machine has already")


if __name__ == "__main__":
    status = main(already_used=process_age())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the end of the compiler's workers and of a broken device can take longer than a part has
