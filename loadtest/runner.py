"""Runs a scenario against a target and reports the results."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import TypeVar

from loadtest import processes
from loadtest.cost_tables import decoder_tables, find_table, output_costs, output_latents
from loadtest.faults import measures, run_faults
from loadtest.generator import Generator
from loadtest.http_client import Client
from loadtest.report import Report
from loadtest.scenario import Scenario
from loadtest.schedule import Capacity, make_schedule
from loadtest.scrape import sampling
from loadtest.summary import summarise
from loadtest.target import Target, simulated_name

_T = TypeVar("_T")


async def run_scenario(scenario: Scenario, target: Target, progress: bool = False) -> Report:
    """Send the scenario's requests to `target`, after the baseline if the scenario has one."""
    schedule = make_schedule(scenario, target.capacity)
    with contextlib.closing(Client(target.url)) as client:
        generator = Generator(client, target.capacity, target.latents, scenario.retry, target.keys)
        baseline = None
        if scenario.baseline:
            baseline = await generator.run(schedule.without_disconnects(), scenario.timeout, progress)
        async with (
            sampling(target.url) as samples,
            _during(_restart_in_turn(scenario, target)) as restarts,
            _during(_pause(scenario, target)) as pauses,
        ):
            run = await generator.run(schedule, scenario.timeout, progress)
            statuses = await restarts
            await pauses
    summary = summarise(scenario, target.capacity, run, samples, baseline)
    if any(statuses):
        summary.errors[f"drained servers exited with {statuses}"] = 1
    return Report(scenario, target.capacity, run, samples, summary, target.name)


@contextlib.asynccontextmanager
async def _during(work: Coroutine[None, None, _T]) -> AsyncIterator[asyncio.Task[_T]]:
    """Run `work` as a task that is cancelled at the end of the block."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()


async def _restart_in_turn(scenario: Scenario, target: Target) -> list[int]:
    """Restart the target's servers at the times in the scenario and return their exit statuses."""
    moments = scenario.rolling_restart.at if scenario.rolling_restart is not None else ()
    return await processes.restart_in_turn(target.servers, moments)


async def _pause(scenario: Scenario, target: Target) -> None:
    """Pause the target's servers at the times in the scenario."""
    began = time.monotonic()
    for pause in scenario.pauses:
        await asyncio.sleep(began + pause.at - time.monotonic())
        await asyncio.gather(*(server.pause(pause.seconds) for server in target.servers))


async def run_fault_scenario(
    scenario: Scenario, table_name: str, devices: int, folder: Path, progress: bool = False
) -> Report:
    """Inject the scenario's faults, one after another, into servers on simulated devices."""
    table, port = find_table(table_name), processes.free_port()
    tables = decoder_tables(table, scenario.decoders)
    capacity = Capacity(output_costs(tables), devices)

    def make_server(flags: Sequence[str]) -> processes.Process:
        return processes.simulated_server(table_name, devices, flags, folder / "server.log", port)

    schedule = make_schedule(scenario, capacity)
    with contextlib.closing(Client(f"http://127.0.0.1:{port}")) as client:
        generator = Generator(client, capacity, output_latents(tables), scenario.retry)
        run, samples, results = await run_faults(scenario, schedule, make_server, generator, progress)
    summary = summarise(scenario, capacity, run, samples, more=measures(results))
    return Report(scenario, capacity, run, samples, summary, simulated_name(table), results)
