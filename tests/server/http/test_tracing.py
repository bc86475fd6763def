"""Traces: one span per request, in the caller's trace, with stages and steps as children; nothing without --traces."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from engines.errors import DecodeError
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from server import http, logs, main, start
from server.http import tracing
from server.swaps import FixedDecoders
from tests.server.conftest import SIZE, Running, Serve, make_latent
from tests.server.runtimes import ControlledRuntime
from tests.server.test_shutdown import process
from tests.waiting import until

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "exporter", lambda endpoint: exporter)
    return exporter


@pytest.fixture
def traced(serve: Serve, exporter: InMemorySpanExporter) -> Iterator[Running]:
    runtime = SimulatedRuntime({SIZE: SimulatedCost(condition=0.002, step=0.005, finish=0.001)})
    with serve(runtime, traces="http://127.0.0.1:4318/v1/traces", max_images=2) as running:
        yield running


def spans(running: Running, exporter: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """Stop the server, which exports all spans; return the request's span and its children in order of their start."""
    running.server.should_exit = True
    running.client.close()
    until(lambda: any(span.kind is SpanKind.SERVER for span in exporter.get_finished_spans()))
    finished = exporter.get_finished_spans()
    (request,) = [span for span in finished if span.kind is SpanKind.SERVER]
    return request, sorted((span for span in finished if span is not request), key=lambda span: span.start_time or 0)


def test_a_request_has_a_child_for_each_stage_and_step(traced: Running, exporter: InMemorySpanExporter):
    assert traced.decode(seed=7).status_code == 200
    request, stages = spans(traced, exporter)
    assert [span.name for span in stages] == [
        "queue",
        "condition",
        *(f"step {number}" for number in range(4)),
        "finish",
        "encode",
    ]
    for span in stages:
        assert span.parent.span_id == request.context.span_id
        assert request.start_time - 5e6 <= span.start_time <= span.end_time <= request.end_time + 5e6
    steps = stages[2:6]
    assert all(span.end_time - span.start_time >= 5e6 for span in steps)
    assert all(a.end_time <= b.start_time for a, b in itertools.pairwise(steps))
    attributes = request.attributes
    assert attributes["http.response.status_code"] == 200
    assert (attributes["pid.size"], attributes["pid.seed"]) == ("64x64", 7)
    assert request.resource.attributes["service.name"] == "pid-decode-server"


def test_a_request_continues_the_callers_trace(traced: Running, exporter: InMemorySpanExporter):
    traced.client.headers["traceparent"] = f"00-{TRACE}-{CALLER}-01"
    traced.decode()
    request, stages = spans(traced, exporter)
    assert f"{request.parent.span_id:016x}" == CALLER
    assert {f"{span.context.trace_id:032x}" for span in (request, *stages)} == {TRACE}


def test_a_trace_that_the_caller_does_not_sample_is_not_exported(traced: Running, exporter: InMemorySpanExporter):
    traced.client.headers["traceparent"] = f"00-{TRACE}-{CALLER}-00"
    assert traced.decode().status_code == 200
    del traced.client.headers["traceparent"]
    assert traced.decode().status_code == 200
    request, _ = spans(traced, exporter)
    assert request.parent is None


def test_an_invalid_traceparent_starts_a_new_trace(traced: Running, exporter: InMemorySpanExporter):
    traced.client.headers["traceparent"] = "00-zz-zz-01"
    assert traced.decode().status_code == 200
    assert spans(traced, exporter)[0].parent is None


def test_spans_have_the_index_of_their_image(traced: Running, exporter: InMemorySpanExporter):
    assert traced.decode(make_latent(2, 16, 2, 2)).status_code == 200
    _, stages = spans(traced, exporter)
    assert [span.attributes["pid.image"] for span in stages if span.name == "condition"] == [0, 1]


def test_a_failed_request_has_an_error_status(serve: Serve, exporter: InMemorySpanExporter):
    runtime = ControlledRuntime({SIZE: SimulatedCost()})
    with serve(runtime, traces="http://127.0.0.1:4318/v1/traces") as running:
        runtime.error = DecodeError("The decoder failed on this image.")
        assert running.decode().status_code == 500
        request, stages = spans(running, exporter)
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes["pid.errors"] == ("decode-failed",)
    assert [span.name for span in stages] == ["queue", "condition"]


def test_probes_are_not_traced(traced: Running, exporter: InMemorySpanExporter):
    for path in ("/health/live", "/metrics", "/info"):
        assert traced.client.get(path).status_code == 200
    traced.decode()
    assert spans(traced, exporter)[0].name == "POST /decode"


def test_without_traces_opentelemetry_is_not_imported():
    code = (
        "import sys; from pathlib import Path; import server.main; from server.http.app import create_app\n"
        "from server.service import DecodeService; from server.settings import Settings\n"
        "from engines.runtime.simulated import SimulatedCost, SimulatedRuntime; from engines.size import Size\n"
        "runtime = SimulatedRuntime({Size(64, 64): SimulatedCost()})\n"
        "create_app(DecodeService(Settings(bundle=Path()), {'simulated': {'d': runtime}}))\n"
        "parts = ('opentelemetry.sdk', 'opentelemetry.exporter', 'server.http.tracing')\n"
        "loaded = [name for name in sys.modules if name.startswith(parts)]\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_opentelemetry_the_server_exits_and_names_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.delitem(sys.modules, "server.http.tracing")
    monkeypatch.delattr(http, "tracing")
    monkeypatch.setattr(logs, "configure", lambda level, log_format: None)
    source = FixedDecoders({"simulated": {"device": SimulatedRuntime({SIZE: SimulatedCost()})}})
    monkeypatch.setattr(main, "Bundles", lambda settings: source)
    assert start.main(["--bundle", ".", "--port", "0", "--traces", "http://127.0.0.1:4318/v1/traces"]) == 2
    message = capfd.readouterr().err
    assert "pip install 'pid-decode-server[otel]'" in message
    assert message.count("\n") == 1


def test_an_unreachable_collector_does_not_block_the_exit():
    with process("--drain-delay", "0", "--traces", "http://127.0.0.1:9/v1/traces") as server:
        assert server.decode().status_code == 200
        server.signal()
        assert server.status() == 0
