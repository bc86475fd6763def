"""Sends a plan, open loop: each request at its time, whatever became of those before it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from safetensors.numpy import save

from engines.size import Size
from loadtest.http_client import Client, HttpExchange
from loadtest.scenario import RequestClass
from loadtest.schedule import Arrival, Capacity, Schedule

Kind = Literal["in time", "late", "refused", "left", "error"]

_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
RETRY_SECONDS = 0.5  # until a client tries again that was not told when
WORTH_RETRYING = (429, 500, 503)


@dataclass(frozen=True)
class Failure:
    """An attempt that a client repeated. Times are seconds after the run's start."""

    sent: float
    ended: float
    status: int = 0  # of the answer; 0 where none began
    reason: str = ""  # why it is not whole


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Times are seconds after the run's start, latency from the intended send time."""

    at: float
    name: str  # of its class
    kind: Kind
    lag: float  # actual send time behind the intended one: the generator's fault
    latency: float | None = None  # to the last byte; None where no answer came
    first_byte: float | None = None
    status: int = 0
    size: int = 0  # bytes of the answer's body
    error: str = ""
    expired: bool = False  # admitted, then given up by the server because its deadline passed
    failures: tuple[Failure, ...] = ()  # attempts before the last one

    @property
    def end(self) -> float:
        return self.at + (self.latency or 0.0)


@dataclass
class Run:
    """Outcomes of a plan and what it took to send it."""

    plan: Schedule
    outcomes: list[Outcome] = field(default_factory=list)
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process while it ran
    connections: int = 0


class Generator:
    """Sends plans to one server."""

    def __init__(
        self, client: Client, capacity: Capacity, latents: Mapping[Size, tuple[int, ...]], retry: bool = False
    ) -> None:
        """With `retry`, clients send again what was refused or failed, when Retry-After says or soon."""
        self._client, self._capacity, self._latents, self._retry = client, capacity, latents, retry
        self._requests: dict[str, bytes] = {}
        self._in_flight = 0

    async def run(self, plan: Schedule, give_up: float, progress: bool = False) -> Run:
        """Send `plan` and wait until every request is over, at most `give_up` seconds after its own send time."""
        run = Run(plan)
        for kind in {arrival.kind.name: arrival.kind for arrival in plan.arrivals}.values():
            self._requests[kind.name] = self._request(kind)
        began, cpu = time.perf_counter(), time.process_time()
        opened, tasks = self._client.opened, set()
        async with _reporting(self._progress(run, began) if progress else None):
            for arrival in plan.arrivals:
                await asyncio.sleep(max(0.0, began + arrival.at - time.perf_counter()))
                task = asyncio.create_task(self._send(run, arrival, began, give_up))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            while tasks:
                await asyncio.wait(tasks)
        run.wall_seconds, run.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        run.connections = self._client.opened - opened
        run.outcomes.sort(key=lambda outcome: outcome.at)
        return run

    async def saturate(self, kind: RequestClass, concurrency: int, seconds: float) -> Run:
        """A closed loop instead: `concurrency` clients that ask again as soon as they have their answer.

        For throughput alone: its latencies say nothing, since clients wait where a slow server would let them queue.
        """
        run = Run(Schedule((), seconds))
        self._requests[kind.name] = self._request(kind)
        began, cpu = time.perf_counter(), time.process_time()

        async def client() -> None:
            while (now := time.perf_counter() - began) < seconds:
                await self._send(run, Arrival(now, kind), began, give_up=60.0)

        await asyncio.gather(*(client() for _ in range(concurrency)))
        run.wall_seconds, run.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        return run

    def _request(self, kind: RequestClass) -> bytes:
        """The bytes of a request of `kind`: all of them are alike, so that sending one costs no more than a write."""
        shape = self._latents[kind.size]
        shape = (kind.images, *shape) if kind.images > 1 else shape
        latent = np.random.default_rng(0).standard_normal(shape, np.float32)
        headers = {"Content-Type": "application/x-safetensors"}
        deadline = self._capacity.deadline(kind)
        if deadline is not None:
            headers["X-Deadline-Ms"] = str(max(1, round(1000 * deadline)))
        options = {"steps": str(kind.steps), "seed": "1"}
        if kind.priority != "standard":
            options["priority"] = kind.priority
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return self._client.request("POST", f"/decode?{query}", headers, save({"latent": latent}))

    async def _send(self, run: Run, arrival: Arrival, began: float, give_up: float) -> None:
        self._in_flight += 1
        limit = give_up if arrival.leaves_after is None else arrival.leaves_after
        exchange, failures = HttpExchange(), []
        try:
            async with asyncio.timeout(max(0.0, began + arrival.at + limit - time.perf_counter())):
                exchange = await self._attempt(arrival)
                while self._retry and (exchange.status in WORTH_RETRYING or not (exchange.complete or exchange.left)):
                    failures.append(_failure(exchange, began))
                    pause = RETRY_SECONDS if exchange.retry_after is None else exchange.retry_after
                    await asyncio.sleep(pause)
                    exchange = await self._attempt(arrival)
        except TimeoutError:
            exchange = HttpExchange(
                left=arrival.leaves_after is not None, reason=f"no whole answer within {give_up:g} s"
            )
        finally:
            self._in_flight -= 1
        outcome = judge(arrival, exchange, began, self._capacity.deadline(arrival.kind), failures)
        run.outcomes.append(outcome)

    async def _attempt(self, arrival: Arrival) -> HttpExchange:
        """One exchange, however it ends; no time limit."""
        slow, request = arrival.kind.read_rate is not None, self._requests[arrival.kind.name]
        try:
            connection = await self._client.connect(slow)
        except OSError as error:
            now = time.perf_counter()
            return HttpExchange(sent=now, done=now, reason=f"no connection: {_words(error)}")
        try:
            return await connection.exchange(request, arrival.kind.read_rate, arrival.leaves_streaming)
        finally:
            self._client.give_back(connection)

    async def _progress(self, run: Run, began: float) -> None:
        while True:
            counts = Counter(outcome.kind for outcome in run.outcomes)
            line = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            seconds = time.perf_counter() - began
            sys.stderr.write(f"\r\x1b[K{seconds:4.0f} s: {self._in_flight} in flight; {line}")
            sys.stderr.flush()
            await asyncio.sleep(1)


