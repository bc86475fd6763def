"""What applies to decode requests of every protocol: keys, limits, deadlines, cancellation, metrics and traces."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engines.runtime.simulated import SimulatedCost
from server.http import tracing
from server.http.app import PROTOCOLS
from tests.server.conftest import SIZE, Running, Serve, make_latent, simulated
from tests.server.runtimes import ControlledRuntime
from tests.server.test_metrics import value
from tests.waiting import until

LATENT = make_latent(1, 16, 2, 2)


@dataclass(frozen=True)
class Request:
    """A valid request of a protocol."""

    path: str
    query: str
    media_type: str
    body: bytes
    route: str
    message: str  # the member of an error's JSON that has its message

    def send(self, running: Running, **headers: str) -> httpx.Response:
        all_headers = {"Content-Type": self.media_type} | {name.replace("_", "-"): x for name, x in headers.items()}
        return running.client.post(self.path + self.query, content=self.body, headers=all_headers)


KSERVE_INPUT = {"name": "latent", "shape": [1, 16, 2, 2], "datatype": "FP32", "data": LATENT.flatten().tolist()}
REQUESTS = {
    "decode": Request(
        "/decode",
        "?shape=1,16,2,2&dtype=float32",
        "application/octet-stream",
        LATENT.numpy().tobytes(),
        "/decode",
        "detail",
    ),
    "remote-decode": Request(
        "/remote-decode",
        "?shape=1,16,2,2&dtype=float32&do_scaling=true",
        "tensor/binary",
        LATENT.numpy().tobytes(),
        "/remote-decode",
        "detail",
    ),
    "kserve": Request(
        "/v2/models/simulated/infer",
        "",
        "application/json",
        json.dumps({"inputs": [KSERVE_INPUT]}).encode(),
        "/v2/models/{model}/infer",
        "error",
    ),
}
each = pytest.mark.parametrize("name", REQUESTS)


def controlled() -> ControlledRuntime:
    return ControlledRuntime({SIZE: SimulatedCost()})


def test_every_protocol_is_tested():
    assert [protocol.name for protocol in PROTOCOLS] == list(REQUESTS)


@each
def test_a_request_needs_a_key_if_the_server_has_keys(serve: Serve, tmp_path: Path, name: str):
    keys = tmp_path / "keys"
    keys.write_text("alice:" + "k" * 20)
    with serve(api_keys=keys) as running:
        request = REQUESTS[name]
        rejected = request.send(running)
        assert (rejected.status_code, rejected.json()["code"]) == (401, "unauthorized")
        assert request.send(running, Authorization="Bearer " + "k" * 20).status_code == 200


@each
def test_a_deadline_that_can_never_be_met_is_rejected(serve: Serve, name: str):
    with serve(simulated(costs={SIZE: SimulatedCost(step=0.05)})) as running:
        rejected = REQUESTS[name].send(running, X_Deadline_Ms="20")
        assert (rejected.status_code, rejected.json()["code"]) == (422, "deadline-too-short")
        assert "ms" in rejected.json()[REQUESTS[name].message]


@each
def test_a_full_queue_is_429_with_the_time_to_wait(serve: Serve, name: str):
    runtime = ControlledRuntime({SIZE: SimulatedCost()}, max_batch=1, slots=1)
    with serve(runtime, queue_images=2, standard_share=1) as running, contextlib.ExitStack() as connections:
        runtime.pause()
        for admitted in range(1, 4):  # one on the device, two queued
            connections.enter_context(_open(running, REQUESTS[name]))
            until(lambda expected=admitted: running.service.undelivered.requests == expected)
            assert runtime.entered.wait(60)  # the device has taken the first one from the queue
        rejected = REQUESTS[name].send(running)
        runtime.resume()
        assert (rejected.status_code, rejected.json()["code"]) == (429, "queue-full")
        assert int(rejected.headers["retry-after"]) >= 1


@each
def test_a_client_that_disconnects_cancels_its_decode(serve: Serve, name: str):
    runtime = controlled()
    with serve(runtime) as running:
        runtime.pause()
        with _open(running, REQUESTS[name]):
            runtime.entered.wait(60)
        until(lambda: running.service.undelivered.requests == 0)
        runtime.resume()
        until(lambda: value(running, "pid_running_images") == 0)
        assert value(running, "pid_image_outcomes_total", outcome="abandoned") == 1


@each
def test_a_body_over_the_limit_is_rejected(serve: Serve, name: str):
    with serve(max_body_bytes=1024) as running:
        request = REQUESTS[name]
        large = Request(request.path, "", "application/json", b" " * 1025, request.route, request.message)
        response = large.send(running)
        assert (response.status_code, response.json()["code"]) == (413, "body-too-large")


@each
def test_requests_in_flight_and_their_statuses_are_counted(serve: Serve, name: str):
    runtime = controlled()
    with serve(runtime) as running:
        runtime.pause()
        with _open(running, REQUESTS[name]):
            runtime.entered.wait(60)
            assert value(running, "pid_requests_in_flight") == 1
            runtime.resume()
            until(lambda: value(running, "pid_requests_total", code="200", protocol=name, decoder="simulated") == 1)
        assert value(running, "pid_requests_in_flight") == 0


@each
def test_a_trace_has_the_route(serve: Serve, monkeypatch: pytest.MonkeyPatch, name: str):
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "exporter", lambda endpoint: exporter)
    with serve(traces="http://127.0.0.1:4318/v1/traces") as running:
        assert REQUESTS[name].send(running).status_code == 200
    names = [span.name for span in exporter.get_finished_spans()]
    assert f"POST {REQUESTS[name].route}" in names
    assert "step 0" in names


def _open(running: Running, request: Request) -> socket.socket:
    """Send a request without waiting for the response."""
    connection = socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
    head = f"POST {request.path}{request.query} HTTP/1.1\r\nHost: x\r\nContent-Type: {request.media_type}\r\n"
    connection.sendall(f"{head}Content-Length: {len(request.body)}\r\n\r\n".encode() + request.body)
    return connection
