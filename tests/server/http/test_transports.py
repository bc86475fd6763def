"""The server on a Unix socket and with TLS, for curl and httpx."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.torch import save
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server.http.auth import fair_share_client
from server.process.listen import listening
from server.service import DecodeService
from server.settings import Settings
from tests.server.certificates import Certificate, make_certificate
from tests.server.conftest import SIZE, Running, make_latent, run_application, run_server, simulated
from tests.waiting import until

ROOT = Path(__file__).parents[3]
BODY, HEADERS = save({"latent": make_latent()}), {"Content-Type": "application/x-safetensors"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def client_certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("client"), "client")


@pytest.fixture(scope="module")
def with_tls(own: Certificate) -> Iterator[Running]:
    with run_server(ssl_certfile=own.certificate, ssl_keyfile=own.key, max_connections=3, header_timeout=2) as running:
        yield running


@pytest.fixture(scope="module")
def trusting(own: Certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=own.certificate)


def curl(*arguments: str | Path, body: bytes = BODY) -> SimpleNamespace:
    """POST `body` to /decode with curl; return status, body and exit status."""
    command = ["curl", "--silent", "--show-error", "--max-time", "30", "--data-binary", "@-", "--output", "-"]
    command += ["--header", "Content-Type: application/x-safetensors", "--write-out", "%{stderr}%{http_code}"]
    done = subprocess.run([*command, *map(str, arguments)], input=body, capture_output=True)
    return SimpleNamespace(status=done.stderr.decode().strip()[-3:], body=done.stdout, exit=done.returncode)


def noise() -> SimulatedRuntime:
    """Return a runtime whose larger images do not fit into the buffers of a connection."""
    size = Size(1024, 1024)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return SimulatedRuntime({size: SimulatedCost(), SIZE: SimulatedCost()}, {size: pixels})


NOISE_BODY = save({"latent": make_latent(16, 32, 32)})
NOISE_REQUEST = (
    b"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-safetensors\r\nContent-Length: %d\r\n\r\n"
    % len(NOISE_BODY)
) + NOISE_BODY


def connect(running: Running) -> socket.socket:
    """Return a connection without TLS and with a small receive buffer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
    return connection


def aborted(running: Running, reason: str) -> float:
    name = "pid_aborted_connections_total"
    return running.service.metrics.registry.get_sample_value(name, {"reason": reason}) or 0.0


def open_connections(running: Running) -> float:
    value = running.service.metrics.registry.get_sample_value
    return sum(value("pid_connections", {"state": state}) or 0.0 for state in ("idle", "active"))


def is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")


class TestUnixSocket:
    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.chdir(tmp_path)  # a short path, whatever the length of the temporary directory
        return "socket"

    @pytest.mark.parametrize("fair_by", ["key", "address"])
    def test_curl_and_httpx_decode(self, path: str, fair_by: str):
        with run_server(uds=path, fair_by=fair_by):
            response = curl("--unix-socket", path, "http://localhost/decode")
            assert (response.status, is_png(response.body)) == ("200", True)
            with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://localhost") as client:
                for _ in range(2):
                    assert is_png(client.post("/decode", content=BODY, headers=HEADERS).content)
        assert not Path(path).exists()

    def test_tls_works_on_it(self, path: str, own: Certificate):
        with run_server(uds=path, ssl_certfile=own.certificate, ssl_keyfile=own.key):
            response = curl("--unix-socket", path, "--cacert", own.certificate, "https://localhost/decode")
        assert (response.status, is_png(response.body)) == ("200", True)

    def test_all_its_clients_count_as_one(self):
        scope = {"client": None, "state": {"context": SimpleNamespace(client="")}}
        assert fair_share_client(scope, "address") == fair_share_client(scope, "key") == ""

    def test_a_client_that_reads_nothing_is_disconnected(self, path: str):
        with run_server(noise(), uds=path, response_timeout=0.5) as running, socket.socket(socket.AF_UNIX) as slow:
            slow.connect(path)
            slow.sendall(NOISE_REQUEST)
            until(lambda: aborted(running, "response-timeout") == 1)
            until(lambda: running.service.undelivered.requests == 0)


