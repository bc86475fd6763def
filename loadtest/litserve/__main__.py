"""`python -m loadtest.litserve.__main__`: the same engine, encoder and client; this server and LitServe beside it.

Devices that take no time, latents of 0.5 MB, answers of 2048x2048: what remains is what a server adds. All servers are
up from the start and all but one are stopped where they are, so that each is measured alone, in turn, several times.
Throughput is measured with clients that ask again at once, latency at half of that with Poisson arrivals. A server that
does nothing but encode and send the same answers is measured likewise: what it takes is not the server's to lose. What
others on the machine did meanwhile is measured too, and a measurement that they disturbed does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from engines.errors import ConfigError, PidError
from engines.runtime.simulated import simulated_image
from engines.size import Size
from loadtest import processes
from loadtest.generator import Generator, Outcome, Run
from loadtest.http_client import Client
from loadtest.litserve import machine
from loadtest.litserve.table import FLOOR, OURS, Measured, table
from loadtest.scenario import Arrivals, RequestClass, Scenario
from loadtest.schedule import Capacity, make_schedule
from loadtest.simulated_server import find_table
from loadtest.summary import percentile
from server.images import png

SIZE = Size(2048, 2048)
KIND = RequestClass(name="2K", size=SIZE)
DISTURBED = 0.1  # cores that others use from which a measurement does not count


@dataclass
class Contestant:
    """A server with one kind of answer, and what was measured of it, a number a round."""

    name: str
    answers: str
    process: processes.Process
    client: Client
    generator: Generator
    throughput: list[float] = field(default_factory=list)  # answers a second
    server_ms: list[float] = field(default_factory=list)  # processor time an answer at full throughput
    client_ms: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)  # at half load, of all rounds
    errors: int = 0
    size: int = 0  # bytes of an answer


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.litserve.__main__", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="undisturbed measurements of each server")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of full load in a round; half load takes twice that"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="after which to stop, with the rounds there are")
    parser.add_argument("--concurrency", type=int, default=8, help="clients that find the throughput")
    parser.add_argument(
        "--pin", action="store_true", help="keep the client on one core and servers on the others (Linux)"
    )
    parser.add_argument("--output", type=Path, default=Path("loadtest-report"))
    options = parser.parse_args(arguments)
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if find_spec("litserve") is None:
            raise ConfigError("LitServe is not installed; pip install '.[litserve]' brings it.")
        measured, notes = asyncio.run(compare(options, folder))
    except PidError as error:
        print(f"compare_litserve: {error}", file=sys.stderr)
        return 2
    document = {"notes": notes, "measured": [asdict(row) for row in measured]}
    (folder / "litserve.json").write_text(json.dumps(document, indent=2) + "\n")
    print("\n".join([table(measured), *notes]))
    return 0


async def compare(options: argparse.Namespace, folder: Path) -> tuple[list[Measured], list[str]]:
    """Measure every server in turn with both kinds of answer until each has its rounds, or time is over."""
    encoding_ms = 1000 * _encoding_seconds()
    prefix = _pin() if options.pin else []
    limit, disturbed = time.monotonic() + 60 * options.minutes, 0
    async with contextlib.AsyncExitStack() as stack:
        contestants = [
            await stack.enter_async_context(contestant(name, answers, [*prefix, *command], folder))
            for name, answers, command in _commands()
        ]
        order = list(contestants)
        while min(len(one.throughput) for one in contestants) < options.rounds and time.monotonic() < limit:
            for one in order:
                if len(one.throughput) < options.rounds and time.monotonic() < limit:
                    disturbed += not await measure(one, contestants, options)
            order.reverse()  # what drifts meanwhile favours nobody
    for one in contestants:
        if not one.throughput:
            raise ConfigError(f"Others used this machine whenever {one.name} was measured; nothing can be said.")
    notes = [
        f"One encoding takes {encoding_ms:.1f} ms on an idle thread. {disturbed} measurements did not count because "
        f"others used more than {DISTURBED:g} of a core. {os.cpu_count()} cores"
        + (", the client on one, the servers on the rest." if options.pin else ", shared by client and servers.")
    ]
    return [_summary(one, encoding_ms if one.answers == "encoded" else 0.0) for one in contestants], notes


def _commands() -> list[tuple[str, str, list[str]]]:
    commands = []
    stored = len(png.encode(simulated_image(SIZE), compression="none"))
    for answers, flags, floor in (("encoded", [], []), ("pre-encoded", ["--pre-encoded"], ["--bytes", str(stored)])):
        ours = ["loadtest.simulated_server", "--log-level", "warning", "--table", "zero", *flags]
        litserve = ["loadtest.litserve.litserve_server", "--table", "zero", *flags]
        commands += [
            (OURS, answers, ours),
            ("LitServe", answers, litserve),
            ("LitServe, fast_queue", answers, [*litserve, "--fast-queue"]),
            (FLOOR, answers, ["loadtest.litserve.bytes_server", *floor]),
        ]
    return [(name, answers, [sys.executable, "-m", *command]) for name, answers, command in commands]


@contextlib.asynccontextmanager
async def contestant(name: str, answers: str, command: Sequence[str], folder: Path) -> AsyncIterator[Contestant]:
    """A server that is up, warm and held."""
    port, zero = processes.free_port(), find_table("zero")
    process = processes.Process([*command, "--port", str(port)], port, folder / "servers.log")
    await process.start("/health/ready" if name == OURS else "/health")
    client = Client(process.url)
    one = Contestant(
        name, answers, process, client, Generator(client, Capacity(zero.costs), {SIZE: zero.latent_shape(SIZE)})
    )
    try:
        warm = await one.generator.saturate(KIND, 4, 1.0)
        if not _whole(warm):
            raise ConfigError(f"{name} answered nothing: {warm.outcomes[0].error}; see {folder / 'servers.log'}.")
        one.size = _whole(warm)[0].size
        machine.hold(process.pid, True)
        yield one
    finally:
        client.close()
        members = list(machine.tree(process.pid))
        for member in members:
            with contextlib.suppress(Exception):
                member.kill()
        await process.stop(signal.SIGKILL)


async def measure(one: Contestant, contestants: Sequence[Contestant], options: argparse.Namespace) -> bool:
    """One round of one server; False if others disturbed it."""
    machine.hold(one.process.pid, False)
    one.client.close()  # what was kept alive is closed by now on the server's side, or about to be
    try:
        others = _Others(one.process.pid)
        full = await one.generator.saturate(KIND, options.concurrency, options.seconds)
        server, answers = others.server_seconds(), max(1, len(_whole(full)))
        throughput = len(_whole(full)) / full.wall_seconds
        rate = throughput / 2
        if one.name == FLOOR:  # at the load of the server that it is the floor of
            ours = next(c for c in contestants if c.name == OURS and c.answers == one.answers)
            rate = ours.throughput[-1] / 2 if ours.throughput else rate
        scenario = Scenario(
            title="half load",
            duration=2 * options.seconds,
            warm_up=0.0,
            seed=1 + len(one.throughput),
            arrivals=Arrivals(rate=rate),
            mix=(KIND,),
        )
        half = await one.generator.run(make_schedule(scenario, Capacity(find_table("zero").costs)), give_up=30)
        if others.cores() > DISTURBED:
            return False
    finally:
        machine.hold(one.process.pid, True)
    one.throughput.append(throughput)
    one.server_ms.append(1000 * server / answers)
    one.client_ms.append(1000 * full.cpu_seconds / answers)
    one.latencies_ms += [1000 * (outcome.latency or 0.0) for outcome in _whole(half)]
    one.errors += sum(outcome.kind != "in time" for run in (full, half) for outcome in run.outcomes)
    return True


class _Others:
    """How many cores are used since now by neither this process nor the server."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._server, self._own, self._busy = machine.cpu_seconds(pid), time.process_time(), machine.busy_seconds()
        self._began = time.perf_counter()

    def server_seconds(self) -> float:
        return machine.cpu_seconds(self._pid) - self._server

    def cores(self) -> float:
        ours = self.server_seconds() + time.process_time() - self._own
        return (machine.busy_seconds() - self._busy - ours) / (time.perf_counter() - self._began)


