"""Measurement of this server, LitServe and a bare server, on the same engine, encoder and client.

The devices cost no time, latents are 0.5 MB and images 2048x2048, so what remains is the overhead of the server. All
servers run from the start and all but one are suspended, so each is measured alone, in turn, for several rounds.
Throughput is measured with clients in a closed loop, latency at half of that throughput with Poisson arrivals.

A bare server that only encodes and sends the same images gives the lower bound. A round is discarded if other
processes used the machine during it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.errors import ConfigError
from engines.runtime.simulated import simulated_image
from engines.size import Size
from loadtest import processes
from loadtest.cost_tables import decoder_tables, find_table, output_costs, output_latents
from loadtest.generator import Generator, Run
from loadtest.http_client import Client
from loadtest.litserve import machine
from loadtest.litserve.table import BARE, OURS, Measured
from loadtest.outcome import Outcome, OutcomeKind
from loadtest.scenario import Arrivals, RequestClass, Scenario
from loadtest.schedule import Capacity, make_schedule
from loadtest.summary import percentile
from server.images import png

SIZE = Size(2048, 2048)
KIND = RequestClass(name="2K", size=SIZE)
MAX_OTHER_CORES = 0.1  # cores used by other processes above which a round is discarded


@dataclass(frozen=True)
class Options:
    """Extent of the comparison."""

    rounds: int  # undisturbed rounds per server
    seconds: float  # of full load per round
    minutes: float  # time limit
    concurrency: int  # clients at full load
    pin: bool  # the client to one core and the servers to the others


@dataclass
class ServerUnderTest:
    """A server with one kind of response, and its measurements, one per round."""

    name: str
    response: str
    process: processes.Process
    client: Client
    generator: Generator
    capacity: Capacity
    throughput: list[float] = field(default_factory=list)  # responses per second
    server_ms: list[float] = field(default_factory=list)  # CPU time per response at full load
    client_ms: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)  # at half load, of all rounds
    errors: int = 0
    size: int = 0  # bytes of a response

    def add_round(self, full: Run, half: Run, server_seconds: float) -> None:
        """Add the runs at full and at half load of one round.

        Args:
            full: Requests sent as fast as the server responds.
            half: Requests at half of that rate.
            server_seconds: CPU time of the server during `full`.
        """
        responses = len(_complete(full))
        self.throughput.append(responses / full.wall_seconds)
        self.server_ms.append(1000 * server_seconds / max(1, responses))
        self.client_ms.append(1000 * full.cpu_seconds / max(1, responses))
        self.latencies_ms += [1000 * (outcome.latency or 0.0) for outcome in _complete(half)]
        self.errors += sum(outcome.kind is not OutcomeKind.IN_TIME for run in (full, half) for outcome in run.outcomes)

    def result(self, encoding_ms: float) -> Measured:
        """Summarise the rounds.

        Args:
            encoding_ms: Time of one encoding on an idle thread.
        """
        p99 = percentile(self.latencies_ms, 99)
        return Measured(
            server=self.name,
            response=self.response,
            rounds=len(self.throughput),
            throughput=statistics.median(self.throughput),
            throughput_range=(min(self.throughput), max(self.throughput)),
            server_ms=statistics.median(self.server_ms),
            client_ms=statistics.median(self.client_ms),
            megabytes=self.size / 1e6,
            at_half_load=len(self.latencies_ms),
            p50_ms=percentile(self.latencies_ms, 50),
            p99_ms=p99,
            beyond_encoding_ms=p99 - encoding_ms,
            errors=self.errors,
        )


async def compare(options: Options, folder: Path) -> tuple[list[Measured], list[str]]:
    """Measure every server with both kinds of response, in turn, until all rounds are done or time is up.

    Args:
        options: Extent of the comparison.
        folder: Directory for the logs of the servers.

    Returns:
        The results and notes on how they were measured.

    Raises:
        ConfigError: A server does not start, or could never be measured undisturbed.
    """
    encoding_ms = 1000 * _encoding_seconds()
    prefix = pin_client() if options.pin else []
    limit, discarded = time.monotonic() + 60 * options.minutes, 0
    async with contextlib.AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(server_under_test(name, response, [*prefix, *command], folder))
            for name, response, command in _commands()
        ]
        order = list(servers)
        while min(len(server.throughput) for server in servers) < options.rounds and time.monotonic() < limit:
            for server in order:
                if len(server.throughput) < options.rounds and time.monotonic() < limit:
                    discarded += not await measure(server, servers, options)
            order.reverse()  # so that a drift of the machine's speed favours no server
    for server in servers:
        if not server.throughput:
            raise ConfigError(f"Other processes disturbed every round of {server.name}; repeat on an idle machine.")
    sharing = "the client on one, the servers on the others" if options.pin else "shared by client and servers"
    note = (
        f"One encoding needs {encoding_ms:.1f} ms on an idle thread. {discarded} rounds were discarded because other "
        f"processes used more than {MAX_OTHER_CORES:g} cores. {os.cpu_count()} cores, {sharing}."
    )
    return [server.result(encoding_ms if server.response == "encoded" else 0.0) for server in servers], [note]


def _commands() -> list[tuple[str, str, list[str]]]:
    """Return name, kind of response and command of every server."""
    commands = []
    stored = len(png.encode(simulated_image(SIZE), compression="none"))
    for response, flags, bare in (("encoded", [], []), ("pre-encoded", ["--pre-encoded"], ["--bytes", str(stored)])):
        ours = ["loadtest.simulated_server", "--log-level", "warning", "--table", "zero", *flags]
        litserve = ["loadtest.litserve.litserve_server", "--table", "zero", *flags]
        commands += [
            (OURS, response, ours),
            ("LitServe", response, litserve),
            ("LitServe, fast_queue", response, [*litserve, "--fast-queue"]),
            (BARE, response, ["loadtest.litserve.bare_server", *bare]),
        ]
    return [(name, response, [sys.executable, "-m", *command]) for name, response, command in commands]


@contextlib.asynccontextmanager
async def server_under_test(
    name: str, response: str, command: Sequence[str], folder: Path
) -> AsyncIterator[ServerUnderTest]:
    """Start a server, warm it up and suspend it; kill it at the end of the block."""
    port = processes.free_port()
    process = processes.Process([*command, "--port", str(port)], port, folder / "servers.log")
    client = Client(process.url)
    tables = decoder_tables(find_table("zero"))
    capacity = Capacity(output_costs(tables))
    generator = Generator(client, capacity, output_latents(tables))
    try:
        await process.start("/health/ready" if name == OURS else "/health")
        warm_up = await generator.saturate(KIND, 4, 1.0)
        responses = _complete(warm_up)
        if not responses:
            error = warm_up.outcomes[0].error
            raise ConfigError(f"No request to {name} succeeded: {error}; see {folder / 'servers.log'}.")
        machine.suspend(process.pid)
        yield ServerUnderTest(name, response, process, client, generator, capacity, size=responses[0].size)
    finally:
        client.close()
        if process.started:
            machine.kill(process.pid)
        await process.stop(signal.SIGKILL)


async def measure(server: ServerUnderTest, servers: Sequence[ServerUnderTest], options: Options) -> bool:
    """Measure one round of one server; return False, and discard the round, if other processes disturbed it."""
    machine.resume(server.process.pid)
    server.client.close()  # idle connections may have timed out on the server's side
    try:
        meter = machine.CpuMeter(server.process.pid)
        full = await server.generator.saturate(KIND, options.concurrency, options.seconds)
        server_seconds = meter.server_seconds()
        throughput = len(_complete(full)) / full.wall_seconds
        half = await _half_load(server, _half_rate(server, servers, throughput), options)
        if meter.other_cores() > MAX_OTHER_CORES:
            return False
    finally:
        machine.suspend(server.process.pid)
    server.add_round(full, half, server_seconds)
    return True


def _half_rate(server: ServerUnderTest, servers: Sequence[ServerUnderTest], throughput: float) -> float:
    """Return half of the throughput; for the bare server, half of this server's, so that both have the same load."""
    ours = next(other for other in servers if other.name == OURS and other.response == server.response)
    if server.name == BARE and ours.throughput:
        return ours.throughput[-1] / 2
    return throughput / 2


async def _half_load(server: ServerUnderTest, rate: float, options: Options) -> Run:
    scenario = Scenario(
        title="half load",
        duration=2 * options.seconds,
        warm_up=0.0,
        seed=1 + len(server.throughput),
        arrivals=Arrivals(rate=rate),
        mix=(KIND,),
    )
    return await server.generator.run(make_schedule(scenario, server.capacity), time_limit=30)


def pin_client() -> list[str]:
    """Pin this process to the first core; return the prefix of commands to be pinned to the other cores.

    Raises:
        ConfigError: Only one core is available.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("--pin needs at least two cores, but only one is available.")
    os.sched_setaffinity(0, cores[:1])
    return ["taskset", "--cpu-list", ",".join(map(str, cores[1:]))]


def _complete(run: Run) -> list[Outcome]:
    return [outcome for outcome in run.outcomes if outcome.kind is OutcomeKind.IN_TIME]


def _encoding_seconds() -> float:
    """Return the median time of one encoding on one thread of an otherwise idle process."""
    png.warm_up()
    pixels, seconds = simulated_image(SIZE), []
    for _ in range(9):
        began = time.perf_counter()
        png.encode(pixels)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