class TestTls:
    def test_curl_and_httpx_decode(self, with_tls: Running, own: Certificate, trusting: ssl.SSLContext):
        response = curl("--cacert", own.certificate, f"{with_tls.url}/decode")
        assert (response.status, is_png(response.body)) == ("200", True)
        with httpx.Client(verify=trusting, base_url=with_tls.url) as client:
            for _ in range(2):  # on one connection
                assert is_png(client.post("/decode", content=BODY, headers=HEADERS).content)
            assert client.head("/info").status_code == 200

    def test_an_unknown_certificate_is_not_trusted_by_clients(self, with_tls: Running):
        assert curl(f"{with_tls.url}/decode").exit == 60

    @pytest.mark.parametrize("version", ["1.2", "1.3"])
    def test_both_versions_are_supported(self, with_tls: Running, own: Certificate, version: str):
        options = [f"--tlsv{version}", "--tls-max", version, "--cacert", own.certificate]
        assert curl(*options, f"{with_tls.url}/decode").status == "200"

    def test_a_response_without_chunks_ends_with_the_connection(self, with_tls: Running, own: Certificate):
        response = curl("--http1.0", "--cacert", own.certificate, f"{with_tls.url}/decode")
        assert (response.exit, response.status, is_png(response.body)) == (0, "200", True)

    def test_a_rejected_body_gets_its_response(
        self, with_tls: Running, own: Certificate, caplog: pytest.LogCaptureFixture
    ):
        limit = with_tls.service.limits.max_body_bytes
        response = curl("--cacert", own.certificate, f"{with_tls.url}/decode", body=bytes(limit + 2**20))
        assert (response.exit, response.status, json.loads(response.body)["code"]) == (0, "413", "body-too-large")
        until(lambda: open_connections(with_tls) == 0)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_http_on_the_same_port_is_closed_and_harms_nobody(self, with_tls: Running, trusting: ssl.SSLContext):
        with pytest.raises(httpx.TransportError):
            httpx.get(with_tls.url.replace("https", "http"))
        assert httpx.get(f"{with_tls.url}/health/ready", verify=trusting).status_code == 200

    def test_a_handshake_that_does_not_end_has_the_time_of_a_head(self, own: Certificate):
        with (
            run_server(ssl_certfile=own.certificate, ssl_keyfile=own.key, header_timeout=0.2) as running,
            connect(running) as silent,
        ):
            assert silent.recv(1) == b""
            assert aborted(running, "header-timeout") == 1

    def test_a_connection_that_ends_before_its_handshake_is_forgotten(self, with_tls: Running):
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"):
            with connect(with_tls) as connection:
                until(lambda: open_connections(with_tls) > 0)
                connection.sendall(data)
            until(lambda: open_connections(with_tls) == 0)

    def test_handshakes_count_as_connections(self, with_tls: Running):
        before = aborted(with_tls, "evicted")
        with contextlib.ExitStack() as stack:
            first, *_ = [stack.enter_context(connect(with_tls)) for _ in range(4)]
            assert first.recv(1) == b""  # replaced by a later connection
            assert aborted(with_tls, "evicted") > before

    def test_an_idle_client_that_does_not_close_its_side_is_disconnected(
        self, own: Certificate, trusting: ssl.SSLContext
    ):
        settings = {"ssl_certfile": own.certificate, "ssl_keyfile": own.key, "keep_alive_timeout": 0.2}
        with run_server(**settings) as running, connect(running) as plain:
            client = trusting.wrap_socket(plain, server_hostname="localhost")
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in client.recv(4096)
            with socket.socket(fileno=os.dup(client.fileno())) as encrypted:
                encrypted.settimeout(20)  # less than asyncio would wait
                while encrypted.recv(4096):
                    pass  # the end of TLS, and then of the connection

    def test_a_client_that_reads_nothing_is_disconnected(self, own: Certificate, trusting: ssl.SSLContext):
        settings = {"ssl_certfile": own.certificate, "ssl_keyfile": own.key, "response_timeout": 0.5}
        with run_server(noise(), **settings) as running, connect(running) as plain:
            slow = trusting.wrap_socket(plain, server_hostname="localhost")
            slow.sendall(NOISE_REQUEST)
            until(lambda: aborted(running, "response-timeout") == 1)
            until(lambda: running.service.undelivered.requests == 0)


