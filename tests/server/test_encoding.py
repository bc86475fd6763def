"""Requests whose images are being encoded: deadlines, disconnected clients, failures, an abort."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from engines.runtime.simulated import SimulatedCost
from server.images.encoding import EncodeProgress
from server.scheduling.jobs import Job
from server.scheduling.scheduler import Scheduler
from tests.server.conftest import IMAGE, OUTPUT, SIZE, Running, Serve, connect_and_disconnect, make_latent, simulated
from tests.server.runtimes import ControlledRuntime, LateRowsRuntime
from tests.server.test_metrics import outcomes, value
from tests.waiting import until


def encoding_images(running: Running) -> int:
    return running.service.dispatcher.query(Scheduler.encoding_images)


def cancelled(running: Running, reason: str) -> dict[str, float]:
    """Return the number of images cancelled because of `reason`, by stage."""
    stages = ("queued", "running", "encoding")
    return {stage: value(running, "pid_cancelled_total", stage=stage, reason=reason) for stage in stages}


@contextlib.contextmanager
def held_rows(serve: Serve) -> Iterator[tuple[Running, LateRowsRuntime]]:
    """A server whose encoders wait for rows that do not arrive until the end of the test."""
    runtime = LateRowsRuntime({SIZE: SimulatedCost()}, {SIZE: IMAGE})
    with serve(runtime) as running:
        runtime.arrived.clear()
        try:
            yield running, runtime
        finally:
            runtime.arrived.set()


class TestDeadline:
    def test_an_image_of_which_nothing_was_sent_gets_504(self, serve: Serve):
        with held_rows(serve) as (running, _):
            response = running.decode(format="jpeg", deadline_ms=300)
            assert (response.status_code, response.json()["code"]) == (504, "deadline-exceeded")
            assert "being encoded" in response.json()["detail"]
            assert outcomes(running) == {"in-time": 0, "late": 1, "failed": 0, "abandoned": 0, "invalid": 0}
            assert cancelled(running, "deadline-exceeded") == {"queued": 0, "running": 0, "encoding": 1}

    def test_a_response_that_has_begun_ends_incomplete(self, serve: Serve):
        with held_rows(serve) as (running, _):
            with pytest.raises(httpx.RemoteProtocolError):
                running.decode(deadline_ms=300)
            until(lambda: outcomes(running)["late"] == 1)

    def test_one_that_passes_during_a_step_gets_504_before_the_step_ends(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with serve(runtime) as running:
            runtime.pause()
            before = runtime.steps
            assert running.decode(deadline_ms=300).status_code == 504
            assert runtime.steps == before
            runtime.resume()
            until(lambda: running.service.dispatcher.query(Scheduler.running) == 0)
            assert running.decode().status_code == 200
            assert cancelled(running, "deadline-exceeded") == {"queued": 0, "running": 1, "encoding": 0}


class TestDisconnect:
    def test_an_image_that_is_being_encoded_is_abandoned_and_not_in_time(self, serve: Serve):
        with held_rows(serve) as (running, runtime):
            connect_and_disconnect(running, after=lambda: until(lambda: encoding_images(running) == 1))
            until(lambda: running.service.undelivered.requests == 0)
            assert outcomes(running) == {"in-time": 0, "late": 0, "failed": 0, "abandoned": 1, "invalid": 0}
            assert cancelled(running, "client-left") == {"queued": 0, "running": 0, "encoding": 1}
            runtime.arrived.set()
            until(lambda: encoding_images(running) == 0)
            assert running.decode().status_code == 200
            assert outcomes(running) == {"in-time": 1, "late": 0, "failed": 0, "abandoned": 1, "invalid": 0}

    def test_an_abort_does_not_count_a_cancelled_image_again(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with serve(runtime) as running:
            runtime.pause()
            connect_and_disconnect(running, after=lambda: runtime.entered.wait(60))
            until(lambda: running.service.undelivered.requests == 0)
            running.service.abort()
            runtime.resume()
            until(lambda: running.service.dispatcher.open_jobs() == 0)
            assert outcomes(running) == {"in-time": 0, "late": 0, "failed": 0, "abandoned": 1, "invalid": 0}
            assert cancelled(running, "client-left") == {"queued": 0, "running": 1, "encoding": 0}


class TestFailures:
    def test_an_encoder_that_fails_halfway_does_not_drop_the_rest_of_a_batch(self, serve: Serve):
        """The second strip fails, when the first one of its image has been encoded already."""
        with serve(simulated(max_batch=3), faults="die-in-encoder@1", allow_faults=True) as running:
            response = running.decode(make_latent(3, 16, 2, 2))
            boundary = response.headers["content-type"].split("boundary=")[1].encode()
            parts = [part.split(b"\r\n\r\n", 1) for part in response.content.split(b"--" + boundary)[1:-1]]
            kinds = [head.split(b"\r\n")[1].removeprefix(b"Content-Type: ") for head, _ in parts]
            assert sorted(kinds) == [b"application/problem+json", b"image/png", b"image/png"]
            for kind, (_, body) in zip(kinds, parts, strict=True):
                if kind == b"image/png":
                    assert (np.asarray(Image.open(io.BytesIO(body.removesuffix(b"\r\n")))) == IMAGE).all()
            assert outcomes(running) == {"in-time": 2, "late": 0, "failed": 1, "abandoned": 0, "invalid": 0}

    def test_a_failed_image_leaves_the_encoder(self, serve: Serve):
        with serve(faults="die-in-encoder", allow_faults=True) as running:
            assert running.decode().json()["code"] == "decode-failed"
            until(lambda: encoding_images(running) == 0)

    def test_an_abort_ends_images_that_are_being_encoded(self, serve: Serve):
        with held_rows(serve) as (running, _), ThreadPoolExecutor(3) as pool:
            responses = [pool.submit(running.decode, format="jpeg") for _ in range(3)]
            until(lambda: encoding_images(running) == 3)
            running.service.abort()
            results = [response.result() for response in responses]
            assert [(result.status_code, result.json()["code"]) for result in results] == 3 * [(503, "unavailable")]
            assert running.service.dispatcher.open_jobs() == 0


class TestCosts:
    def test_the_work_of_an_image_is_measured_and_not_its_wait(self, serve: Serve):
        with held_rows(serve) as (running, runtime), ThreadPoolExecutor(1) as pool:
            before = running.service.costs.encode(OUTPUT, "webp")
            response = pool.submit(running.decode, format="webp")
            until(lambda: encoding_images(running) == 1)
            assert value(running, "pid_encoding_images") == 1
            time.sleep(1.0)  # the rows are late
            runtime.arrived.set()
            assert response.result().status_code == 200
            until(lambda: running.service.costs.encode(OUTPUT, "webp") != before)
            assert running.service.costs.encode(OUTPUT, "webp") < 1.0
            assert 0 < value(running, "pid_encoder_busy_seconds_total") < 1.0
            assert value(running, "pid_encoder_backlog_seconds") == 0

    def test_images_that_never_finish_in_time_raise_an_estimate_that_is_too_low(self, serve: Serve):
        with serve() as running:
            dispatcher, costs = running.service.dispatcher, running.service.costs
            low = costs.encode(OUTPUT)
            job = Job(OUTPUT, (0,), payload=None)
            dispatcher.record_encoding(job, EncodeProgress(begun=0.2, done=0.1, work=low, ended=True))
            assert costs.encode(OUTPUT) > low
            high = costs.encode(OUTPUT)
            dispatcher.record_encoding(job, EncodeProgress(begun=0.2, done=0.1, work=0.01 * low, ended=True))
            dispatcher.record_encoding(job, EncodeProgress(ended=True))
            assert costs.encode(OUTPUT) == high
