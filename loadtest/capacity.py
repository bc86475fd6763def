"""`python -m loadtest.capacity --table gb200 --rate 30 --p99 2`: how many replicas that takes, by simulation.

The server's own scheduler, one device a replica, behind a balancer that sends each request to the replica with the
fewest in flight; time is simulated, so that an hour of sixteen replicas takes seconds. `--measure` puts the real thing
beside it: as many servers on simulated devices, behind nginx, under the same plan.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import itertools
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.errors import ConfigError, PidError
from engines.runtime.simulated import SimulatedCost, SimulatedTable
from engines.size import Size, size_argument
from loadtest import processes
from loadtest.__main__ import inspect
from loadtest.generator import Generator
from loadtest.http_client import Client
from loadtest.scenario import Arrivals, RequestClass, Scenario
from loadtest.schedule import Arrival, Capacity, Schedule, make_schedule
from loadtest.simulated_server import find_table
from loadtest.summary import percentile
from server.errors import QueueFullError
from server.scheduling.costs import CostTable
from server.scheduling.jobs import DevicePlan, Job, Limits, Priority
from server.scheduling.scheduler import Scheduler

DEVICE = "device"
MOST_REPLICAS = 4096


@dataclass(frozen=True)
class Result:
    """What clients would see. Times in seconds."""

    replicas: int
    latencies: tuple[float, ...]  # of whole answers
    refused: int
    late: int
    busy: float  # share of the devices' time

    @property
    def sent(self) -> int:
        return len(self.latencies) + self.refused

    def p(self, q: float) -> float:
        return percentile(self.latencies, q)


@dataclass(eq=False)
class Replica:
    """A scheduler and its one device."""

    costs: dict[Size, SimulatedCost]
    scheduler: Scheduler
    in_flight: int = 0
    at_work: bool = False
    busy: float = 0.0
    waiting: dict[Job, Arrival] = field(default_factory=dict)

    def plan(self, now: float) -> tuple[DevicePlan, float] | None:
        """The next step and what it takes, with the beginning of those that start."""
        step = self.scheduler.plan(DEVICE, now)
        if not step.batch:
            return None
        cost = self.costs[step.batch[0].size]
        return step, len(step.start) * cost.condition + cost.step_of(len(step.batch))


Balance = Callable[[Sequence[Replica], int], Replica]  # of replicas and the number of the request


def least_connections(replicas: Sequence[Replica], number: int) -> Replica:
    """The fewest in flight; among equals in turn."""
    turn = number % len(replicas)
    return min((*replicas[turn:], *replicas[:turn]), key=lambda replica: replica.in_flight)


def by_chance(replicas: Sequence[Replica], number: int) -> Replica:
    """As a Kubernetes Service does."""
    return random.Random(number).choice(replicas)


def simulate(
    plan: Schedule,
    table: SimulatedTable,
    replicas: int,
    encode: float = 0.031,
    deadline: float = 60.0,
    balance: Balance = least_connections,
) -> Result:
    """Serve `plan` in simulated time; `encode` is seconds from device to last byte, `deadline` the server's own."""
    servers = [_replica(table, encode) for _ in range(replicas)]
    order = itertools.count()  # among events of one moment
    events: list[tuple[float, int, Callable[[float], None]]] = []
    latencies: list[float] = []
    refused = late = 0

    def at(moment: float, what: Callable[[float], None]) -> None:
        heapq.heappush(events, (moment, next(order), what))

    def work(replica: Replica, now: float) -> None:
        planned = None if replica.at_work else replica.plan(now)
        if planned is not None:
            step, seconds = planned
            replica.at_work = True
            replica.busy += seconds
            at(now + seconds, lambda then: stepped(replica, step, then))

    def stepped(replica: Replica, step: DevicePlan, now: float) -> None:
        done = replica.scheduler.stepped(step.batch, now)
        finish = sum(replica.costs[job.size].finish for job in done)
        replica.busy += finish
        for job in done:
            at(now + finish + encode, lambda then, job=job: answered(replica, job, then))  # type: ignore[misc]
        at(now + finish, lambda then: idle(replica, then))

    def idle(replica: Replica, now: float) -> None:
        replica.at_work = False
        work(replica, now)

    def answered(replica: Replica, job: Job, now: float) -> None:
        nonlocal late
        replica.in_flight -= 1
        latencies.append(now - replica.waiting.pop(job).at)
        late += now > job.deadline

    def arrive(number: int, arrival: Arrival, now: float) -> None:
        nonlocal refused
        replica = balance(servers, number)
        kind = arrival.kind
        due = now + (deadline if kind.deadline_ms is None else kind.deadline_ms / 1000)
        job = Job(kind.size, tuple(range(kind.steps)), Priority[kind.priority.upper()], due, payload=None)
        try:
            replica.scheduler.admit([job], now)
        except QueueFullError:
            refused += 1
            return
        replica.waiting[job] = arrival
        replica.in_flight += 1
        work(replica, now)

    for number, arrival in enumerate(plan.arrivals):
        at(arrival.at, lambda now, number=number, arrival=arrival: arrive(number, arrival, now))  # type: ignore[misc]
    now = 0.0
    while events:
        now, _, what = heapq.heappop(events)
        what(now)
    busy = sum(server.busy for server in servers) / (replicas * max(now, plan.duration))
    return Result(replicas, tuple(latencies), refused, late, busy)