class TestClientCertificates:
    @pytest.fixture
    def running(self, own: Certificate, client_certificate: Certificate) -> Iterator[Running]:
        authorities = client_certificate.certificate
        with run_server(ssl_certfile=own.certificate, ssl_keyfile=own.key, ssl_ca_certs=authorities) as running:
            yield running

    def test_a_client_with_one_decodes(self, running: Running, own: Certificate, client_certificate: Certificate):
        options = ["--cert", client_certificate.certificate, "--key", client_certificate.key]
        response = curl("--cacert", own.certificate, *options, f"{running.url}/decode")
        assert (response.status, is_png(response.body)) == ("200", True)

    def test_clients_without_one_or_with_another_get_no_response(self, running: Running, own: Certificate):
        for options in ([], ["--cert", own.certificate, "--key", own.key]):
            response = curl("--cacert", own.certificate, *options, f"{running.url}/decode")
            assert (response.exit != 0, response.status) == (True, "000")


class TestHealthCheck:
    """docker/healthcheck.py, which reads the variables of the server."""

    @staticmethod
    def check(**environment: str | Path) -> int:
        command = [sys.executable, str(ROOT / "docker/healthcheck.py")]
        return subprocess.run(command, env={**os.environ, **{k: str(v) for k, v in environment.items()}}).returncode

    def test_it_connects_with_tls(self, with_tls: Running, own: Certificate):
        port = with_tls.url.rpartition(":")[2]
        assert self.check(PID_PORT=port, PID_SSL_CERTFILE=own.certificate) == 0
        assert self.check(PID_PORT=port) == 1

    def test_it_connects_to_a_unix_socket(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        with run_server(uds="socket") as running:
            assert self.check(PID_UDS="socket") == 0
            running.service.lifecycle.drain()
            assert self.check(PID_UDS="socket") == 1
        assert self.check(PID_UDS="socket") == 1


class TestScope:
    """What the application learns about a connection."""

    @staticmethod
    def scope(client: Any = None, headers: dict[str, str] | None = None, **settings: Any) -> dict[str, Any]:
        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            names = ("scheme", "client", "server")
            await JSONResponse({name: scope[name] for name in names})(scope, receive, send)

        service = DecodeService(
            Settings(bundle=".", port=0, encoder_threads=1, **settings), {"simulated": {"device": simulated()}}
        )
        with listening(service.settings.address) as listener, run_application(application, service, listener):
            name = listener.sockets[0].getsockname()
            scheme, host = (
                "https" if listener.tls else "http",
                "localhost" if isinstance(name, str) else f"127.0.0.1:{name[1]}",
            )
            document: dict[str, Any] = (client or httpx).get(f"{scheme}://{host}/", headers=headers).json()
        return document

    def test_with_tls_the_scheme_is_https(self, own: Certificate, trusting: ssl.SSLContext):
        with httpx.Client(verify=trusting) as client:
            scope = self.scope(client, ssl_certfile=own.certificate, ssl_keyfile=own.key)
        assert (scope["scheme"], scope["client"][0]) == ("https", "127.0.0.1")

    def test_a_unix_socket_has_no_client_address(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        with httpx.Client(transport=httpx.HTTPTransport(uds="socket")) as client:
            scope = self.scope(client, uds="socket")
        assert scope == {"scheme": "http", "client": None, "server": ["socket", None]}

    def test_forwarded_headers_change_nothing(self):
        scope = self.scope(headers={"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Proto": "https"})
        assert (scope["scheme"], scope["client"][0]) == ("http", "127.0.0.1")
