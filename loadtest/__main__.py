"""`python -m loadtest --scenario FILE`: put a decode server under load and report what its clients observed."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path

from engines.cli import ArgumentParser, program_name
from engines.errors import ConfigError, PidError
from loadtest.cost_tables import table_names
from loadtest.keys import read_keys
from loadtest.report import Report
from loadtest.runner import run_fault_scenario, run_scenario
from loadtest.scenario import Scenario, find_scenario, load_scenario, scenario_names
from loadtest.target import running_target, simulated_target


def run() -> int:
    """Run the load test with the arguments of the process; return as `main`."""
    return main(sys.argv[1:])


def main(arguments: Sequence[str]) -> int:
    """Run a scenario; return 0 if every threshold holds, 1 if not, and 2 if the run was impossible."""
    options = _parser().parse_args(arguments)
    try:
        scenario = load_scenario(find_scenario(options.scenario), options.duration)
        folder = options.output.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        report = _run_event_loop(_run(scenario, options, folder))
    except PidError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    print(report.table())
    print("\n" + "\n".join(map(str, report.write(folder))))
    return 0 if report.summary.passed else 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=program_name("pid-loadtest", "python -m loadtest"),
        usage="%(prog)s (--url URL | --simulate TABLE) --scenario SCENARIO [options]",
        description="Put a decode server under load.",
    )
    server = parser.add_argument_group("server")
    target = server.add_mutually_exclusive_group(required=True)
    target.add_argument("--url", help="test a running server, http://HOST:PORT")
    tables = ", ".join(table_names())
    target.add_argument(
        "--simulate", metavar="TABLE", help=f"start a server on simulated devices; cost table: {tables}, or a JSON file"
    )
    server.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="COUNT",
        help="devices to simulate, or that the server at --url has (default: %(default)s)",
    )
    server.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="API keys of the server at --url, one name:key per line; simulated servers get a file of random keys",
    )
    add = parser.add_argument_group("test").add_argument
    names = ", ".join(scenario_names())
    add("--scenario", required=True, help=f"what to send: {names}, or a TOML file (required)")
    add("--duration", type=float, metavar="SECONDS", help="time to send requests (default: as in the scenario)")
    add(
        "--output",
        type=Path,
        default=Path("loadtest-report"),
        metavar="DIR",
        help="directory for the report (default: %(default)s)",
    )
    return parser


def _run_event_loop(test: Coroutine[None, None, Report]) -> Report:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(test)
    return uvloop.run(test)


async def _run(scenario: Scenario, options: argparse.Namespace, folder: Path) -> Report:
    progress = sys.stderr.isatty()
    if options.simulate is not None and options.api_keys is not None:
        raise ConfigError(
            "--api-keys is for a server at --url; simulated servers get the keys that the scenario names."
        )
    if scenario.faults:
        if options.simulate is None:
            raise ConfigError("Faults can only be injected into simulated servers; run this scenario with --simulate.")
        return await run_fault_scenario(scenario, options.simulate, options.devices, folder, progress)
    if options.simulate is None:
        keys = {} if options.api_keys is None else read_keys(options.api_keys)
        context = running_target(scenario, options.url, options.devices, keys)
    else:
        context = simulated_target(scenario, options.simulate, options.devices, folder)
    async with context as target:
        return await run_scenario(scenario, target, progress)


if __name__ == "__main__":
    sys.exit(run())
