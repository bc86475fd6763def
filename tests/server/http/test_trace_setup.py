"""Where traces are exported to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from engines.errors import ConfigError
from server import http
from server.http.trace_setup import environment_endpoint, find_tracer_provider
from tests.server.conftest import Serve

BASE, TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
URL = "http://collector:4318"


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({BASE: ""}, None),
        ({BASE: URL}, f"{URL}/v1/traces"),
        ({BASE: f"{URL}/"}, f"{URL}/v1/traces"),
        ({BASE: f"{URL}/otlp"}, f"{URL}/otlp/v1/traces"),
        ({TRACES: f"{URL}/mine"}, f"{URL}/mine"),
        ({TRACES: f"{URL}/mine", BASE: "http://other:4318"}, f"{URL}/mine"),
        ({TRACES: "", BASE: URL}, f"{URL}/v1/traces"),
        ({BASE: URL, "OTEL_SDK_DISABLED": "True"}, None),
        ({BASE: URL, "OTEL_SDK_DISABLED": "false"}, f"{URL}/v1/traces"),
        ({BASE: URL, "OTEL_TRACES_EXPORTER": "none"}, None),
        ({BASE: URL, "OTEL_TRACES_EXPORTER": "console"}, None),
        ({BASE: URL, "OTEL_TRACES_EXPORTER": "console, otlp"}, f"{URL}/v1/traces"),
        ({BASE: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, f"{URL}/v1/traces"),
    ],
)
def test_the_environment_selects_the_endpoint_as_opentelemetry_defines(environment: dict, endpoint: str | None):
    assert environment_endpoint(environment) == endpoint


def test_a_protocol_that_is_not_supported_is_logged(caplog: pytest.LogCaptureFixture):
    protocols = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}
    assert environment_endpoint({BASE: URL, **protocols}) is None
    assert "grpc is not supported" in caplog.text


@pytest.fixture
def collector() -> Iterator[tuple[str, list[str]]]:
    """URL of a collector of traces, and the paths of the requests that it received."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()
        thread.join()


def test_spans_arrive_where_the_environment_sends_them(
    serve: Serve, collector: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
):
    url, paths = collector
    monkeypatch.setenv(BASE, url)
    with serve() as running:
        assert running.decode().status_code == 200
    assert paths == ["/v1/traces"]


def test_the_flag_takes_precedence(serve: Serve, collector: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch):
    url, paths = collector
    monkeypatch.setenv(TRACES, f"{url}/environment")
    with serve(traces=f"{url}/flag") as running:
        assert running.decode().status_code == 200
    assert paths == ["/flag"]


class TestWithoutOpenTelemetry:
    @pytest.fixture(autouse=True)
    def not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
        monkeypatch.delitem(sys.modules, "server.http.tracing", raising=False)
        monkeypatch.delattr(http, "tracing", raising=False)

    def test_the_environment_only_leads_to_a_warning(self, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.WARNING):
            assert find_tracer_provider(None, {BASE: URL}) is None
        (message,) = caplog.messages
        assert f"no traces are exported to {URL}/v1/traces" in message
        assert "pip install 'pid-decode-server[otel]'" in message

    def test_the_flag_is_an_error(self):
        with pytest.raises(ConfigError, match="pip install"):
            find_tracer_provider(f"{URL}/v1/traces", {})

    def test_nothing_is_logged_if_no_traces_are_wanted(self, caplog: pytest.LogCaptureFixture):
        assert find_tracer_provider(None, {}) is None
        assert not caplog.messages