def _words(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _failure(exchange: HttpExchange, began: float) -> Failure:
    ended = exchange.sent if exchange.done is None else exchange.done
    return Failure(exchange.sent - began, ended - began, exchange.status, exchange.reason)


def judge(
    arrival: Arrival, exchange: HttpExchange, began: float, deadline: float | None, failures: Sequence[Failure] = ()
) -> Outcome:
    """What to call the end of an exchange, after `failures` of the same request."""
    start = began + arrival.at
    sent = began + failures[0].sent if failures else exchange.sent
    latency = None if exchange.done is None else exchange.done - start
    error, kind, expired = "", "in time", False
    if exchange.left:
        kind = "left"
    elif not exchange.complete:
        kind, error = "error", exchange.reason
    elif exchange.status == 429:
        kind = "refused"
    elif exchange.status == 504:
        kind, expired = "late", True
    elif exchange.status != 200:
        kind, error = "error", f"status {exchange.status}"
    elif exchange.failed_parts:
        kind, error = "error", "an image of a multipart answer failed"
    elif arrival.kind.images == 1 and exchange.tail != _PNG_END:
        kind, error = "error", "the image has no end"
    elif deadline is not None and latency is not None and latency > deadline:
        kind = "late"
    return Outcome(
        at=arrival.at,
        name=arrival.kind.name,
        kind=kind,  # type: ignore[arg-type]  # one of Kind's strings above
        lag=max(0.0, sent - start) if sent else 0.0,
        latency=latency,
        first_byte=None if exchange.first_byte is None else exchange.first_byte - start,
        status=exchange.status,
        size=exchange.size,
        error=error,
        expired=expired,
        failures=tuple(failures),
    )


@contextlib.asynccontextmanager
async def _reporting(progress: object) -> AsyncIterator[None]:
    if not asyncio.iscoroutine(progress):
        yield
        return
    task = asyncio.create_task(progress)
    try:
        yield
    finally:
        task.cancel()
        sys.stderr.write("\n")
