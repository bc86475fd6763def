"""Load generator. In an open loop, it sends each request at its scheduled time, regardless of earlier responses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

import numpy as np
from safetensors.numpy import save

from loadtest.http_client import Client, HttpExchange
from loadtest.keys import authorization
from loadtest.outcome import NO_CONNECTION, Failure, Outcome, OutcomeKind, classify
from loadtest.scenario import RequestClass
from loadtest.schedule import Arrival, Capacity, Schedule
from server.scheduling.costs import Output

RETRY_SECONDS = 0.5  # before a retry, if the response has no Retry-After header
RETRYABLE = (429, 500, 503)  # statuses
LOOP_PAUSE = 0.25  # seconds that a client of a closed loop waits after a rejection or an error
PROMPT = (
    "A lighthouse on a rocky coast at dusk, seen from a small boat; long waves in the foreground, a band of orange "
    "light under heavy clouds, gulls around the lantern, painted in oil with visible brush strokes"
)


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
        self,
        client: Client,
        capacity: Capacity,
        latents: Mapping[Output, tuple[int, ...]],
        retry: bool = False,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        """Create a generator.

        Args:
            client: Connections to the server.
            capacity: Costs of the devices, for deadlines in multiples of the service time.
            latents: Shape of the latent for each decoder and size.
            retry: Resend rejected and failed requests, after Retry-After or `RETRY_SECONDS`.
            keys: API keys by name. Classes that name none use the first one.
        """
        self._client, self._capacity, self._latents, self._retry = client, capacity, latents, retry
        self._keys = keys or {}
        self._requests: dict[str, bytes] = {}
        self._bodies: dict[str, bytes] = {}
        self._id = secrets.token_hex(8)  # in new prompts: a server may remember those of earlier runs
        self._in_flight = 0

    async def run(self, schedule: Schedule, time_limit: float, progress: bool = False) -> Run:
        """Send `schedule` and wait until every request has ended, at most `time_limit` seconds after its send time.

        Raises:
            ConfigError: A class names an unknown API key.
        """
        run = Run(schedule)
        for kind in {kind.name: kind for kind in (*(a.kind for a in schedule.arrivals), *schedule.loops)}.values():
            self._prepare(kind)
        began, cpu = time.perf_counter(), time.process_time()
        opened = self._client.opened
        clients = [kind for kind in schedule.loops for _ in range(kind.clients or 0)]
        tasks: set[asyncio.Task[object]] = {
            asyncio.create_task(self._loop(run, kind, began, schedule.duration, time_limit)) for kind in clients
        }
        async with _reporting(self._progress(run, began) if progress else None):
            for arrival in schedule.arrivals:
                await asyncio.sleep(max(0.0, began + arrival.at - time.perf_counter()))
                task = asyncio.create_task(self._send(run, arrival, began, time_limit))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            while tasks:
                tasks = (await asyncio.wait(tasks))[1]
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
        self._prepare(kind)
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(self._loop(run, kind, began, seconds, time_limit=60.0) for _ in range(concurrency)))
        run.wall_seconds, run.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        return run

    def _prepare(self, kind: RequestClass) -> None:
        """Serialise the requests of `kind` that have no new prompt; they are identical, and sent in a single write."""
        shape = self._latents[self._capacity.output(kind)]
        shape = (kind.images, *shape) if kind.images > 1 else shape
        self._bodies[kind.name] = save({"latent": np.random.default_rng(0).standard_normal(shape, np.float32)})
        repeated = None if kind.new_prompts is None else f"{PROMPT}, {kind.name}"
        self._requests[kind.name] = self._request(kind, repeated)

    def _request(self, kind: RequestClass, prompt: str | None) -> bytes:
        headers = {"Content-Type": "application/x-safetensors", **authorization(self._keys, kind.key)}
        deadline = self._capacity.deadline(kind)
        if deadline is not None:
            headers["X-Deadline-Ms"] = str(max(1, round(1000 * deadline)))
        options = {"steps": str(kind.steps), "seed": "1"}
        for name in ("decoder", "priority", "format", "compression", "quality"):
            if name in kind.model_fields_set:
                options[name] = str(getattr(kind, name))
        if prompt is not None:
            options["prompt"] = quote(prompt)
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return self._client.request("POST", f"/decode?{query}", headers, self._bodies[kind.name])

    def _request_of(self, arrival: Arrival) -> bytes:
        if arrival.new_prompt:
            return self._request(arrival.kind, f"{PROMPT}, {self._id} {arrival.new_prompt}")
        return self._requests[arrival.kind.name]

    async def _loop(self, run: Run, kind: RequestClass, began: float, seconds: float, time_limit: float) -> None:
        """Send requests as one client of a closed loop, until `seconds` after `began`."""
        while (now := time.perf_counter() - began) < seconds:
            outcome = await self._send(run, Arrival(now, kind), began, time_limit)
            if outcome.kind in (OutcomeKind.REJECTED, OutcomeKind.ERROR):
                await asyncio.sleep(LOOP_PAUSE)

    async def _send(self, run: Run, arrival: Arrival, began: float, time_limit: float) -> Outcome:
        self._in_flight += 1
        limit = time_limit if arrival.disconnect_after is None else arrival.disconnect_after
        exchange, failures, request = HttpExchange(), [], self._request_of(arrival)
        try:
            async with asyncio.timeout(max(0.0, began + arrival.at + limit - time.perf_counter())):
                exchange = await self._attempt(arrival, request)
                while self._retry and _can_retry(exchange):
                    failures.append(_failure(exchange, began))
                    pause = RETRY_SECONDS if exchange.retry_after is None else exchange.retry_after
                    await asyncio.sleep(pause)
                    exchange = await self._attempt(arrival, request)
        except TimeoutError:
            disconnected = arrival.disconnect_after is not None
            exchange = HttpExchange(disconnected=disconnected, reason=f"no complete response within {time_limit:g} s")
        finally:
            self._in_flight -= 1
        outcome = classify(arrival, exchange, began, self._capacity.deadline(arrival.kind), failures)
        run.outcomes.append(outcome)
        return outcome

    async def _attempt(self, arrival: Arrival, request: bytes) -> HttpExchange:
        """Run one exchange, without a time limit. A failed one is returned, not raised."""
        kind = arrival.kind
        try:
            connection = await self._client.connect(slow=kind.read_rate is not None or kind.read_after is not None)
        except OSError as error:
            now = time.perf_counter()
            reason = os.strerror(error.errno) if error.errno else str(error)
            return HttpExchange(sent=now, done=now, reason=f"{NO_CONNECTION}: {reason}")
        try:
            return await connection.exchange(request, kind.read_rate, kind.read_after, arrival.disconnect_streaming)
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
