"""Signals and exits, on a server in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from safetensors.torch import save

from tests.server.conftest import make_latent, until

BODY = save({"latent": make_latent()})


class Process:
    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "tests.server.simulated_server", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        port = next((line.strip() for line in self.process.stderr if line.strip().isdigit()), None)
        assert port, "the server did not start"
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)

    def decode(self) -> httpx.Response:
        return self.client.post("/decode", content=BODY, headers={"Content-Type": "application/x-safetensors"})

    def health(self, which: str) -> int:
        return self.client.get(f"/health/{which}").status_code

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def status(self) -> int:
        return self.process.wait(timeout=30)

    def waiting(self) -> float:
        """Images admitted and not answered."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(x.split()[1]) for x in lines if x.startswith(("pid_queue_images ", "pid_running_images ")))


@contextlib.contextmanager
def process(*flags: str) -> Iterator[Process]:
    server = Process(*flags)
    try:
        yield server
    finally:
        server.client.close()
        server.process.kill()
        server.process.wait()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def test_sigterm_serves_on_then_refuses_then_finishes_and_exits_with_0(pool: ThreadPoolExecutor):
    with process("--drain-delay", "1") as server:
        server.signal()
        until(lambda: server.health("ready") == 503)
        assert server.health("live") == 200
        assert server.decode().status_code == 200  # load balancers have not noticed yet
        answers = [pool.submit(server.decode) for _ in range(12)]  # more than the delay has time for
        until(lambda: server.waiting() > 8)
        codes = []

        def refused() -> bool:
            with contextlib.suppress(httpx.TransportError):  # it may be gone by then
                codes.append(server.decode().status_code)
                return codes[-1] == 503
            return True

        until(refused)
        assert set(codes) <= {200, 503}
        assert [answer.result().status_code for answer in answers] == [200] * 12
        assert server.status() == 0


def test_what_is_not_finished_within_the_limit_is_answered_503(pool: ThreadPoolExecutor):
    with process("--drain-delay", "0", "--drain-limit", "0.3") as server:
        answers = [pool.submit(server.decode) for _ in range(12)]
        until(lambda: server.waiting() > 8)
        server.signal()
        results = [answer.result() for answer in answers]
        codes = [answer.status_code for answer in results]
        assert set(codes) == {200, 503}
        assert {answer.json()["code"] for answer in results if answer.status_code == 503} == {"unavailable"}
        assert server.status() == 0


def test_a_second_sigterm_ends_at_once_and_leaves_nobody_without_an_answer(pool: ThreadPoolExecutor):
    with process("--drain-delay", "600") as server:
        answers = [pool.submit(server.decode) for _ in range(12)]
        until(lambda: server.waiting() > 8)
        server.signal()
        until(lambda: server.health("ready") == 503)
        server.signal()
        assert {answer.result().status_code for answer in answers} <= {200, 503}
        assert server.status() == 1


@pytest.mark.parametrize("fault", ["poison-device@3", "hang-step@3"])
def test_a_lost_device_is_told_to_probes_and_then_ends_the_process(pool: ThreadPoolExecutor, fault: str):
    flags = ["--faults", fault, "--allow-faults", "--fail-grace", "1", "--watchdog-seconds", "0.5"]
    with process(*flags) as server:
        answers = [pool.submit(server.decode) for _ in range(4)]
        assert [answer.result().status_code for answer in answers] == [503] * 4
        assert server.health("live") == 503
        assert server.status() == 1


def test_a_client_that_tries_again_finds_the_server_that_was_started_next():
    statuses = []
    for flags in (["--faults", "poison-device", "--allow-faults", "--fail-grace", "0"], []):
        with process(*flags) as server:
            statuses.append(server.decode().status_code)
            if flags:
                assert server.status() == 1
    assert statuses == [503, 200]
