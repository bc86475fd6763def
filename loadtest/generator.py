"""Open-loop generator: sends each request at its scheduled time, regardless of earlier responses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import save

from engines.size import Size
from loadtest.http_client import Client, HttpExchange
from loadtest.outcome import NO_CONNECTION, Failure, Outcome, classify
from loadtest.scenario import RequestClass
from loadtest.schedule import Arrival, Capacity, Schedule

RETRY_SECONDS = 0.5  # before a retry, if the response has no Retry-After header
RETRYABLE = (429, 500, 503)  # statuses


@dataclass
class Run:
    """Outcomes of a schedule and the cost of generating it."""

    schedule: Schedule
    outcomes: list[Outcome] = field(default_factory=list)
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0  # CPU time of this process during the run
    connections: int = 0  # connections opened


class Generator:
    """Sends schedules to one server."""

    def __init__(
        self, client: Client, capacity: Capacity, latents: Mapping[Size, tuple[int, ...]], retry: bool = False
    ) -> None:
        """Create a generator.

        Args:
            client: Connections to the server.
            capacity: Costs of the devices, for deadlines in multiples of the service time.
            latents: Shape of the latent for each output size.
            retry: Resend rejected and failed requests, after Retry-After or `RETRY_SECONDS`.
        """
        self._client, self._capacity, self._latents, self._retry = client, capacity, latents, retry
        self._requests: dict[str, bytes] = {}
        self._in_flight = 0

    async def run(self, schedule: Schedule, time_limit: float, progress: bool = False) -> Run:
        """Send `schedule` and wait until every request has ended, at most `time_limit` seconds after its send time."""
        run = Run(schedule)
        for kind in {arrival.kind.name: arrival.kind for arrival in schedule.arrivals}.values():
            self._requests[kind.name] = self._request(kind)
        began, cpu = time.perf_counter(), time.process_time()
        opened, tasks = self._client.opened, set()
        async with _reporting(self._progress(run, began) if progress else None):
            for arrival in schedule.arrivals:
                await asyncio.sleep(max(0.0, began + arrival.at - time.perf_counter()))
                task = asyncio.create_task(self._send(run, arrival, began, time_limit))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            while tasks:
                await asyncio.wait(tasks)
        run.wall_seconds, run.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        run.connections = self._client.opened - opened
        run.outcomes.sort(key=lambda outcome: outcome.at)
        return run

    async def saturate(self, kind: RequestClass, concurrency: int, seconds: float) -> Run:
        """Run a closed loop: `concurrency` clients that each send the next request after the previous response.

        Use it to measure throughput only. Its latencies are too low under overload, because clients wait while
        independent requests would queue.
        """
        run = Run(Schedule((), seconds))
        self._requests[kind.name] = self._request(kind)
        began, cpu = time.perf_counter(), time.process_time()

        async def client() -> None:
            while (now := time.perf_counter() - began) < seconds:
                await self._send(run, Arrival(now, kind), began, time_limit=60.0)

        await asyncio.gather(*(client() for _ in range(concurrency)))
        run.wall_seconds, run.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        return run

    def _request(self, kind: RequestClass) -> bytes:
        """Serialise a request of `kind`. All requests of a class are identical, so sending one is a single write."""
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

    async def _send(self, run: Run, arrival: Arrival, began: float, time_limit: float) -> None:
        self._in_flight += 1
        limit = time_limit if arrival.disconnect_after is None else arrival.disconnect_after
        exchange, failures = HttpExchange(), []
        try:
            async with asyncio.timeout(max(0.0, began + arrival.at + limit - time.perf_counter())):
                exchange = await self._attempt(arrival)
                while self._retry and _can_retry(exchange):
                    failures.append(_failure(exchange, began))
                    pause = RETRY_SECONDS if exchange.retry_after is None else exchange.retry_after
                    await asyncio.sleep(pause)
                    exchange = await self._attempt(arrival)
        except TimeoutError:
            disconnected = arrival.disconnect_after is not None
            exchange = HttpExchange(disconnected=disconnected, reason=f"no complete response within {time_limit:g} s")
        finally:
            self._in_flight -= 1
        run.outcomes.append(classify(arrival, exchange, began, self._capacity.deadline(arrival.kind), failures))

    async def _attempt(self, arrival: Arrival) -> HttpExchange:
        """Run one exchange, without a time limit. A failed one is returned, not raised."""
        slow, request = arrival.kind.read_rate is not None, self._requests[arrival.kind.name]
        try:
            connection = await self._client.connect(slow)
        except OSError as error:
            now = time.perf_counter()
            reason = os.strerror(error.errno) if error.errno else str(error)
            return HttpExchange(sent=now, done=now, reason=f"{NO_CONNECTION}: {reason}")
        try:
            return await connection.exchange(request, arrival.kind.read_rate, arrival.disconnect_streaming)
        finally:
            self._client.release(connection)

    async def _progress(self, run: Run, began: float) -> None:
        while True:
            counts = Counter(outcome.kind.label for outcome in run.outcomes)
            line = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            seconds = time.perf_counter() - began
            sys.stderr.write(f"\r\x1b[K{seconds:4.0f} s: {self._in_flight} in flight; {line}")
            sys.stderr.flush()
            await asyncio.sleep(1)


def _can_retry(exchange: HttpExchange) -> bool:
    return exchange.status in RETRYABLE or not (exchange.complete or exchange.disconnected)


def _failure(exchange: HttpExchange, began: float) -> Failure:
    ended = exchange.sent if exchange.done is None else exchange.done
    return Failure(exchange.sent - began, ended - began, exchange.status, exchange.reason)


@contextlib.asynccontextmanager
async def _reporting(progress: Coroutine[None, None, None] | None) -> AsyncIterator[None]:
    """Run `progress` for the duration of the block."""
    if progress is None:
        yield
        return
    task = asyncio.create_task(progress)
    try:
        yield
    finally:
        task.cancel()
        sys.stderr.write("\n")
