"""docker/nginx/decoders.conf in a real nginx in front of two real servers."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save

from loadtest.processes import free_port
from tests.operations.conftest import responds
from tests.programs import ROOT, program, running
from tests.waiting import until

pytestmark = pytest.mark.operate

BODY = save({"latent": np.zeros((16, 8, 8), np.float32)})
EIGHT = save({"latent": np.zeros((8, 16, 8, 8), np.float32)})
HEADERS = {"Content-Type": "application/x-safetensors"}


class Cluster:
    """Two servers behind nginx."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.ports, self.folder = (free_port(), free_port()), folder
        flags = ["--drain-delay", "2", "--encoder-threads", "1", "--queue-images", "16"]
        command = [sys.executable, "-m", "tests.operations.gpu_server", *flags]
        self.servers = [
            stack.enter_context(running([*command, "--port", str(port)], folder / f"{port}.log")) for port in self.ports
        ]
        for port in self.ports:
            until(lambda port=port: responds(f"http://127.0.0.1:{port}/health/ready"), f"the server at {port}")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        stack.enter_context(running([program("nginx"), "-c", self._config(), "-e", "stderr"], folder / "nginx.log"))
        until(lambda: responds(f"{self.url}/info"), "nginx")

    def _config(self) -> Path:
        """Write the shipped site with the ports of this cluster, in a minimal nginx.conf."""
        site = (ROOT / "docker/nginx/decoders.conf").read_text()
        for shipped, used in zip((8001, 8002, 8000), (*self.ports, self.port), strict=True):
            assert site.count(f"127.0.0.1:{shipped}") == 1
            site = site.replace(f"127.0.0.1:{shipped}", f"127.0.0.1:{used}")
        paths = "".join(f"{name}_temp_path {self.folder}/{name};" for name in ("client_body", "proxy", "fastcgi"))
        paths += "".join(f"{name}_temp_path {self.folder}/{name};" for name in ("uwsgi", "scgi"))
        path = self.folder / "nginx.conf"
        head = f"daemon off; user root; pid {self.folder}/nginx.pid; worker_processes 2; events {{}}"
        path.write_text(f"{head} http {{ access_log off; {paths} {site} }}")
        return path

    def decode(self, **options: object) -> httpx.Response:
        return httpx.post(f"{self.url}/decode", content=BODY, headers=HEADERS, params=options, timeout=60)

    def count(self, name: str, **labels: str) -> list[float]:
        """Return the value of a metric on each server, summed over all series with these labels."""
        return [sum(_samples(port, name, labels)) for port in self.ports]


def _samples(port: int, name: str, labels: dict[str, str]) -> Iterator[float]:
    for family in text_string_to_metric_families(httpx.get(f"http://127.0.0.1:{port}/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample.value


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(tmp_path_factory.mktemp("nginx"), stack)


def test_both_servers_get_requests(cluster: Cluster):
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda seed: cluster.decode(seed=seed), range(16)))
    assert {response.status_code for response in responses} == {200}
    assert {response.content[:8] for response in responses} == {b"\x89PNG\r\n\x1a\n"}
    assert all(count >= 4 for count in cluster.count("pid_images_total"))


def test_a_rejected_request_is_retried_on_the_other_server_and_keeps_its_retry_after(cluster: Cluster):
    before = cluster.count("pid_refusals_total", code="queue-full")
    with ThreadPoolExecutor(24) as pool:
        post = partial(httpx.post, f"{cluster.url}/decode", content=EIGHT, headers=HEADERS, timeout=60)
        responses = [future.result() for future in [pool.submit(post) for _ in range(24)]]
    assert {response.status_code for response in responses} == {200, 429}
    rejected = [response for response in responses if response.status_code == 429]
    assert all(int(response.headers["retry-after"]) >= 1 for response in rejected)
    assert {response.headers["content-type"] for response in rejected} == {"application/problem+json"}
    after = cluster.count("pid_refusals_total", code="queue-full")
    # Each server saw each rejected request, and no request more than once.
    assert all(len(rejected) <= b - a <= len(responses) for a, b in zip(before, after, strict=True))


def test_the_limits_of_nginx_are_not_below_those_of_the_servers(cluster: Cluster):
    large = httpx.post(f"{cluster.url}/decode", content=bytes(20 << 20), headers=HEADERS, timeout=60)
    assert large.status_code == 400  # from the server: nginx would send 413
    limits = httpx.get(f"{cluster.url}/info").json()["limits"]
    config = (ROOT / "docker/nginx/decoders.conf").read_text()
    assert int(re.findall(r"client_max_body_size (\d+)m", config)[0]) * 2**20 >= limits["body_bytes"]
    assert float(re.findall(r"proxy_read_timeout (\d+)s", config)[0]) >= limits["max_deadline_seconds"]


def test_a_disconnected_client_cancels_its_request_on_the_server(cluster: Cluster):
    before = sum(cluster.count("pid_cancelled_total", reason="client-left"))
    with socket.create_connection(("127.0.0.1", cluster.port)) as connection:
        head = f"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Length: {len(EIGHT)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/x-safetensors\r\n\r\n" + EIGHT)
        until(lambda: sum(cluster.count("pid_running_images")) > 0, "the decode to begin")
    until(lambda: sum(cluster.count("pid_cancelled_total", reason="client-left")) > before, "the server to cancel it")


def test_metrics_are_not_reachable_through_nginx(cluster: Cluster):
    assert httpx.get(f"{cluster.url}/metrics").status_code == 404


def test_no_request_fails_while_a_server_drains_and_stops(cluster: Cluster):
    draining = f"http://127.0.0.1:{cluster.ports[0]}/health/ready"
    stopping = cluster.servers[0]
    with ThreadPoolExecutor(4) as pool:
        responses = [pool.submit(cluster.decode) for _ in range(12)]
        stopping.terminate()
        until(lambda: httpx.get(draining).status_code == 503, "the server to drain")
        while stopping.poll() is None:
            responses += (more := [pool.submit(cluster.decode) for _ in range(4)])
            wait(more)
        responses += [pool.submit(cluster.decode) for _ in range(12)]
        assert {response.result().status_code for response in responses} == {200}
    assert stopping.returncode == 0