def _pin() -> list[str]:
    """Keep this process on the first core; what to put before a command to keep it on the others."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("There is one core; client and servers cannot have one each.")
    os.sched_setaffinity(0, cores[:1])
    return ["taskset", "--cpu-list", ",".join(map(str, cores[1:]))]


def _summary(one: Contestant, encoding_ms: float) -> Measured:
    p99 = percentile(one.latencies_ms, 99)
    return Measured(
        server=one.name,
        answers=one.answers,
        rounds=len(one.throughput),
        throughput=statistics.median(one.throughput),
        throughput_range=(min(one.throughput), max(one.throughput)),
        server_ms=statistics.median(one.server_ms),
        client_ms=statistics.median(one.client_ms),
        megabytes=one.size / 1e6,
        at_half_load=len(one.latencies_ms),
        p50_ms=percentile(one.latencies_ms, 50),
        p99_ms=p99,
        beyond_encoding_ms=p99 - encoding_ms,
        errors=one.errors,
    )


def _whole(run: Run) -> list[Outcome]:
    return [outcome for outcome in run.outcomes if outcome.kind == "in time"]


def _encoding_seconds() -> float:
    """Median of one encoding on one thread of an otherwise idle process."""
    png.warm_up()
    pixels, seconds = simulated_image(SIZE), []
    for _ in range(9):
        began = time.perf_counter()
        png.encode(pixels)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
