"""Servers with injected faults under load: what probes, an orchestrator and retrying clients observe.

A server that exits is restarted without its fault, as an orchestrator would do, while the load continues.
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

from loadtest.generator import Generator, Run
from loadtest.http_client import Client
from loadtest.outcome import NO_CONNECTION, Failure, Outcome, OutcomeKind
from loadtest.processes import Process
from loadtest.scenario import Fault, Scenario
from loadtest.schedule import Schedule
from loadtest.scrape import Sample, continuous, sampling

PROBE_SECONDS = 0.05
HEALTHY = "live, ready"
STALLED = "live, not ready"
UNHEALTHY = "not live, not ready"
_SETTLE_SECONDS = 30.0  # limit for the server to be ready again after the last response


@dataclass
class Watch:
    """Observations of a server process by its probes. Times are seconds after its load began."""

    states: list[str] = field(default_factory=list)  # one entry per change
    failed: float = math.inf  # when a probe first found it not live
    exit: int | None = None  # exit status
    replacement_states: list[str] = field(default_factory=list)  # states of the process that replaced it

    def record(self, live: int, ready: int, at: float) -> None:
        """Record the HTTP statuses of the liveness and the readiness probe."""
        state = f"{'live' if live == 200 else 'not live'}, {'ready' if ready == 200 else 'not ready'}"
        if live != 200:
            self.failed = min(self.failed, at)
        states = self._current_states
        if states[-1:] != [state]:
            states.append(state)

    @property
    def healthy(self) -> bool:
        """True if the process, or its replacement, was live and ready at the last probe."""
        return self._current_states[-1:] == [HEALTHY]

    @property
    def _current_states(self) -> list[str]:
        return self.states if self.exit is None else self.replacement_states


@dataclass(frozen=True)
class FaultResult:
    """Effect of one fault on the server process and its clients."""

    fault: str
    expected: str  # reaction of the process
    sent: int  # requests
    affected: int  # requests with at least one failed attempt
    recovered: int  # affected requests that succeeded in the end
    unanswered: int  # attempts without a response, among those sent while the server was live
    failures: dict[str, int]  # number of failed attempts by reason
    states: tuple[str, ...]
    exit: int | None
    recovery_seconds: float | None  # from the first failed attempt to the first success of a later attempt
    as_expected: bool

    def __str__(self) -> str:
        failures = ", ".join(f"{count} x {reason}" for reason, count in self.failures.items()) or "none"
        recovery = "no recovery" if self.recovery_seconds is None else f"recovered after {self.recovery_seconds:.1f} s"
        end = "no exit" if self.exit is None else f"exit {self.exit}"
        return (
            f"{self.fault}: {self.affected} of {self.sent} requests affected, {self.recovered} of them succeeded in "
            f"the end; failed attempts: {failures}; {recovery}; process: {'; '.join((*self.states, end))} "
            f"({'as' if self.as_expected else 'NOT as'} expected: {self.expected})"
        )


def measures(results: Sequence[FaultResult]) -> dict[str, float]:
    """Return the measures of a fault scenario for its thresholds."""
    affected = sum(result.affected for result in results)
    return {
        "faults_met": sum(result.affected > 0 for result in results) / len(results),
        "states_as_promised": sum(result.as_expected for result in results) / len(results),
        "unanswered": float(sum(result.unanswered for result in results)),
        "recovered": sum(result.recovered for result in results) / affected if affected else math.nan,
        "recovery_s": max(math.inf if r.recovery_seconds is None else r.recovery_seconds for r in results),
    }


async def run_faults(
    scenario: Scenario,
    schedule: Schedule,
    make_server: Callable[[Sequence[str]], Process],
    generator: Generator,
    progress: bool = False,
) -> tuple[Run, list[Sample], list[FaultResult]]:
    """Inject the scenario's faults one after another, each during its part of the schedule.

    Args:
        scenario: The faults and the server's flags.
        schedule: Requests of the whole run, divided equally among the faults.
        make_server: Returns a server process with the given flags; all listen on the same port.
        generator: Sends the requests to that port.
        progress: Show progress on standard error.
    """
    part = scenario.duration / len(scenario.faults)
    whole, samples, results = Run(schedule), [], []
    for number, fault in enumerate(scenario.faults):
        begin = number * part
        arrivals = tuple(replace(a, at=a.at - begin) for a in schedule.arrivals if begin <= a.at < begin + part)
        flags = [*scenario.server_flags, "--faults", fault.fault, "--allow-faults"]
        async with watched(make_server(flags), make_server(scenario.server_flags)) as (watch, part_samples):
            run = await generator.run(Schedule(arrivals, part, schedule.rate), scenario.timeout, progress)
            await _settle(watch)
        results.append(evaluate_fault(fault, run.outcomes, watch))
        whole.outcomes += [_shift(outcome, begin) for outcome in run.outcomes]
        whole.wall_seconds += run.wall_seconds
        whole.cpu_seconds += run.cpu_seconds
        whole.connections += run.connections
        samples += [replace(sample, at=sample.at + begin) for sample in part_samples]
    return whole, continuous(samples), results


@contextlib.asynccontextmanager
async def watched(server: Process, replacement: Process) -> AsyncIterator[tuple[Watch, list[Sample]]]:
    """Run `server` under probes and scrapes, and start `replacement` once it exits."""
    await server.start()
    watch, client, began = Watch(), Client(server.url), time.perf_counter()

    async def supervise() -> None:
        watch.exit = await server.wait()
        await replacement.start()

    async def probe() -> None:
        while True:
            with contextlib.suppress(OSError):  # not listening during the replacement
                (live, _), (ready, _) = await client.get("/health/live"), await client.get("/health/ready")
                watch.record(live, ready, time.perf_counter() - began)
            await asyncio.sleep(PROBE_SECONDS)

    supervisor, prober = asyncio.create_task(supervise()), asyncio.create_task(probe())
    try:
        async with sampling(server.url) as samples:
            yield watch, samples
        if supervisor.done():
            supervisor.result()  # raises if the replacement did not start
    finally:
        for task in (supervisor, prober):
            task.cancel()
        await asyncio.gather(supervisor, prober, return_exceptions=True)
        client.close()
        for process in (server, replacement):
            await process.stop(signal.SIGKILL)


async def _settle(watch: Watch) -> None:
    """Wait until the probes find the server live and ready again, so that the last observation is a settled one."""
    for _ in range(round(_SETTLE_SECONDS / PROBE_SECONDS)):
        if watch.healthy:
            return
        await asyncio.sleep(PROBE_SECONDS)


def evaluate_fault(fault: Fault, outcomes: Sequence[Outcome], watch: Watch) -> FaultResult:
    """Summarise what clients observed and compare the process with what `fault` expects."""
    affected = [outcome for outcome in outcomes if outcome.failures]
    failures = [failure for outcome in affected for failure in outcome.failures]
    silent = [f for f in failures if f.status == 0 and not f.reason.startswith(NO_CONNECTION)]
    if fault.exits is None:
        expected, states = "live and ready throughout", [HEALTHY]
    else:
        expected, states = f"neither live nor ready, then exit {fault.exits}", [HEALTHY, UNHEALTHY]
        if fault.stalls:
            expected, states = f"first {STALLED}, then {expected}", [HEALTHY, STALLED, UNHEALTHY]
    return FaultResult(
        fault=fault.fault,
        expected=expected,
        sent=len(outcomes),
        affected=len(affected),
        recovered=sum(outcome.kind is OutcomeKind.IN_TIME for outcome in affected),
        unanswered=sum(failure.sent < watch.failed for failure in silent),
        failures=dict(Counter(map(_reason, failures))),
        states=tuple(watch.states),
        exit=watch.exit,
        recovery_seconds=_recovery_seconds(outcomes, failures),
        as_expected=watch.exit == fault.exits and watch.states == states and watch.healthy,
    )


def _recovery_seconds(outcomes: Sequence[Outcome], failures: Sequence[Failure]) -> float | None:
    """Return the time from the first failed attempt to the first success of an attempt sent after it, or None."""
    first = min((failure.ended for failure in failures), default=None)
    if first is None:
        return None
    succeeded = [outcome for outcome in outcomes if outcome.kind is OutcomeKind.IN_TIME]
    later = [o.end for o in succeeded if (o.failures[-1].ended if o.failures else o.at) >= first]
    return min(later) - first if later else None


def _shift(outcome: Outcome, seconds: float) -> Outcome:
    """Return the outcome with its times moved by `seconds`."""
    failures = (replace(f, sent=f.sent + seconds, ended=f.ended + seconds) for f in outcome.failures)
    return replace(outcome, at=outcome.at + seconds, failures=tuple(failures))


def _reason(failure: Failure) -> str:
    if failure.status == 0:
        return failure.reason
    return f"status {failure.status}, truncated" if failure.reason else f"status {failure.status}"
