"""`python -m loadtest --scenario FILE`: put a server under load and report what its clients saw."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import ConfigError, PidError
from engines.runtime.simulated import SimulatedCost, SimulatedTable
from engines.size import Size
from loadtest import processes
from loadtest.faults import measures, run_faults
from loadtest.generator import Generator
from loadtest.http_client import Client
from loadtest.report import Report
from loadtest.scenario import Scenario, load_scenario
from loadtest.schedule import Capacity, make_schedule
from loadtest.scrape import sampling
from loadtest.simulated_server import find_table
from loadtest.summary import summarise

SCENARIOS = Path(__file__).parent / "scenarios"


@dataclass(frozen=True)
class Target:
    """A server under test, and what is known of it."""

    url: str
    capacity: Capacity
    latents: dict[Size, tuple[int, ...]]
    name: str
    servers: tuple[processes.Process, ...] = ()  # those behind nginx


def main(arguments: Sequence[str]) -> int:
    """0 if every threshold holds, 1 if not, 2 if there was no run."""
    options = _parser().parse_args(arguments)
    try:
        scenario = load_scenario(_scenario_path(options.scenario), options.duration)
        output = (options.output or Path("loadtest-report")).resolve()
        output.mkdir(parents=True, exist_ok=True)
        report = _event_loop_run(_test(scenario, options, output))
    except PidError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    print(report.table())
    print("\n" + "\n".join(map(str, report.write(output))))
    return 0 if report.summary.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description="Put a decode server under load.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--url", help="a running server, http://host:port")
    target.add_argument("--simulate", metavar="TABLE", help="start one on simulated devices: gb200, h200, rtx5090, …")
    parser.add_argument("--scenario", required=True, help="a file, or the name of one in loadtest/scenarios")
    parser.add_argument("--devices", type=int, default=1, help="devices that the server has, or should simulate")
    parser.add_argument("--duration", type=float, help="seconds, instead of the scenario's")
    parser.add_argument("--output", type=Path, help="folder for the report [loadtest-report]")
    return parser


def _scenario_path(name: str) -> Path:
    known = SCENARIOS / f"{name}.toml"
    return known if known.is_file() else Path(name)


def _event_loop_run(test: Any) -> Report:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(test)
    return uvloop.run(test)


async def _test(scenario: Scenario, options: argparse.Namespace, output: Path) -> Report:
    if scenario.faults:
        return await _test_faults(scenario, options, output)
    async with _target(scenario, options, output) as target:
        return await run_scenario(scenario, target, progress=sys.stderr.isatty())


@contextlib.asynccontextmanager
async def _target(scenario: Scenario, options: argparse.Namespace, output: Path) -> AsyncIterator[Target]:
    async with contextlib.AsyncExitStack() as stack:
        if options.simulate is None:
            if scenario.rolling_restart is not None:
                raise ConfigError("A rolling restart replaces the servers it tests; run it with --simulate.")
            yield await inspect(options.url, options.devices)
            return
        table = find_table(options.simulate)  # before anything is started
        name = _name(table)

        def start(number: int) -> contextlib.AbstractAsyncContextManager[processes.Process]:
            flags = scenario.flags
            return processes.simulated_server(options.simulate, options.devices, flags, output, f"server-{number}")

        if scenario.rolling_restart is None:
            server = await stack.enter_async_context(start(0))
            yield await inspect(server.url, options.devices, table.costs, name)
            return
        servers = [await stack.enter_async_context(start(number)) for number in range(2)]
        proxy = await stack.enter_async_context(processes.nginx(servers, output))
        target = await inspect(proxy.url, 2 * options.devices, table.costs, f"2 x {name} behind nginx")
        yield Target(target.url, target.capacity, target.latents, target.name, tuple(servers))


async def _test_faults(scenario: Scenario, options: argparse.Namespace, output: Path) -> Report:
    if options.simulate is None:
        raise ConfigError("Faults are for simulated servers alone; run this scenario with --simulate.")
    table, port = find_table(options.simulate), processes.free_port()
    capacity = Capacity(table.costs, options.devices)
    client = Client(f"http://127.0.0.1:{port}")
    latents = {size: table.latent_shape(size) for size in table.costs}
    generator = Generator(client, capacity, latents, scenario.retry)

    def server(flags: Sequence[str]) -> processes.Process:
        return processes.simulated_process(options.simulate, options.devices, flags, output / "server.log", port)

    plan, progress = make_schedule(scenario, capacity), sys.stderr.isatty()
    run, samples, results = await run_faults(scenario, plan, server, generator, progress)
    client.close()
    summary = summarise(scenario, capacity, run, samples, more=measures(results))
    return Report(scenario, capacity, run, samples, summary, _name(table), results)


def _name(table: SimulatedTable) -> str:
    return f"{table.name} (simulated{', estimated' if table.estimated else ''})"


async def inspect(
    url: str, devices: int = 1, costs: dict[Size, SimulatedCost] | Any = None, name: str | None = None
) -> Target:
    """What the server at `url` decodes, by its /info; its own measured costs if none are given."""
    client = Client(url)
    try:
        _, body = await client.get("/info")
        info = json.loads(body)
        channels = info["latent_space"]["channels"]
        latents = {Size(*size["output"]): (channels, *size["latent"]) for size in info["sizes"]}
        if costs is None:
            costs = _measured(info["costs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"There is no decode server at {url}: {error}.") from None
    finally:
        client.close()
    return Target(url, Capacity(costs, devices), latents, name or f"{info['device']} at {url}")


def _measured(costs: list[dict[str, Any]]) -> dict[Size, SimulatedCost]:
    stages: dict[Size, dict[str, float]] = {}
    for cost in costs:
        if cost["batch"] == 1 and cost["stage"] != "encode":
            stages.setdefault(Size(*cost["size"]), {})[cost["stage"]] = cost["seconds"]
    return {size: SimulatedCost(**seconds) for size, seconds in stages.items()}


async def run_scenario(scenario: Scenario, target: Target, progress: bool = False) -> Report:
    """Send the scenario's plan to `target`, after its baseline where it has one."""
    plan = make_schedule(scenario, target.capacity)
    client = Client(target.url)
    generator = Generator(client, target.capacity, target.latents, scenario.retry)
    baseline = None
    if scenario.baseline:
        baseline = await generator.run(plan.without_leavers(), scenario.timeout, progress)
    restarts = None
    try:
        async with sampling(Client(target.url)) as samples:
            if scenario.rolling_restart is not None:
                restarts = asyncio.create_task(processes.restart_in_turn(target.servers, scenario.rolling_restart.at))
            run = await generator.run(plan, scenario.timeout, progress)
            statuses = await restarts if restarts is not None else []
    finally:
        client.close()
        if restarts is not None:
            restarts.cancel()
    summary = summarise(scenario, target.capacity, run, samples, baseline)
    if any(statuses):
        summary.errors[f"drained servers ended with {statuses}"] = 1
    return Report(scenario, target.capacity, run, samples, summary, target.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
