"""Full queues, disconnected clients and failed decodes, each without effect on other requests."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

from engines.errors import DecodeError
from engines.runtime.simulated import SimulatedCost
from tests.server.conftest import SIZE, Running, Serve, connect_and_disconnect, make_latent
from tests.server.runtimes import ControlledRuntime, PoisonedRuntime
from tests.waiting import until


def open_jobs(running: Running) -> int:
    return running.service.dispatcher.open_jobs()


def test_a_full_queue_rejects_with_retry_after_and_loses_no_request(serve: Serve):
    runtime = ControlledRuntime({SIZE: SimulatedCost()}, max_batch=1, slots=1)
    with serve(runtime, queue_images=2, standard_share=1) as running, ThreadPoolExecutor(3) as pool:
        runtime.pause()
        responses = []
        for admitted in range(3):  # one on the device, two queued
            responses.append(pool.submit(running.decode))
            until(lambda expected=admitted + 1: open_jobs(running) == expected)
        rejected = running.decode()
        assert rejected.status_code == 429
        assert rejected.json()["code"] == "queue-full"
        assert int(rejected.headers["retry-after"]) >= 1
        runtime.resume()
        assert [response.result().status_code for response in responses] == [200] * 3


def test_a_disconnected_client_frees_its_place_and_stops_its_decode(serve: Serve):
    runtime = ControlledRuntime({SIZE: SimulatedCost()}, max_batch=1, slots=1)
    with serve(runtime) as running:
        runtime.pause()
        before = runtime.steps
        connect_and_disconnect(running, after=lambda: runtime.entered.wait(60))
        until(lambda: running.service.undelivered.requests == 0)
        runtime.resume()
        until(lambda: runtime.steps == before + 1)  # the step that was running
        assert running.decode().status_code == 200
        assert runtime.steps == before + 1 + 4
        metrics = running.client.get("/metrics").text
        assert 'pid_cancelled_total{decoder="simulated",reason="client-left",stage="running"} 1.0' in metrics


def test_a_failed_decode_is_a_500_for_its_request_only(serve: Serve):
    runtime = ControlledRuntime({SIZE: SimulatedCost()})
    with serve(runtime) as running:
        runtime.error = DecodeError("The decoder failed on this image.")
        failed = running.decode()
        assert (failed.status_code, failed.json()["code"]) == (500, "decode-failed")
        runtime.error = None
        assert running.decode().status_code == 200
        assert running.client.get("/health/live").status_code == 200


def test_one_failed_image_does_not_fail_the_rest_of_its_batch(serve: Serve):
    error = DecodeError("The decoder failed on this image.")
    runtime = PoisonedRuntime(error, {SIZE: SimulatedCost(step=0.01, batch_slope=0.1)}, max_batch=3, slots=3)
    with serve(runtime) as running:
        latents = make_latent(3, 16, 2, 2)
        latents[1] = PoisonedRuntime.POISON
        response = running.decode(latents)
        boundary = response.headers["content-type"].split("boundary=")[1].encode()
        head, *parts = response.content.split(b"--" + boundary)
        assert head == b""
        assert [part.split(b"\r\n")[1] for part in parts[:3]] == [
            b"Content-Type: image/png",
            b"Content-Type: application/problem+json",
            b"Content-Type: image/png",
        ]
        assert json.loads(parts[1].split(b"\r\n\r\n")[1])["code"] == "decode-failed"


def test_after_a_device_thread_dies_every_request_gets_503_and_liveness_is_off(serve: Serve):
    runtime = ControlledRuntime({SIZE: SimulatedCost()})
    with serve(runtime) as running:
        runtime.error = RuntimeError("unexpected")
        response = running.decode()
        assert (response.status_code, response.json()["code"]) == (503, "device-lost")
        assert running.client.get("/health/live").status_code == 503
        assert running.decode().status_code == 503


def test_a_deadline_that_can_never_be_met_is_a_422_that_states_the_time_needed(serve: Serve):
    runtime = ControlledRuntime({SIZE: SimulatedCost(step=0.05)})
    with serve(runtime) as running:
        rejected = running.decode(deadline_ms=20)
        assert (rejected.status_code, rejected.json()["code"]) == (422, "deadline-too-short")
        assert "retry-after" not in rejected.headers
        needed = int(re.search(r"at least (\d+) ms", rejected.json()["detail"]).group(1))
        assert needed >= 200
        assert running.decode(deadline_ms=needed + 10).status_code in (200, 504)  # accepted by the idle server
        assert running.decode(deadline_ms=60_000).status_code == 200


def test_a_request_with_more_images_than_the_queue_holds_is_a_422(serve: Serve):
    with serve(queue_images=2, batch_share=0.5) as running:
        for images, priority in ((3, "interactive"), (2, "batch")):
            rejected = running.decode(make_latent(images, 16, 2, 2), priority=priority)
            assert (rejected.status_code, rejected.json()["code"]) == (422, "too-many-images")
            assert "retry-after" not in rejected.headers


def test_the_default_deadline_allows_for_all_images_of_a_request(serve: Serve):
    runtime = ControlledRuntime({SIZE: SimulatedCost(step=0.02)}, max_batch=1)
    with serve(runtime, deadline=0.1) as running:
        response = running.decode(make_latent(8, 16, 2, 2))
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("multipart/mixed")
