"""Access: API keys, and limits on connections, headers and slow clients."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost
from server.http.auth import KeyFile, fair_share_client, read_keys
from server.http.context import RequestContext
from tests.server.conftest import SIZE, Running, Serve, make_latent, until
from tests.server.runtimes import ControlledRuntime

ALICE, BOB = "alice-0123456789abcdef", "bob-fedcba9876543210"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# clients\n\nalice: {ALICE}\nbob:{BOB} # until May\n")
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class TestKeys:
    def test_only_health_and_metrics_are_served_without_a_key(self, serve: Serve, keys: Path):
        with serve(api_keys=keys) as running:
            for path in ("/health/live", "/health/ready", "/metrics"):
                assert running.client.get(path).status_code == 200
            for headers in ({}, bearer("x" * 20), {"Authorization": "Bearer"}, {"Authorization": f"Basic {ALICE}"}):
                for path in ("/info", "/docs", "/openapi.json", "/nowhere"):
                    response = running.client.get(path, headers=headers)
                    assert response.status_code == 401
                    assert response.headers["www-authenticate"] == "Bearer"
                    assert response.headers["content-type"] == "application/problem+json"
                    assert response.json()["code"] == "unauthorized"
            assert running.decode().status_code == 401
            for key in (ALICE, BOB):
                running.client.headers = bearer(key)
                assert running.decode().status_code == 200

    def test_requests_in_flight_are_limited_per_key(self, serve: Serve, keys: Path):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with serve(runtime, api_keys=keys, max_in_flight_per_key=2) as running, ThreadPoolExecutor(4) as pool:
            runtime.pause()
            running.client.headers = bearer(ALICE)
            responses = [pool.submit(running.decode) for _ in range(2)]
            until(lambda: running.service.undelivered.requests == 2)
            rejected = running.decode()
            assert (rejected.status_code, rejected.json()["code"]) == (429, "key-busy")
            assert int(rejected.headers["retry-after"]) >= 1
            other = httpx.get(f"{running.url}/info", headers=bearer(BOB))
            assert other.status_code == 200
            runtime.resume()
            assert [response.result().status_code for response in responses] == [200] * 2
            assert running.decode().status_code == 200

    def test_retry_after_of_a_busy_key_is_when_one_of_its_requests_ends(self, serve: Serve, keys: Path):
        runtime = ControlledRuntime({SIZE: SimulatedCost()}, max_batch=1, slots=1)
        with serve(runtime, api_keys=keys, max_in_flight_per_key=1) as running, ThreadPoolExecutor(1) as pool:
            runtime.pause()
            running.service.dispatcher.observe("step", SIZE, 1e3)  # raises the prediction
            running.client.headers = bearer(ALICE)
            response = pool.submit(running.decode)
            until(lambda: running.service.undelivered.requests == 1)
            assert int(running.decode().headers["retry-after"]) > 1
            runtime.resume()
            assert response.result().status_code == 200

    def test_a_key_that_asks_for_interactive_does_not_lock_out_another(self, serve: Serve, keys: Path):
        runtime = ControlledRuntime({SIZE: SimulatedCost()}, max_batch=1, slots=1)
        with serve(runtime, api_keys=keys, queue_images=8) as running, ThreadPoolExecutor(16) as pool:
            runtime.pause()
            running.client.headers = bearer(ALICE)
            responses = [pool.submit(running.decode, priority="interactive") for _ in range(14)]
            until(lambda: sum(response.done() for response in responses) >= 7)  # the others were accepted
            running.client.headers = bearer(BOB)
            other = pool.submit(running.decode)
            accepted = running.service.undelivered.requests
            until(lambda: running.service.undelivered.requests == accepted + 1)
            runtime.resume()
            assert other.result().status_code == 200
            assert Counter(response.result().status_code for response in responses) == {200: 7, 429: 7}

    def test_a_changed_key_file_is_reloaded_and_an_invalid_one_ignored(self, keys: Path):
        now = 0.0
        key_file = KeyFile(keys, lambda: now)
        keys.write_text(f"carol: {BOB}\n")
        assert key_file.name_of(BOB) == "bob"  # not checked again yet
        now = 2.0
        assert (key_file.name_of(BOB), key_file.name_of(ALICE)) == ("carol", None)
        keys.write_text("nonsense")
        now = 4.0
        assert key_file.name_of(BOB) == "carol"
        os.unlink(keys)
        now = 6.0
        assert key_file.name_of(BOB) == "carol"

    @pytest.mark.parametrize(
        "text", ["", "# nobody", "alice", "alice:", f":{ALICE}", "a:short", f"a:{ALICE}\na:{BOB}", f"a:{BOB}\nb:{BOB}"]
    )
    def test_an_invalid_key_file_is_rejected_without_quoting_keys(self, tmp_path: Path, text: str):
        path = tmp_path / "keys"
        path.write_text(text)
        with pytest.raises(ConfigError) as raised:
            read_keys(path)
        assert ALICE not in str(raised.value)
        assert BOB not in str(raised.value)

    def test_a_missing_key_file_is_rejected(self, tmp_path: Path):
        with pytest.raises(ConfigError):
            KeyFile(tmp_path / "none")


def connect(running: Running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def send(running: Running, request: bytes) -> tuple[int, dict]:
    """Send a raw request; return status and problem document once the server has closed the connection."""
    with connect(running) as connection:
        connection.sendall(request)
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    return int(head.split()[1]), json.loads(body)


class TestFairness:
    @pytest.mark.parametrize(
        ("address", "client"),
        [
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("fe80::1%eth0", "fe80::/64"),
        ],
    )
    def test_clients_may_be_told_apart_by_address(self, address: str, client: str):
        scope = {"client": (address, 1234), "state": {"context": RequestContext("id", client="alice")}}
        assert fair_share_client(scope, "address") == client
        assert fair_share_client(scope, "key") == "alice"

    def test_requests_belong_to_the_clients_that_the_setting_names(self, serve: Serve):
        for fair_by, client in (("key", ""), ("address", "127.0.0.1")):
            runtime = ControlledRuntime({SIZE: SimulatedCost()})
            with serve(runtime, fair_by=fair_by) as running, ThreadPoolExecutor(1) as pool:
                runtime.pause()
                response = pool.submit(running.decode)
                until(lambda running=running: running.service.undelivered.requests == 1)
                assert running.service.undelivered.next_end(client) is not None
                runtime.resume()
                assert response.result().status_code == 200


class TestConnections:
    def test_a_connection_over_the_limit_is_rejected_except_for_probes(self, serve: Serve):
        with serve(max_connections=2) as running:
            running.client.close()
            idle = [connect(running) for _ in range(2)]
            until(lambda: len(connections(running)) == 2)
            rejected = httpx.get(f"{running.url}/info")
            assert (rejected.status_code, rejected.json()["code"]) == (503, "too-many-connections")
            assert rejected.headers["content-type"] == "application/problem+json"
            assert rejected.headers["connection"] == "close"
            assert httpx.get(f"{running.url}/health/live").status_code == 200
            for connection in idle:
                connection.close()
            until(lambda: not connections(running))
            assert httpx.get(f"{running.url}/info").status_code == 200

    @pytest.mark.parametrize(
        "head",
        [
            b"X-Long: " + b"a" * 3000,
            b"\r\n".join(b"X-%d: a" % i for i in range(20)),
        ],
    )
    def test_headers_over_the_limits_are_rejected(self, serve: Serve, head: bytes):
        with serve(max_header_bytes=2048, max_headers=16) as running:
            status, problem = send(running, b"GET /info HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
            assert (status, problem["code"]) == (431, "headers-too-large")
            assert running.decode().status_code == 200

    def test_an_endless_header_is_rejected_before_it_is_complete(self, serve: Serve):
        with serve(max_header_bytes=2048) as running:
            status, _ = send(running, b"GET /info HTTP/1.1\r\nX-Endless: " + b"a" * 4000)
            assert status == 431

    def test_headers_within_the_limits_are_accepted_in_every_request(self, serve: Serve):
        with serve(max_header_bytes=2048, max_headers=16) as running:
            for _ in range(5):
                assert running.client.get("/info", headers={"X-Long": "a" * 1500}).status_code == 200
                assert running.decode(make_latent(4, 16, 2, 2)).status_code == 200  # the body does not count

    def test_invalid_http_gets_a_problem_document(self, serve: Serve):
        with serve() as running:
            status, problem = send(running, b"\x16\x03\x01 hello\r\n\r\n")
            assert (status, problem["code"]) == (400, "malformed-request")

    @pytest.mark.parametrize("beginning", [b"", b"GET /info HT", b"GET /info HTTP/1.1\r\nHost: x\r\n"])
    def test_a_client_that_sends_headers_too_slowly_is_disconnected(self, serve: Serve, beginning: bytes):
        with serve(header_timeout=0.2) as running, connect(running) as connection:
            connection.sendall(beginning)
            assert_closed(connection)

    def test_an_idle_connection_is_closed(self, serve: Serve):
        with serve(keep_alive_timeout=0.2) as running, connect(running) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            assert_closed(connection)

    def test_a_body_that_arrives_too_slowly_is_rejected(self, serve: Serve):
        with serve(body_timeout=0.2) as running, connect(running) as connection:
            connection.sendall(b"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
            assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


def assert_closed(connection: socket.socket) -> None:
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass


def connections(running: Running) -> set:
    return running.server.server_state.connections
