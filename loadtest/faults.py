"""A server with a fault under load, and what an orchestrator, probes and clients that try again see of it.

The server is restarted without its fault when it ends, as an orchestrator would do; clients go on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

from loadtest.generator import Failure, Generator, Outcome, Run
from loadtest.http_client import Client
from loadtest.processes import Process
from loadtest.scenario import Fault, Scenario
from loadtest.schedule import Schedule
from loadtest.scrape import Sample, continuous, sampling

PROBE_SECONDS = 0.05
WELL = "live, ready"
_SETTLE_SECONDS = 30.0  # for a server to be ready again after the last answer


@dataclass
class Watch:
    """What was seen of a process; times are seconds after its load began."""

    states: list[str] = field(default_factory=list)  # as probes found it, once for each change
    failed: float = math.inf  # when it was first seen not to be live
    exit: int | None = None
    afterwards: list[str] = field(default_factory=list)  # states of the process that took its place

    def saw(self, live: int, ready: int, at: float) -> None:
        state = f"{'live' if live == 200 else 'not live'}, {'ready' if ready == 200 else 'not ready'}"
        if live != 200:
            self.failed = min(self.failed, at)
        states = self.states if self.exit is None else self.afterwards
        if states[-1:] != [state]:
            states.append(state)

    @property
    def well(self) -> bool:
        """Whether the process, or the one in its place, was live and ready when last seen."""
        return (self.states if self.exit is None else self.afterwards)[-1:] == [WELL]


@dataclass(frozen=True)
class FaultResult:
    """What became of a server with one fault, and of its clients."""

    fault: str
    promised: str
    sent: int
    met: int  # requests of which an attempt failed
    served: int  # of those that met it, in the end
    unanswered: int  # attempts without an answer, of those sent while the server was live
    failures: dict[str, int]  # failed attempts by what they were told
    states: tuple[str, ...]
    exit: int | None
    recovery_seconds: float | None  # from the first failed attempt to the first whole answer to one sent after it
    as_promised: bool

    def __str__(self) -> str:
        told = ", ".join(f"{count} x {what}" for what, count in self.failures.items()) or "none"
        again = "never" if self.recovery_seconds is None else f"after {self.recovery_seconds:.1f} s"
        end = "no exit" if self.exit is None else f"exit {self.exit}"
        return (
            f"{self.fault}: met by {self.met} of {self.sent} requests, {self.served} of them served in the end; failed "
            f"attempts: {told}; served again {again}; process: {'; '.join((*self.states, end))} "
            f"({'as' if self.as_promised else 'NOT as'} promised: {self.promised})"
        )


def measures(results: Sequence[FaultResult]) -> dict[str, float]:
    """For thresholds."""
    met = sum(result.met for result in results)
    return {
        "faults_met": sum(result.met > 0 for result in results) / len(results),
        "states_as_promised": sum(result.as_promised for result in results) / len(results),
        "unanswered": float(sum(result.unanswered for result in results)),
        "recovered": sum(result.served for result in results) / met if met else math.nan,
        "recovery_s": max(math.inf if r.recovery_seconds is None else r.recovery_seconds for r in results),
    }


async def run_faults(
    scenario: Scenario,
    plan: Schedule,
    server: Callable[[Sequence[str]], Process],
    generator: Generator,
    progress: bool = False,
) -> tuple[Run, list[Sample], list[FaultResult]]:
    """One fault after the other, each for its part of `plan`; `server` makes a process on one port from flags."""
    part = scenario.duration / len(scenario.faults)
    whole, samples, results = Run(plan), [], []
    for number, fault in enumerate(scenario.faults):
        begin = number * part
        arrivals = tuple(replace(a, at=a.at - begin) for a in plan.arrivals if begin <= a.at < begin + part)
        flags = [*scenario.flags, "--faults", fault.fault, "--allow-faults"]
        async with watched(server(flags), server(scenario.flags)) as (watch, scraped):
            run = await generator.run(Schedule(arrivals, part, plan.rate), scenario.timeout, progress)
            await _settle(watch)
        results.append(judge_fault(fault, run.outcomes, watch))
        whole.outcomes += [_later(outcome, begin) for outcome in run.outcomes]
        whole.wall_seconds += run.wall_seconds
        whole.cpu_seconds += run.cpu_seconds
        whole.connections += run.connections
        samples += [replace(sample, at=sample.at + begin) for sample in scraped]
    return whole, continuous(samples), results


@contextlib.asynccontextmanager
async def watched(server: Process, replacement: Process) -> AsyncIterator[tuple[Watch, list[Sample]]]:
    """`server` while it is probed and scraped, and `replacement` in its place once it has ended."""
    await server.start()
    watch, client, began = Watch(), Client(server.url), time.perf_counter()

    async def supervise() -> None:
        watch.exit = await server.wait()
        await replacement.start()

    async def probe() -> None:
        while True:
            with contextlib.suppress(OSError):  # it is being replaced
                (live, _), (ready, _) = await client.get("/health/live"), await client.get("/health/ready")
                watch.saw(live, ready, time.perf_counter() - began)
            await asyncio.sleep(PROBE_SECONDS)

    tasks = [asyncio.create_task(supervise()), asyncio.create_task(probe())]
    try:
        async with sampling(Client(server.url)) as samples:
            yield watch, samples
        if tasks[0].done():
            tasks[0].result()  # raises what kept the replacement from starting
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        client.close()
        for process in (server, replacement):
            await process.stop(signal.SIGKILL)


async def _settle(watch: Watch) -> None:
    """Wait until probes find the server live and ready again; what they last saw is judged."""
    for _ in range(round(_SETTLE_SECONDS / PROBE_SECONDS)):
        if watch.well:
            return
        await asyncio.sleep(PROBE_SECONDS)


def judge_fault(fault: Fault, outcomes: Sequence[Outcome], watch: Watch) -> FaultResult:
    """Whether the process did as `fault` promises, and what its clients saw."""
    met = [outcome for outcome in outcomes if outcome.failures]
    failures = [failure for outcome in met for failure in outcome.failures]
    told = Counter(map(_told, failures))
    served = [outcome for outcome in outcomes if outcome.kind == "in time"]
    first = min((failure.ended for failure in failures), default=None)
    after = [o.end for o in served if first is not None and (o.failures[-1].ended if o.failures else o.at) >= first]
    silent = [f for f in failures if f.status == 0 and not f.reason.startswith("no connection")]
    if fault.exits is None:
        promised, states = "live and ready throughout", [WELL]
    else:
        promised, states = f"neither live nor ready, then exit {fault.exits}", [WELL, "not live, not ready"]
    return FaultResult(
        fault=fault.fault,
        promised=promised,
        sent=len(outcomes),
        met=len(met),
        served=sum(outcome.kind == "in time" for outcome in met),
        unanswered=sum(failure.sent < watch.failed for failure in silent),
        failures=dict(told),
        states=tuple(watch.states),
        exit=watch.exit,
        recovery_seconds=min(after) - first if first is not None and after else None,
        as_promised=watch.exit == fault.exits and watch.states == states and watch.well,
    )


def _later(outcome: Outcome, seconds: float) -> Outcome:
    failures = (replace(f, sent=f.sent + seconds, ended=f.ended + seconds) for f in outcome.failures)
    return replace(outcome, at=outcome.at + seconds, failures=tuple(failures))


def _told(failure: Failure) -> str:
    if failure.status == 0:
        return failure.reason
    return f"status {failure.status}, broken off" if failure.reason else f"status {failure.status}"
