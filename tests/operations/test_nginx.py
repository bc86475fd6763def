"""docker/nginx/decoders.conf in a real nginx before two real servers."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save

from tests.operations.conftest import answers
from tests.operations.programs import ROOT, free_port, program, running, until

pytestmark = pytest.mark.operate

BODY = save({"latent": np.zeros((16, 8, 8), np.float32)})
EIGHT = save({"latent": np.zeros((8, 16, 8, 8), np.float32)})
HEADERS = {"Content-Type": "application/x-safetensors"}


class Balanced:
    """Two servers, and nginx before them."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.ports, self.folder = (free_port(), free_port()), folder
        flags = ["--drain-delay", "30", "--encoder-threads", "1"]
        command = [sys.executable, "-m", "tests.operations.gpu_server", *flags]
        self.servers = [
            stack.enter_context(running([*command, "--port", str(port)], folder / f"{port}.log")) for port in self.ports
        ]
        for port in self.ports:
            until(lambda port=port: answers(f"http://127.0.0.1:{port}/health/ready"), f"the server at {port}")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        stack.enter_context(running([program("nginx"), "-c", self._config(), "-e", "stderr"], folder / "nginx.log"))
        until(lambda: answers(f"{self.url}/info"), "nginx")

    def _config(self) -> Path:
        site = (ROOT / "docker/nginx/decoders.conf").read_text()
        for given, used in zip((8001, 8002, 8000), (*self.ports, self.port), strict=True):
            assert site.count(f"127.0.0.1:{given}") == 1
            site = site.replace(f"127.0.0.1:{given}", f"127.0.0.1:{used}")
        paths = "".join(f"{name}_temp_path {self.folder}/{name};" for name in ("client_body", "proxy", "fastcgi"))
        paths += "".join(f"{name}_temp_path {self.folder}/{name};" for name in ("uwsgi", "scgi"))
        path = self.folder / "nginx.conf"
        head = f"daemon off; user root; pid {self.folder}/nginx.pid; worker_processes 2; events {{}}"
        path.write_text(f"{head} http {{ access_log off; {paths} {site} }}")
        return path

    def decode(self, **options: object) -> httpx.Response:
        return httpx.post(f"{self.url}/decode", content=BODY, headers=HEADERS, params=options, timeout=60)

    def count(self, name: str, **labels: str) -> list[float]:
        """Of each server."""
        return [sum(_samples(port, name, labels)) for port in self.ports]


def _samples(port: int, name: str, labels: dict[str, str]) -> Iterator[float]:
    for family in text_string_to_metric_families(httpx.get(f"http://127.0.0.1:{port}/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample.value


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balanced]:
    with contextlib.ExitStack() as stack:
        yield Balanced(tmp_path_factory.mktemp("nginx"), stack)


def test_images_come_through_and_both_servers_work(balanced: Balanced):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: balanced.decode(seed=seed), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.content[:8] for answer in answers} == {b"\x89PNG\r\n\x1a\n"}
    assert all(count >= 4 for count in balanced.count("pid_images_total"))


def test_refusals_come_from_both_servers_and_keep_their_retry_after(balanced: Balanced):
    before = balanced.count("pid_refusals_total", code="queue-full")
    refused = balanced.decode(deadline_ms=1)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["content-type"] == "application/problem+json"
    after = balanced.count("pid_refusals_total", code="queue-full")
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


def test_a_body_may_be_as_large_as_the_servers_take(balanced: Balanced):
    large = httpx.post(f"{balanced.url}/decode", content=bytes(20 << 20), headers=HEADERS, timeout=60)
    assert large.status_code == 400  # the server's own answer
    limits = httpx.get(f"{balanced.url}/info").json()["limits"]
    config = (ROOT / "docker/nginx/decoders.conf").read_text()
    assert int(re.findall(r"client_max_body_size (\d+)m", config)[0]) * 2**20 == limits["body_bytes"]
    assert float(re.findall(r"proxy_read_timeout (\d+)s", config)[0]) >= limits["max_deadline_seconds"]


def test_a_client_that_leaves_is_told_to_the_server(balanced: Balanced):
    before = sum(balanced.count("pid_cancelled_total", reason="client-left"))
    with socket.create_connection(("127.0.0.1", balanced.port)) as connection:
        head = f"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Length: {len(EIGHT)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/x-safetensors\r\n\r\n" + EIGHT)
        until(lambda: sum(balanced.count("pid_requests_in_flight")) > 0, "the request to arrive")
    until(lambda: sum(balanced.count("pid_cancelled_total", reason="client-left")) > before, "the server to notice")


def test_metrics_are_not_for_everybody(balanced: Balanced):
    assert httpx.get(f"{balanced.url}/metrics").status_code == 404


def test_a_server_that_drains_and_one_that_is_gone_cost_nobody_an_answer(balanced: Balanced):
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(balanced.decode) for _ in range(12)]
        balanced.servers[0].terminate()
        until(lambda: httpx.get(f"http://127.0.0.1:{balanced.ports[0]}/health/ready").status_code == 503, "draining")
        answers += [pool.submit(balanced.decode) for _ in range(12)]
        balanced.servers[0].terminate()  # a second time: at once
        balanced.servers[0].wait(30)
        answers += [pool.submit(balanced.decode) for _ in range(12)]
        assert {answer.result().status_code for answer in answers} == {200}
