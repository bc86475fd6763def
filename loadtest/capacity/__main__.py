"""`python -m loadtest.capacity --table gb200 --rate 30 --p99 2`: estimate by simulation how many replicas are needed.

The simulation balances by least connections, unless `--balance` names other methods. `--measure` also runs the same
requests, in real time, against as many real servers on simulated devices behind nginx.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from engines.cli import ArgumentParser
from engines.errors import ConfigError, PidError
from engines.runtime.simulated import SimulatedTable
from engines.size import Size, size_argument
from loadtest import processes
from loadtest.capacity.simulation import BALANCERS, Balance, Result, least_connections, simulate
from loadtest.cost_tables import decoder_tables, find_table, output_costs, table_names
from loadtest.generator import Generator
from loadtest.http_client import Client
from loadtest.outcome import OutcomeKind
from loadtest.scenario import Arrivals, RequestClass, Scenario
from loadtest.schedule import Capacity, Schedule, make_schedule
from loadtest.target import inspect_server

MAX_REPLICAS = 4096


def replicas_needed(
    rate: float,
    p99: float,
    table: SimulatedTable,
    mix: tuple[RequestClass, ...],
    seconds: float,
    balance: Balance = least_connections,
) -> Result:
    """Find the smallest number of replicas that rejects nothing and keeps the 99th percentile of latency.

    Args:
        rate: Requests per second.
        p99: Limit of the 99th percentile, in seconds.
        table: Costs of the device of each replica.
        mix: Classes of the requests.
        seconds: Simulated time.
        balance: The load balancer.

    Raises:
        ConfigError: No number of replicas suffices.
    """
    one = Capacity(output_costs(decoder_tables(table)))
    if p99 < max(one.service(kind) for kind in mix):
        raise ConfigError(f"A p99 of {p99:g} s is impossible: a single decode takes longer.")
    schedule = make_schedule(Scenario(title="", duration=seconds, arrivals=Arrivals(rate=rate), mix=mix), one)
    for replicas in range(max(1, int(rate / one.rate(mix))), MAX_REPLICAS):
        result = simulate(schedule, table, replicas, balance=balance)
        if not result.rejected and result.percentile(99) <= p99:
            return result
    raise ConfigError(f"More than {MAX_REPLICAS} replicas are needed; lower the rate or raise the p99.")


async def measure(schedule: Schedule, table_name: str, replicas: int) -> Result:
    """Send `schedule` to real servers on simulated devices behind nginx.

    Raises:
        ConfigError: nginx is not installed, a server does not start, or a request fails.
    """
    table = find_table(table_name)
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = []
        for number in range(replicas):
            server = processes.simulated_server(table_name, 1, (), folder / f"{number}.log")
            servers.append(await stack.enter_async_context(processes.started(server)))
        proxy = await stack.enter_async_context(processes.nginx(servers, folder))
        target = await inspect_server(proxy.url, replicas, decoder_tables(table))
        client = stack.enter_context(contextlib.closing(Client(target.url)))
        run = await Generator(client, target.capacity, target.latents).run(schedule, time_limit=120.0)
    errors = [outcome.error for outcome in run.outcomes if outcome.kind is OutcomeKind.ERROR]
    if errors:
        raise ConfigError(f"{len(errors)} requests failed; the first error: {errors[0]}.")
    latencies = [o.latency for o in run.outcomes if o.kind is not OutcomeKind.REJECTED and o.latency is not None]
    rejected = sum(outcome.kind is OutcomeKind.REJECTED for outcome in run.outcomes)
    services = sum(target.capacity.service(arrival.kind) for arrival in schedule.arrivals)
    return Result(replicas, tuple(latencies), rejected, 0, services / (replicas * schedule.duration))


def row(result: Result, label: str) -> str:
    """Return the result as one line of text."""
    p50, p90, p99 = (result.percentile(q) for q in (50, 90, 99))
    return (
        f"{label:<11} {result.replicas:>4} replicas  busy {100 * result.utilisation:5.1f} %  "
        f"p50 {p50:6.3f} s  p90 {p90:6.3f} s  p99 {p99:6.3f} s  rejected {result.rejected} of {result.sent}"
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        table = find_table(options.table)
        deadline = None if options.deadline is None else round(1000 * options.deadline)
        mix = tuple(RequestClass(name=str(size), size=size, deadline_ms=deadline) for size in options.size)
        if options.rate is not None and options.p99 is not None:
            for name in options.balance:
                needed = replicas_needed(options.rate, options.p99, table, mix, options.duration, BALANCERS[name])
                print(row(needed, name), flush=True)
            return 0
        for replicas, load in itertools.product(options.replicas, options.load):
            scenario = Scenario(title="", duration=options.duration, arrivals=Arrivals(load=load), mix=mix)
            schedule = make_schedule(scenario, Capacity(output_costs(decoder_tables(table)), replicas))
            for name in options.balance:
                result = simulate(schedule, table, replicas, balance=BALANCERS[name], retries=options.retries)
                print(row(result, name), flush=True)
            if options.measure:
                print(row(asyncio.run(measure(schedule, options.table, replicas)), "measured"), flush=True)
    except (PidError, ValueError) as error:
        print(f"capacity: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m loadtest.capacity",
        usage="%(prog)s --rate RATE --p99 SECONDS [options]\n       %(prog)s [--load FRACTION ...] [options]",
        description="Estimate by simulation how many replicas a load needs, or which latencies they reach at a load.",
    )
    add = parser.add_argument
    add(
        "--table",
        default="gb200",
        help=f"cost table: {', '.join(table_names())}, or a JSON file (default: %(default)s)",
    )
    add(
        "--size",
        type=size_argument,
        nargs="+",
        default=[Size(2048, 2048)],
        help="image sizes, HEIGHTxWIDTH in pixels, in equal numbers (default: 2048x2048)",
    )
    add("--deadline", type=float, metavar="SECONDS", help="deadline of each request (default: 60)")
    add("--duration", type=float, default=600.0, metavar="SECONDS", help="time to simulate (default: %(default)g)")
    _add_search_options(parser)
    _add_comparison_options(parser)
    return parser


def _add_search_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("find the number of replicas").add_argument
    add("--rate", type=float, help="images per second; with --p99")
    add("--p99", type=float, metavar="SECONDS", help="limit of the 99th percentile of the latency; with --rate")


def _add_comparison_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("compare loads").add_argument
    loads, replicas = [0.5, 0.7, 0.8, 0.9], [1, 4, 16]
    text = "loads as shares of the capacity (default: 0.5 0.7 0.8 0.9)"
    add("--load", type=float, nargs="+", default=loads, metavar="FRACTION", help=text)
    text = "numbers of replicas (default: 1 4 16)"
    add("--replicas", type=int, nargs="+", default=replicas, metavar="COUNT", help=text)
    text = "how the load balancer chooses a replica (default: least): %(choices)s"
    add("--balance", nargs="+", choices=BALANCERS, default=["least"], metavar="METHOD", help=text)
    text = "number of other replicas that a rejected request is sent to in the simulation (default: 0)"
    add("--retries", type=int, default=0, metavar="COUNT", help=text)
    text = "also measure real servers on simulated devices behind nginx, in real time"
    add("--measure", action="store_true", help=text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
