"""Who may come in, on how many connections, with how large and how slow a request."""

from __future__ import annotations

import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from server.http.auth import KeyFile, read_keys
from tests.server.conftest import SIZE, Running, Serve, make_latent, until

ALICE, BOB = "alice-0123456789abcdef", "bob-fedcba9876543210"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may decode\n\nalice: {ALICE}\nbob:{BOB} # until May\n")
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class TestKeys:
    def test_without_a_known_key_only_health_and_metrics_answer(self, serve: Serve, keys: Path):
        with serve(api_keys=keys) as running:
            for path in ("/health/live", "/health/ready", "/metrics"):
                assert running.client.get(path).status_code == 200
            for headers in ({}, bearer("x" * 20), {"Authorization": "Bearer"}, {"Authorization": f"Basic {ALICE}"}):
                for path in ("/info", "/docs", "/openapi.json", "/nowhere"):
                    answer = running.client.get(path, headers=headers)
                    assert answer.status_code == 401
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert answer.headers["content-type"] == "application/problem+json"
                    assert answer.json()["code"] == "unauthorized"
            assert running.decode().status_code == 401
            for key in (ALICE, BOB):
                running.client.headers = bearer(key)
                assert running.decode().status_code == 200

    def test_a_key_has_a_limit_of_requests_in_flight_of_its_own(self, serve: Serve, keys: Path):
        runtime = Held({SIZE: SimulatedCost()})
        with serve(runtime, api_keys=keys, max_in_flight_per_key=2) as running, ThreadPoolExecutor(4) as pool:
            runtime.go.clear()
            running.client.headers = bearer(ALICE)
            answers = [pool.submit(running.decode) for _ in range(2)]
            until(lambda: running.service.undelivered.requests == 2)
            refused = running.decode()
            assert (refused.status_code, refused.json()["code"]) == (429, "key-busy")
            assert int(refused.headers["retry-after"]) >= 1
            other = httpx.get(f"{running.url}/info", headers=bearer(BOB))
            assert other.status_code == 200
            runtime.go.set()
            assert [answer.result().status_code for answer in answers] == [200] * 2
            assert running.decode().status_code == 200

    def test_the_file_is_read_again_when_it_changes_and_kept_when_it_breaks(self, keys: Path):
        now = 0.0
        known = KeyFile(keys, lambda: now)
        keys.write_text(f"carol: {BOB}\n")
        assert known.name_of(BOB) == "bob"  # not looked at yet
        now = 2.0
        assert (known.name_of(BOB), known.name_of(ALICE)) == ("carol", None)
        keys.write_text("nonsense")
        now = 4.0
        assert known.name_of(BOB) == "carol"
        os.unlink(keys)
        now = 6.0
        assert known.name_of(BOB) == "carol"

    @pytest.mark.parametrize(
        "text", ["", "# nobody", "alice", "alice:", f":{ALICE}", "a:short", f"a:{ALICE}\na:{BOB}", f"a:{BOB}\nb:{BOB}"]
    )
    def test_a_file_that_is_none_is_refused_without_quoting_keys(self, tmp_path: Path, text: str):
        path = tmp_path / "keys"
        path.write_text(text)
        with pytest.raises(ConfigError) as refusal:
            read_keys(path)
        assert ALICE not in str(refusal.value)
        assert BOB not in str(refusal.value)

    def test_a_file_that_is_not_there_is_refused(self, tmp_path: Path):
        with pytest.raises(ConfigError):
            KeyFile(tmp_path / "none")


class Held(SimulatedRuntime):
    """Steps wait until the test lets them go."""

    def __init__(self, *args):
        super().__init__(*args)
        self.go = threading.Event()
        self.go.set()

    def step(self, slots, indices):
        assert self.go.wait(60)
        super().step(slots, indices)


def connect(running: Running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer_to(running: Running, request: bytes) -> tuple[int, dict]:
    """Status and document of what a raw request gets, read until the server closes."""
    with connect(running) as connection:
        connection.sendall(request)
        data = b""
        while piece := connection.recv(65536):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    return int(head.split()[1]), json.loads(body)


class TestConnections:
    def test_one_connection_too_many_is_refused_but_not_a_probe(self, serve: Serve):
        with serve(max_connections=2) as running:
            running.client.close()
            idle = [connect(running) for _ in range(2)]
            until(lambda: len(connections(running)) == 2)
            refused = httpx.get(f"{running.url}/info")
            assert (refused.status_code, refused.json()["code"]) == (503, "too-many-connections")
            assert refused.headers["content-type"] == "application/problem+json"
            assert refused.headers["connection"] == "close"
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
    def test_headers_beyond_the_limits_are_refused(self, serve: Serve, head: bytes):
        with serve(max_header_bytes=2048, max_headers=16) as running:
            status, problem = answer_to(running, b"GET /info HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
            assert (status, problem["code"]) == (431, "headers-too-large")
            assert running.decode().status_code == 200

    def test_a_header_without_an_end_is_refused_before_it_ends(self, serve: Serve):
        with serve(max_header_bytes=2048) as running:
            status, _ = answer_to(running, b"GET /info HTTP/1.1\r\nX-Endless: " + b"a" * 4000)
            assert status == 431

    def test_headers_within_the_limits_are_taken_request_after_request(self, serve: Serve):
        with serve(max_header_bytes=2048, max_headers=16) as running:
            for _ in range(5):
                assert running.client.get("/info", headers={"X-Long": "a" * 1500}).status_code == 200
                assert running.decode(make_latent(4, 16, 2, 2)).status_code == 200  # a body is no header

    def test_what_is_no_http_is_a_problem_too(self, serve: Serve):
        with serve() as running:
            status, problem = answer_to(running, b"\x16\x03\x01 hello\r\n\r\n")
            assert (status, problem["code"]) == (400, "malformed-request")

    @pytest.mark.parametrize("begun", [b"", b"GET /info HT", b"GET /info HTTP/1.1\r\nHost: x\r\n"])
    def test_whoever_is_slow_to_send_headers_is_cut_off(self, serve: Serve, begun: bytes):
        with serve(header_timeout=0.2) as running, connect(running) as connection:
            connection.sendall(begun)
            assert_closed(connection)

    def test_an_idle_connection_is_closed(self, serve: Serve):
        with serve(keep_alive_timeout=0.2) as running, connect(running) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            assert_closed(connection)

    def test_a_body_that_trickles_is_given_up(self, serve: Serve):
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