def _replica(table: SimulatedTable, encode: float) -> Replica:
    known = CostTable()
    for size, cost in table.costs.items():
        for stage, seconds in (("condition", cost.condition), ("finish", cost.finish), ("encode", encode)):
            known.observe(stage, size, seconds)  # type: ignore[arg-type]
        for batch in range(1, table.max_batch + 1):
            known.observe("step", size, cost.step_of(batch), batch)
    limits = Limits(queue_seconds=120.0, slots=table.max_batch + 1, max_batch=table.max_batch)
    return Replica(dict(table.costs), Scheduler(known, limits, {DEVICE: frozenset(table.costs)}))


def needed(rate: float, p99: float, table: SimulatedTable, mix: tuple[RequestClass, ...], seconds: float) -> Result:
    """The fewest replicas that refuse nothing and keep the 99th percentile. Raises ConfigError if none do."""
    one = Capacity(table.costs)
    least = max(1, int(rate / one.rate(mix)))
    if p99 < max(one.service(kind) for kind in mix):
        raise ConfigError(f"No number of replicas answers within {p99:g} s: one image alone takes longer.")
    plan = make_schedule(Scenario(title="", duration=seconds, arrivals=Arrivals(rate=rate), mix=mix), one)
    for replicas in range(least, MOST_REPLICAS):
        result = simulate(plan, table, replicas)
        if not result.refused and result.p(99) <= p99:
            return result
    raise ConfigError(f"{MOST_REPLICAS} replicas are not enough.")


async def measure(plan: Schedule, name: str, replicas: int, flags: Sequence[str] = ()) -> Result:
    """The same with real servers on simulated devices, behind nginx, under the load generator."""
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            contexts = [processes.simulated_server(name, 1, flags, Path(folder), f"{n}") for n in range(replicas)]
            servers = [await stack.enter_async_context(context) for context in contexts]
            proxy = await stack.enter_async_context(processes.nginx(servers, Path(folder)))
            target = await inspect(proxy.url, replicas, find_table(name).costs)
            client = Client(target.url)
            stack.callback(client.close)
            run = await Generator(client, target.capacity, target.latents).run(plan, 120.0)
    wrong = [outcome.error for outcome in run.outcomes if outcome.kind == "error"]
    if wrong:
        raise ConfigError(f"{len(wrong)} requests failed, the first so: {wrong[0]}.")
    latencies = [o.latency for o in run.outcomes if o.kind != "refused" and o.latency is not None]
    refused = sum(outcome.kind == "refused" for outcome in run.outcomes)
    services = sum(target.capacity.service(arrival.kind) for arrival in plan.arrivals)
    return Result(replicas, tuple(latencies), refused, 0, services / (replicas * plan.duration))


def row(result: Result, what: str) -> str:
    p50, p90, p99 = (result.p(q) for q in (50, 90, 99))
    return (
        f"{what:<10} {result.replicas:>4} replicas  busy {100 * result.busy:5.1f} %  "
        f"p50 {p50:6.3f} s  p90 {p90:6.3f} s  p99 {p99:6.3f} s  refused {result.refused} of {result.sent}"
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.capacity", description="How many replicas a load takes.")
    add = parser.add_argument
    add("--table", default="gb200", help="cost table: gb200, h200, rtx5090, or a file")
    add("--size", type=size_argument, default=Size(2048, 2048), help="of the images [2048x2048]")
    add("--rate", type=float, help="images a second; with --p99, the replicas needed")
    add("--p99", type=float, help="seconds within which 99 of 100 images are to be answered")
    add("--load", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9], help="shares of capacity, without --rate")
    add("--replicas", type=int, nargs="+", default=[1, 4, 16], help="without --rate [1 4 16]")
    add("--duration", type=float, default=600.0, help="seconds simulated [600]")
    add("--measure", action="store_true", help="run real servers on simulated devices beside it, in real time")
    options = parser.parse_args(arguments)
    try:
        table = find_table(options.table)
        mix = (RequestClass(name="all", size=options.size),)
        if options.rate is not None and options.p99 is not None:
            print(row(needed(options.rate, options.p99, table, mix, options.duration), "simulated"))
            return 0
        for replicas, load in itertools.product(options.replicas, options.load):
            scenario = Scenario(title="", duration=options.duration, arrivals=Arrivals(load=load), mix=mix)
            plan = make_schedule(scenario, Capacity(table.costs, replicas))
            print(row(simulate(plan, table, replicas), "simulated"), flush=True)
            if options.measure:
                print(row(asyncio.run(measure(plan, options.table, replicas)), "measured"), flush=True)
    except (PidError, ValueError) as error:
        print(f"capacity: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
