"""Both clients, with a real server that restarts, rejects requests and stops responding.

The server's decoder is simulated; its images show the latent and the seed, so that each call can recognise its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest

from loadtest.processes import Process, free_port, started
from pid_client import AsyncPidClient, DeadlineError, Image, OverloadedError, PidClient, PidError

pytestmark = pytest.mark.slow

TASKS, THREADS = 20, 4  # calls at once
QUEUE = 8  # images that may wait, fewer than there are calls at once
MARGIN = 10.0  # seconds that a call may end after its deadline on a machine that is busy with other tests


@dataclass
class Attempt:
    """One request of a call. Times are monotonic, in seconds."""

    began: float
    deadline_ms: int
    response: httpx.Response | None = None  # None if there was none
    responded: float = 0.0

    @property
    def status(self) -> int | None:
        return None if self.response is None else self.response.status_code

    @property
    def received(self) -> bool:
        """True if an image was received as a whole."""
        if self.response is None or self.status != 200:
            return False
        return self.response.num_bytes_downloaded == int(self.response.headers["Content-Length"])

    @property
    def may_be_repeated(self) -> float:
        """Time before which the server asked not to try again."""
        if self.response is None:
            return self.began
        return self.responded + float(self.response.headers.get("Retry-After", 0))


@dataclass
class Traffic:
    """How each call ended, by seed, and its attempts, which event hooks of httpx record."""

    attempts: dict[int, list[Attempt]] = field(default_factory=dict)
    results: dict[int, list[Image | PidError]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)  # length of each call

    def begin(self, request: httpx.Request) -> None:
        attempt = Attempt(time.monotonic(), int(request.headers["X-Deadline-Ms"]))
        self.attempts.setdefault(int(request.url.params["seed"]), []).append(attempt)

    def respond(self, response: httpx.Response) -> None:
        attempt = self.attempts[int(response.request.url.params["seed"])][-1]
        attempt.response, attempt.responded = response, time.monotonic()

    @contextlib.contextmanager
    def call(self, seed: int) -> Iterator[list[Image | PidError]]:
        """Record the length of a call, and its results: those that the block adds, or the error that it raises."""
        began, results = time.monotonic(), list[Image | PidError]()
        try:
            yield results
        except PidError as error:
            results.append(error)
        self.seconds[seed] = time.monotonic() - began
        self.results.setdefault(seed, []).extend(results)

    def outcomes(self) -> set[type]:
        """Return the kinds of results until now."""
        return {type(result) for results in list(self.results.values()) for result in results}


def latent_of(seed: int) -> np.ndarray:
    """Return a latent that the image of the seed shows as 255 − seed."""
    return np.full((16, 8, 8), ((255 - seed) / 127.5 - 1) * 4, np.float32)


def is_image_of(seed: int, image: Image) -> bool:
    return image.seed == seed and bool((image.numpy() == (255 - seed, seed, 0)).all())


def latent_server(log: Path, *flags: str) -> Process:
    """Return a server with a short queue, not started yet."""
    port = free_port()
    command = [sys.executable, "-m", "tests.clients.latent_server", "--latent-space", "flux", "--port", str(port)]
    command += ["--queue-images", str(QUEUE), "--drain-delay", "0", "--stall-seconds", "60", *flags]
    return Process(command, port, log)


async def call_all(traffic: Traffic, url: str, count: int, deadline: float) -> None:
    """Decode with each of the seeds 0 to `count` − 1: every fourth in one of some threads, the others in tasks."""
    loop, at_once = asyncio.get_running_loop(), asyncio.Semaphore(TASKS)

    async def begin(request: httpx.Request) -> None:
        traffic.begin(request)

    async def respond(response: httpx.Response) -> None:
        traffic.respond(response)

    hooks = {"request": [traffic.begin], "response": [traffic.respond]}
    client = PidClient(url, deadline=deadline, event_hooks=hooks)
    async_client = AsyncPidClient(url, deadline=deadline, event_hooks={"request": [begin], "response": [respond]})

    def in_thread(seed: int) -> None:
        with traffic.call(seed) as results:
            results.append(client.decode(latent_of(seed), seed=seed, format="raw"))

    async def in_task(seed: int) -> None:
        async with at_once:
            with traffic.call(seed) as results:
                results.append(await async_client.decode(latent_of(seed), seed=seed, format="raw"))

    with ThreadPoolExecutor(THREADS) as pool, client:
        async with async_client:
            threads = [loop.run_in_executor(pool, in_thread, seed) for seed in range(0, count, 4)]
            tasks = [in_task(seed) for seed in range(count) if seed % 4]
            await asyncio.gather(*threads, *tasks)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # threads change it too
        await asyncio.sleep(0.01)


def test_every_call_gets_its_own_image_once_although_the_server_restarts_and_rejects_requests(tmp_path: Path):
    traffic, count = Traffic(), 200

    async def run() -> None:
        server = latent_server(tmp_path / "log", "--step-seconds", "0.005")
        async with started(server), asyncio.TaskGroup() as group:
            group.create_task(call_all(traffic, server.url, count, deadline=300.0))
            for ended, signum in ((count // 5, signal.SIGTERM), (count // 2, signal.SIGKILL)):
                await until(lambda ended=ended: len(traffic.results) >= ended)
                await server.stop(signum)
                await server.start()

    asyncio.run(run())
    assert traffic.results.keys() == set(range(count))
    for seed, results in traffic.results.items():
        (image,) = results
        assert isinstance(image, Image), image
        assert is_image_of(seed, image)
    for attempts in traffic.attempts.values():
        assert [attempt.received for attempt in attempts] == [False] * (len(attempts) - 1) + [True]
        budgets = [attempt.deadline_ms for attempt in attempts]
        assert budgets == sorted(budgets, reverse=True)
        for attempt, following in itertools.pairwise(attempts):
            assert following.began >= attempt.may_be_repeated
    statuses = Counter(attempt.status for attempts in traffic.attempts.values() for attempt in attempts)
    assert {200, 429, None} <= statuses.keys() <= {200, 429, 503, None}  # None: the connection was lost
    assert statuses[429] < 2 * count


def test_every_call_ends_by_its_deadline_although_the_server_is_overloaded_and_then_hangs(tmp_path: Path):
    traffic, count, deadline = Traffic(), 48, 2.0

    async def run() -> None:
        server = latent_server(tmp_path / "log", "--step-seconds", "0.04")
        async with started(server), asyncio.TaskGroup() as group:
            calls = group.create_task(call_all(traffic, server.url, count, deadline))
            await until(lambda: calls.done() or traffic.outcomes() >= {Image, OverloadedError})
            os.kill(server.pid, signal.SIGSTOP)
            await asyncio.wait([calls], timeout=count * (deadline + MARGIN))
            await server.stop(signal.SIGKILL)

    asyncio.run(run())
    assert traffic.results.keys() == set(range(count))
    assert all(len(results) == 1 for results in traffic.results.values())
    assert traffic.outcomes() == {Image, OverloadedError, DeadlineError}
    assert max(traffic.seconds.values()) < deadline + MARGIN
    for seed, (result,) in traffic.results.items():
        assert not isinstance(result, Image) or is_image_of(seed, result)
