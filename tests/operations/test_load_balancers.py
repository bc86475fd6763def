"""The shipped configurations of load balancers: a real nginx and a real Envoy in front of two real servers."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from tests.operations.clusters import BODY, EIGHT, HEADERS, LARGE, Cluster, Envoy, Nginx
from tests.waiting import until

pytestmark = pytest.mark.operate


@pytest.fixture(scope="module", params=[Nginx, Envoy])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield request.param(tmp_path_factory.mktemp("cluster"), stack)


def test_both_servers_get_requests(cluster: Cluster):
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda seed: cluster.decode(seed=seed), range(16)))
    assert {response.status_code for response in responses} == {200}
    assert {response.content[:8] for response in responses} == {b"\x89PNG\r\n\x1a\n"}
    assert all(count >= 4 for count in cluster.count("pid_images_total"))


def test_a_rejected_request_is_retried_on_the_other_server_and_keeps_its_retry_after(cluster: Cluster):
    before = cluster.count("pid_refusals_total", code="queue-full")
    with ThreadPoolExecutor(24) as pool:
        responses = list(pool.map(cluster.send, [EIGHT] * 24))
    assert {response.status_code for response in responses} == {200, 429}
    rejected = [response for response in responses if response.status_code == 429]
    assert all(int(response.headers["retry-after"]) >= 1 for response in rejected)
    assert {response.headers["content-type"] for response in rejected} == {"application/problem+json"}
    after = cluster.count("pid_refusals_total", code="queue-full")
    # Each server saw each rejected request, and no request more than once.
    assert all(len(rejected) <= b - a <= len(responses) for a, b in zip(before, after, strict=True))


def test_the_limits_of_the_load_balancer_are_not_below_those_of_the_servers(cluster: Cluster):
    large = httpx.post(f"{cluster.url}/decode", content=bytes(20 << 20), headers=HEADERS, timeout=60)
    assert large.status_code == 400  # from the server: nginx would send 413
    limits = httpx.get(f"{cluster.url}/info").json()["limits"]
    (body,) = re.findall(cluster.body_limit, cluster.configuration)
    (seconds,) = re.findall(cluster.wait_limit, cluster.configuration)
    assert int(body.replace("m", "0" * 6)) >= limits["body_bytes"]
    assert int(seconds) >= limits["max_deadline_seconds"]


def test_a_disconnected_client_cancels_its_request_on_the_server(cluster: Cluster):
    before = sum(cluster.count("pid_cancelled_total", reason="client-left"))
    with socket.create_connection(("127.0.0.1", cluster.port)) as connection:
        head = f"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Length: {len(EIGHT)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/x-safetensors\r\n\r\n" + EIGHT)
        until(lambda: sum(cluster.count("pid_running_images")) > 0, "the decode to begin")
    until(lambda: sum(cluster.count("pid_cancelled_total", reason="client-left")) > before, "the server to cancel it")


@pytest.mark.parametrize("path", ["/metrics", "/metrics?x=1", "/%6detrics", "//metrics", "/docs/../metrics"])
def test_metrics_are_not_reachable_through_the_load_balancer(cluster: Cluster, path: str):
    connection = HTTPConnection("127.0.0.1", cluster.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        assert connection.getresponse().status == 404


def test_the_request_id_of_the_client_reaches_the_server(cluster: Cluster):
    response = httpx.post(f"{cluster.url}/decode", content=BODY, headers={**HEADERS, "X-Request-Id": "chosen"})
    assert response.headers["x-request-id"] == "chosen"


def test_requests_to_a_killed_server_are_retried_and_it_gets_requests_when_it_is_back(cluster: Cluster):
    killed = cluster.servers[0]
    killed.send_signal(signal.SIGSTOP)  # so that no response begins
    with ThreadPoolExecutor(8) as pool:
        responses = [pool.submit(cluster.send, LARGE) for _ in range(8)]
        until(lambda: sum(response.done() for response in responses) >= 2, "the responses of the other server")
        killed.kill()
        responses += [pool.submit(cluster.send, LARGE) for _ in range(8)]
        assert {response.result().status_code for response in responses} == {200}
    killed.wait()
    cluster.servers[0] = cluster.start(cluster.ports[0])
    cluster.wait_until_ready(cluster.ports[0])
    until(lambda: cluster.decode().status_code == 200 and cluster.count("pid_images_total")[0] > 0, "its requests")


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


def test_envoy_sends_no_requests_to_a_server_that_is_not_ready(tmp_path: Path):
    with contextlib.ExitStack() as stack:
        cluster = Envoy(tmp_path, stack, drain_delay=60)
        cluster.servers[0].terminate()  # not ready any more, but still accepts requests

        def avoided() -> bool:
            before = cluster.count("pid_images_total")[0]
            assert {cluster.decode().status_code for _ in range(16)} == {200}
            return cluster.count("pid_images_total")[0] == before

        until(avoided, "Envoy to send requests to the other server only")
        cluster.servers[0].kill()
