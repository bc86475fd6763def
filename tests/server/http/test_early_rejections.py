"""What the head of a request shows to be wrong is rejected before the body is read or asked for."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import save

from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from server.request import BODY_OVERHEAD
from tests.server.conftest import SIZE, Running, Serve, make_latent
from tests.server.runtimes import ControlledRuntime
from tests.waiting import until

NPY = "Content-Type: application/x-npy"
JSON = "Content-Type: application/json"
Response = tuple[int, dict[str, str], dict]


def connect(running: Running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def send_head(
    connection: socket.socket, *lines: str, target: str = "/decode", length: int | None = 5000, method: str = "POST"
) -> None:
    """Send the head of a request whose client waits for 100 Continue."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    head = [f"{method} {target} HTTP/1.1", "Host: x", "Expect: 100-continue", size, *lines]
    connection.sendall("".join(f"{line}\r\n" for line in [*head, ""]).encode())


def read_response(connection: socket.socket) -> Response:
    """Return status, headers and problem document of the next response, which may be 100 Continue."""
    with connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(file.readline, b"\r\n"))
        return status, headers, json.loads(file.read(int(headers.get("content-length", 0))) or b"{}")


def rejection(running: Running, *lines: str, **arguments) -> Response:
    """Send a head without a body and return the response."""
    with connect(running) as connection:
        send_head(connection, *lines, **arguments)
        return read_response(connection)


@pytest.mark.parametrize(
    ("lines", "target", "status", "code"),
    [
        ([NPY], "/decode?steps=9", 422, "invalid-option"),
        ([NPY], "/decode?x=1", 422, "invalid-option"),
        ([NPY], "/decode?seed=1&seed=2", 422, "invalid-option"),
        ([NPY], "/decode?shape=16,2,2", 422, "invalid-option"),
        ([NPY], "/decode?deadline_ms=600001", 422, "invalid-option"),
        ([NPY, "X-Deadline-Ms: 0"], "/decode", 422, "invalid-option"),
        ([NPY, "X-Deadline-Ms: soon"], "/decode", 422, "invalid-option"),
        ([JSON], "/decode?steps=9", 422, "invalid-option"),
        (["Content-Type: application/octet-stream"], "/decode?shape=16,2,2", 422, "invalid-option"),
        (
            ["Content-Type: application/octet-stream"],
            "/decode?shape=16,99,2&dtype=float16",
            422,
            "invalid-latent",
        ),
        ([], "/decode?steps=9", 422, "invalid-option"),
        ([], "/decode?shape=16,99,2&dtype=float16", 422, "invalid-latent"),
        (["Content-Type: text/plain"], "/decode", 415, "unsupported-media-type"),
        ([NPY, JSON], "/decode", 415, "unsupported-media-type"),
        (["Content-Type: application/x-npy, application/json"], "/decode", 415, "unsupported-media-type"),
        (["Content-Type: multipart/form-data"], "/decode", 400, "malformed-body"),
        ([NPY, "Content-Encoding: gzip"], "/decode", 415, "unsupported-media-type"),
        ([NPY, "Accept: text/html"], "/decode", 406, "not-acceptable"),
        ([NPY], "/nowhere", 404, "no-such-route"),
        ([NPY], "/info", 405, "no-such-route"),
    ],
)
@pytest.mark.parametrize("length", [5000, None])
def test_what_the_head_shows_to_be_wrong_is_rejected_without_the_body(
    server: Running, lines: list[str], target: str, status: int, code: str, length: int | None
):
    got, _, problem = rejection(server, *lines, target=target, length=length)
    assert (got, problem["code"]) == (status, code)


def test_a_declared_length_that_is_too_large_or_wrong_is_rejected_without_the_body(server: Running):
    got, _, problem = rejection(server, NPY, length=10**9)
    assert (got, problem["code"]) == (413, "body-too-large")
    raw = {"target": "/decode?shape=16,2,2&dtype=float16", "length": 127}
    got, _, problem = rejection(server, "Content-Type: application/octet-stream", **raw)
    assert (got, problem["code"]) == (400, "malformed-body")


@pytest.mark.parametrize("lines", [[NPY], [JSON, "Accept: text/html"], [NPY, "Accept: multipart/mixed"]])
def test_a_body_that_may_be_valid_is_asked_for(server: Running, lines: list[str]):
    assert rejection(server, *lines)[0] == 100


def test_a_request_without_a_key_is_rejected_without_the_body(serve: Serve, tmp_path: Path):
    (tmp_path / "keys").write_text("alice:0123456789abcdef")
    with serve(api_keys=tmp_path / "keys") as running:
        assert rejection(running, NPY)[0] == 401
        assert rejection(running, NPY, "Authorization: Bearer 0123456789abcdef")[0] == 100


