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
from server.scheduling.costs import CostKey
from tests.server.conftest import OUTPUT, SIZE, Running, Serve, make_latent
from tests.server.runtimes import ControlledRuntime
from tests.waiting import until

ALICE, BOB = "alice-0123456789abcdef", "bob-fedcba9876543210"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# clients\n\nalice: {ALICE}\n# until May\nbob:{BOB}\n")
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class TestKeys:
    def test_only_probes_and_the_documentation_are_served_without_a_key(self, serve: Serve, keys: Path):
        with serve(api_keys=keys) as running:
            for path in ("/health/live", "/health/ready", "/metrics", "/", "/docs", "/openapi.json"):
                assert running.client.get(path).status_code == 200
            for headers in ({}, bearer("x" * 20), {"Authorization": "Bearer"}, {"Authorization": f"Basic {ALICE}"}):
                for path in ("/info", "/version", "/nowhere", "/docsx", "/openapi.json/x"):
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
            until(lambda: running.service.undelivered.requests == 0)  # a moment after the client has the last byte
            assert running.decode().status_code == 200

    def test_retry_after_of_a_busy_key_is_when_one_of_its_requests_ends(self, serve: Serve, keys: Path):
        runtime = ControlledRuntime({SIZE: SimulatedCost()}, max_batch=1, slots=1)
        with serve(runtime, api_keys=keys, max_in_flight_per_key=1) as running, ThreadPoolExecutor(1) as pool:
            runtime.pause()
            running.service.dispatcher.query(lambda scheduler: scheduler.costs.set(CostKey("step", OUTPUT), 1e3))
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
        ("text", "line"),
        [
            ("alice", 1),
            ("alice:", 1),
            (f":{ALICE}", 1),
            (f"\n# b\na:{ALICE[:15]}", 3),
            (f"a:{ALICE}\na:{BOB}", 2),
            (f"a:{BOB}\nb:{BOB}", 2),
            (f"a:{ALICE}#{BOB}", 1),
            (f"a:{ALICE} # until May", 1),
            (f"a#1:{ALICE}", 1),
            (f"a:{ALICE} {BOB}", 1),
            (f"a:{ALICE} ", 1),
            (f"a:{ALICE}\t", 1),
            (f"a:{ALICE}:{BOB}", 1),
            (f"a:{ALICE},{BOB}", 1),
            (f'a:"{ALICE}"', 1),
            (f"'a':{ALICE}", 1),
            (f"a:{ALICE}é", 1),
            (f"\ufeffa:{ALICE}", 1),
            (f"a:{ALICE}\r\nb:{BOB}\r\n", 1),
            (f"a:{ALICE}\rb:{BOB}", 1),
            (f"a:{ALICE}\0", 1),
            (f"a:{ALICE}\x0b\nb:{BOB}", 1),
            (f"a:{ALICE}\u2028b:{BOB}", 1),
            (f"a:{ALICE}\u200b", 1),
            (f"b:{BOB}\n\u00a0a:{ALICE}", 2),
        ],
    )
    def test_an_invalid_or_ambiguous_key_file_is_rejected_without_quoting_keys(
        self, tmp_path: Path, text: str, line: int
    ):
        path = tmp_path / "keys"
        path.write_bytes(text.encode())
        with pytest.raises(ConfigError) as raised:
            read_keys(path)
        message = str(raised.value)
        assert message.startswith(f"{path}:{line}: ")
        assert message.endswith(".")
        assert ALICE[:15] not in message
        assert BOB not in message

    @pytest.mark.parametrize("content", [b"", b"\n\n", b"# nobody", b"a:\xff0123456789abcdef", b"\xff\xfea\0:\0"])
    def test_a_key_file_without_keys_or_in_another_encoding_is_rejected(self, tmp_path: Path, content: bytes):
        path = tmp_path / "keys"
        path.write_bytes(content)
        with pytest.raises(ConfigError):
            read_keys(path)

    def test_comments_and_blanks_before_names_and_keys_change_no_key(self, tmp_path: Path):
        path = tmp_path / "keys"
        path.write_text(f"  # a:{BOB}\n \t\n\ta : {ALICE}\n#b:{BOB}\nalice smith:{BOB}==")
        key_file = KeyFile(path)
        assert (key_file.name_of(ALICE), key_file.name_of(f"{BOB}==")) == ("a", "alice smith")
        assert key_file.name_of(BOB) is None

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
            busy = [connect(running) for _ in range(2)]
            for connection in busy:
                connection.sendall(
                    b"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\nContent-Length: 9\r\n\r\n"
                )
            until(lambda: sample(running, "pid_connections", state="active") == 2)
            rejected = httpx.get(f"{running.url}/info")
            assert (rejected.status_code, rejected.json()["code"]) == (503, "too-many-connections")
            assert rejected.headers["content-type"] == "application/problem+json"
            assert rejected.headers["connection"] == "close"
            assert httpx.get(f"{running.url}/health/live").status_code == 200
            for connection in busy:
                connection.close()
            until(lambda: not connections(running))
            assert httpx.get(f"{running.url}/info").status_code == 200

    def test_connections_are_counted(self, serve: Serve):
        with serve(max_connections=7) as running:
            assert send(running, b"nonsense\r\n\r\n")[0] == 400
            assert sample(running, "pid_accepted_connections_total") == 1
            assert sample(running, "pid_refusals_total", code="malformed-request") == 1
            assert sample(running, "pid_connection_limit") == 7
            assert sample(running, "pid_aborted_connections_total", reason="evicted") == 0
            with connect(running):
                until(lambda: sample(running, "pid_connections", state="idle") == 1)
            until(lambda: sample(running, "pid_connections", state="idle") == 0)

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
            head = b"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\nContent-Length: 9\r\n\r\n"
            connection.sendall(head + b"abc")
            assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


def assert_closed(connection: socket.socket) -> None:
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass


def sample(running: Running, name: str, **labels: str) -> float | None:
    return running.service.metrics.registry.get_sample_value(name, labels)


def connections(running: Running) -> set:
    return running.server.server_state.connections
