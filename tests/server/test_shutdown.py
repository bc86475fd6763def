"""Signals and exit statuses of a server process."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.server.conftest import make_latent
from tests.waiting import until

BODY = save({"latent": make_latent()})
SLOW_TO_ENCODE = save({"latent": make_latent(16, 32, 32)})


class Process:
    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "tests.server.simulated_server", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        port = next((line.strip() for line in self.process.stderr if line.strip().isdigit()), None)
        assert port, "the server did not start"
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)

    def decode(self, body: bytes = BODY, **options: str) -> httpx.Response:
        headers = {"Content-Type": "application/x-safetensors"}
        return self.client.post("/decode", content=body, headers=headers, params=options)

    def decode_slowly(self) -> int | None:
        """Return the status of a decode that is encoded for long, or None if its response has no end."""
        with contextlib.suppress(httpx.RemoteProtocolError):
            return self.decode(SLOW_TO_ENCODE, compression="best").status_code
        return None

    def health(self, which: str) -> int:
        return self.client.get(f"/health/{which}").status_code

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def status(self) -> int:
        return self.process.wait(timeout=30)

    def unfinished(self) -> float:
        """Return the number of images that are queued or on the device."""
        return self.gauge("pid_queue_images") + self.gauge("pid_running_images")

    def gauge(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(f"{name}{{"))


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


def test_sigterm_drains_and_exits_with_0(pool: ThreadPoolExecutor):
    with process("--drain-delay", "1") as server:
        server.signal()
        until(lambda: server.health("ready") == 503)
        assert server.health("live") == 200
        assert server.decode().status_code == 200  # within the drain delay
        responses = [pool.submit(server.decode) for _ in range(12)]  # more than fit into the drain delay
        until(lambda: server.unfinished() > 8)
        codes = []

        def rejected() -> bool:
            with contextlib.suppress(httpx.TransportError):  # it may have exited by then
                codes.append(server.decode().status_code)
                return codes[-1] == 503
            return True

        until(rejected)
        assert set(codes) <= {200, 503}
        assert [response.result().status_code for response in responses] == [200] * 12
        assert server.status() == 0


def test_requests_unfinished_at_the_drain_limit_get_503(pool: ThreadPoolExecutor):
    with process("--drain-delay", "0", "--drain-limit", "0.3") as server:
        responses = [pool.submit(server.decode) for _ in range(12)]
        until(lambda: server.unfinished() > 8)
        server.signal()
        results = [response.result() for response in responses]
        codes = [response.status_code for response in results]
        assert set(codes) == {200, 503}
        assert {response.json()["code"] for response in results if response.status_code == 503} == {"unavailable"}
        assert server.status() == 0


def test_a_second_sigterm_exits_at_once_with_a_response_for_every_request(pool: ThreadPoolExecutor):
    with process("--drain-delay", "600") as server:
        responses = [pool.submit(server.decode) for _ in range(12)]
        until(lambda: server.unfinished() > 8)
        server.signal()
        until(lambda: server.health("ready") == 503)
        server.signal()
        assert {response.result().status_code for response in responses} <= {200, 503}
        assert server.status() == 1


@pytest.mark.parametrize("signals", [1, 2])
def test_images_still_encoding_at_the_drain_limit_or_a_second_sigterm_get_503(pool: ThreadPoolExecutor, signals: int):
    with process("--drain-delay", "0", "--drain-limit", "0.3" if signals == 1 else "600") as server:
        responses = [pool.submit(server.decode_slowly) for _ in range(16)]
        until(lambda: server.gauge("pid_encoding_images") > 12)
        server.signal()
        if signals == 2:
            until(lambda: server.health("ready") == 503)
            server.signal()
        codes = [response.result() for response in responses]
        assert codes.count(503) > 4
        assert codes.count(None) <= 1  # its first strip had been sent
        assert set(codes) <= {200, 503, None}
        assert server.status() == signals - 1


@pytest.mark.parametrize("fault", ["poison-device@3", "hang-step@3"])
def test_a_lost_device_turns_liveness_off_and_then_ends_the_process(pool: ThreadPoolExecutor, fault: str):
    flags = ["--faults", fault, "--allow-faults", "--failure-exit-delay", "1", "--watchdog-seconds", "0.5"]
    with process(*flags) as server:
        responses = [pool.submit(server.decode) for _ in range(4)]
        assert [response.result().status_code for response in responses] == [503] * 4
        assert server.health("live") == 503
        assert server.status() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of another process")
def test_requests_start_no_threads(pool: ThreadPoolExecutor):
    large = save({"latent": make_latent(), "caption": torch.zeros(2**18)})
    headers = {"Content-Type": "application/x-safetensors"}
    with process() as server:
        assert server.decode().status_code == 200  # starts the encoder's thread

        def threads() -> int:
            return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))

        before = threads()
        requests = [pool.submit(server.client.get, "/metrics") for _ in range(8)]
        requests += [pool.submit(server.client.post, "/decode", content=large, headers=headers) for _ in range(8)]
        assert {request.result().status_code for request in requests} == {200, 422}
        assert threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="changes the limit of another process")
def test_without_memory_for_threads_a_request_still_gets_its_response():
    """Either the request succeeds, or it gets 503 and the process exits with status 1."""
    import resource

    with process("--failure-exit-delay", "0.5") as server:
        pid = server.process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**20
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        response = server.decode()
        if response.status_code != 200:
            assert response.status_code == 503
            assert server.status() == 1


def test_a_retrying_client_is_served_by_the_restarted_server():
    statuses = []
    for flags in (["--faults", "poison-device", "--allow-faults", "--failure-exit-delay", "0"], []):
        with process(*flags) as server:
            statuses.append(server.decode().status_code)
            if flags:
                assert server.status() == 1
    assert statuses == [503, 200]