def test_a_server_that_is_starting_or_does_not_accept_rejects_without_the_body(serve: Serve):
    release = threading.Event()

    class SlowToWarmUp(SimulatedRuntime):
        def warm_up(self) -> None:
            assert release.wait(60)

    with serve(SlowToWarmUp({SIZE: SimulatedCost()}), wait=False) as running:
        for lines in ([NPY], [JSON]):
            status, _, problem = rejection(running, *lines)
            assert (status, problem["code"]) == (503, "unavailable")
        release.set()
        until(lambda: running.decode().status_code == 200)
        running.service.abort()
        assert rejection(running, NPY)[0] == 503


def test_a_full_queue_rejects_without_the_body(serve: Serve):
    runtime = ControlledRuntime({SIZE: SimulatedCost()}, max_batch=1, slots=1)
    with serve(runtime, queue_images=2) as running, ThreadPoolExecutor(4) as pool:
        runtime.pause()
        responses = [pool.submit(running.decode)]
        until(runtime.entered.is_set)
        responses.append(pool.submit(running.decode))
        until(lambda: running.service.undelivered.requests == 2)
        # Batch and standard requests may only use their share of the queue, which is one image.
        status, headers, problem = rejection(running, NPY)
        assert (status, problem["code"]) == (429, "queue-full")
        assert int(headers["retry-after"]) >= 1
        assert rejection(running, NPY, target="/decode?priority=batch")[0] == 429
        assert rejection(running, NPY, target="/decode?priority=interactive")[0] == 100
        assert rejection(running, JSON)[0] == 100  # the body may ask for `interactive`
        assert rejection(running, JSON, target="/decode?priority=batch")[0] == 429
        responses.append(pool.submit(running.decode, priority="interactive"))
        until(lambda: running.service.undelivered.requests == 3)
        assert rejection(running, JSON)[0] == 429
        runtime.resume()
        assert [response.result().status_code for response in responses] == [200] * 3


def test_undelivered_responses_over_their_limit_reject_without_the_body(serve: Serve):
    runtime = ControlledRuntime({SIZE: SimulatedCost()})
    with serve(runtime, pending_bytes=1) as running, ThreadPoolExecutor(1) as pool:
        runtime.pause()
        response = pool.submit(running.decode)
        until(lambda: running.service.undelivered.requests == 1)
        status, _, problem = rejection(running, NPY)
        assert (status, problem["code"]) == (429, "queue-full")
        runtime.resume()
        assert response.result().status_code == 200


class TestBodyMemory:
    @pytest.mark.parametrize("length", [200, None])
    def test_bodies_that_do_not_fit_are_rejected_and_later_ones_are_not(self, serve: Serve, length: int | None):
        with serve(body_memory_bytes=1000) as running, connect(running) as first:
            body = save({"latent": make_latent(3, 16, 2, 2)})
            assert len(body) > 840
            send_head(first, "Content-Type: application/x-safetensors", length=len(body))
            assert read_response(first)[0] == 100
            first.sendall(body[:840])
            until(lambda: running.service.body_memory.bytes == 840)
            with connect(running) as second:
                send_head(second, NPY, length=length)
                if length is None:  # only the bytes that arrive show that they do not fit
                    assert read_response(second)[0] == 100
                    second.sendall(b"c8\r\n" + bytes(200) + b"\r\n")
                status, headers, problem = read_response(second)
            assert (status, problem["code"]) == (429, "body-memory-full")
            assert int(headers["retry-after"]) >= 1
            first.sendall(body[840:])
            until(lambda: running.service.body_memory.bytes == 0)
            assert running.decode().status_code == 200

    def test_a_client_that_disconnects_releases_the_memory_of_its_body(self, serve: Serve):
        with serve() as running:
            with connect(running) as connection:
                send_head(connection, NPY)
                assert read_response(connection)[0] == 100
                connection.sendall(bytes(400))
                until(lambda: running.service.body_memory.bytes == 400)
            until(lambda: running.service.body_memory.bytes == 0)


def test_the_default_limit_of_a_body_is_what_the_decoder_can_use(serve: Serve):
    with serve(max_images=3) as running:
        info = running.client.get("/info").json()
        (decoder,) = info["decoders"]
        height, width = max(size["latent"] for size in decoder["sizes"])
        caption = decoder["caption"]["tokens"] * decoder["caption"]["width"]
        elements = 3 * (decoder["latent_space"]["channels"] * height * width + caption)
        assert info["limits"]["body_bytes"] == 4 * -(-4 * elements // 3) + BODY_OVERHEAD
    with serve(max_body_bytes=5000) as running:
        assert running.client.get("/info").json()["limits"]["body_bytes"] == 5000
