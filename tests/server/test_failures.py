"""Failures: every request still gets a response, and /health reports the true state of the process."""

from __future__ import annotations

import io
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save

from engines.errors import ConfigError, DeviceMemoryError
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server.command_line import read_settings
from server.errors import QueueFullError
from server.scheduling.jobs import Job, Priority
from server.scheduling.scheduler import Scheduler
from server.service import DecodeService
from server.settings import Settings
from server.watchdog import is_stuck
from tests.server.conftest import LARGER, OUTPUT, SIZE, Running, Serve, make_latent, simulated
from tests.server.runtimes import ControlledRuntime
from tests.waiting import until

LOCAL = {"allow_faults": True}


def decode_concurrently(running: Running, count: int, **options: object) -> list[tuple[int, str]]:
    """Return status and error code of `count` concurrent requests."""
    with ThreadPoolExecutor(count) as pool:
        responses = list(pool.map(lambda _: running.decode(**options), range(count)))
    return [(a.status_code, "" if a.status_code == 200 else a.json()["code"]) for a in responses]


def live(running: Running) -> tuple[int, dict]:
    response = running.client.get("/health/live")
    return response.status_code, response.json()


class TestFaultPoints:
    """Each fault hits a few concurrent requests; a later request is served."""

    def test_a_failed_step_fails_only_its_images(self, serve: Serve):
        with serve(simulated(max_batch=1), faults="fail-step=2@3", **LOCAL) as running:
            results = decode_concurrently(running, 4)
            assert sorted(results) == [(200, ""), (200, ""), (500, "decode-failed"), (500, "decode-failed")]
            assert live(running) == (200, {"state": "ready"})
            assert running.decode().status_code == 200

    def test_running_out_of_memory_fails_one_image(self, serve: Serve):
        with serve(simulated(max_batch=1), faults="out-of-memory", **LOCAL) as running:
            assert running.decode().json()["code"] == "out-of-device-memory"
            assert live(running) == (200, {"state": "ready"})
            assert running.decode().status_code == 200

    @pytest.mark.parametrize("image_format", ["png", "jpeg"])
    def test_an_encoder_error_fails_one_image(self, serve: Serve, image_format: str):
        with serve(simulated(), faults="die-in-encoder", **LOCAL) as running:
            results = decode_concurrently(running, 3, format=image_format)
            assert sorted(results) == [(200, ""), (200, ""), (500, "decode-failed")]
            assert live(running) == (200, {"state": "ready"})
            assert running.decode(format=image_format).status_code == 200

    def test_a_lost_device_fails_the_server(self, serve: Serve):
        with serve(simulated(max_batch=1), faults="poison-device", **LOCAL) as running:
            results = decode_concurrently(running, 4)
            assert set(results) <= {(503, "device-lost"), (503, "unavailable")}
            status, state = live(running)
            assert (status, state["state"]) == (503, "failed")
            assert "DeviceLostError" in state["reason"]
            assert running.client.get("/health/ready").status_code == 503
            assert running.decode().json()["code"] == "unavailable"

    def test_a_hanging_step_fails_the_server(self, serve: Serve):
        runtime = simulated(max_batch=1)
        with serve(runtime, faults="hang-step@2", watchdog_seconds=0.2, watchdog_factor=2, **LOCAL) as running:
            results = decode_concurrently(running, 4)
            assert set(results) <= {(503, "device-lost"), (503, "unavailable")}
            status, state = live(running)
            assert (status, state["state"]) == (503, "failed")
            assert "step running for" in state["reason"]

    @pytest.mark.parametrize(
        ("flags", "part"),
        [
            (["--faults", "hang-step"], "--allow-faults"),
            (["--faults", "hang-step", "--allow-faults", "--host", "0.0.0.0"], "0.0.0.0"),  # noqa: S104
            (["--faults", "hang-step", "--allow-faults", "--host", "pid.example"], "pid.example"),
            (["--faults", "explode", "--allow-faults"], "fail-step"),
            (["--faults", "hang-step=x", "--allow-faults"], "fail-step"),
        ],
    )
    def test_faults_are_rejected_without_allow_faults_or_off_loopback(self, flags: list[str], part: str):
        with pytest.raises(ConfigError, match=part):
            read_settings(["--bundle", ".", *flags])

    def test_faults_are_accepted_on_loopback_with_allow_faults(self):
        for host in ("127.0.0.1", "::1", "localhost"):
            flags = ["--bundle", ".", "--faults", "hang-step=2@1", "--allow-faults", "--host", host]
            assert read_settings(flags).faults == "hang-step=2@1"


class TestDevices:
    def test_a_batch_that_does_not_fit_is_split_and_the_cap_lowered(self, serve: Serve):
        class Small(SimulatedRuntime):
            sizes: list[int] = []  # noqa: RUF012
            warm = False

            def step(self, slots, indices):
                if self.warm:
                    self.sizes.append(len(slots))
                if self.warm and len(slots) > 1:
                    raise DeviceMemoryError("too large")
                super().step(slots, indices)

        runtime = Small({SIZE: SimulatedCost(step=0.01, batch_slope=0.1)}, max_batch=2, slots=3)
        with serve(runtime) as running:
            runtime.warm = True
            response = running.decode(make_latent(2, 16, 2, 2))
            assert response.content.count(b"Content-Type: image/png") == 2
            assert runtime.sizes.count(2) == 1
            assert runtime.sizes.count(1) == 8

    def test_two_devices_of_different_sizes_share_a_queue(self, serve: Serve):
        images = {size: np.full((*size, 3), value, np.uint8) for size, value in ((SIZE, 1), (LARGER, 2))}
        runtimes = {
            "small": SimulatedRuntime({SIZE: SimulatedCost()}, images),
            "large": SimulatedRuntime({SIZE: SimulatedCost(), LARGER: SimulatedCost()}, images),
        }
        with serve(runtimes) as running, ThreadPoolExecutor(4) as pool:
            shapes = [(16, 2, 2), (16, 2, 4)] * 6
            responses = list(pool.map(lambda shape: running.decode(make_latent(*shape)), shapes))
            pixels = [np.asarray(Image.open(io.BytesIO(response.content))) for response in responses]
            assert [image.shape[:2] for image in pixels] == [SIZE, LARGER] * 6
            (decoder,) = running.client.get("/info").json()["decoders"]
            assert [entry["output"] for entry in decoder["sizes"]] == [[*SIZE], [*LARGER]]

    def test_one_lost_device_of_two_fails_the_process(self, serve: Serve):
        good, bad = simulated(costs={SIZE: SimulatedCost()}), ControlledRuntime({LARGER: SimulatedCost()})
        with serve({"good": good, "bad": bad}) as running:
            bad.error = RuntimeError("not a PidError")
            assert running.decode(make_latent(16, 2, 4)).json()["code"] == "device-lost"
            assert live(running)[0] == 503
            assert running.decode().json()["code"] == "unavailable"


class TestWatchdog:
    @pytest.mark.parametrize(
        ("seconds", "predicted", "stuck"), [(9, 0.1, False), (11, 0.1, True), (11, 3, False), (31, 3, True)]
    )
    def test_a_step_is_stuck_beyond_the_minimum_and_a_multiple_of_the_prediction(self, seconds, predicted, stuck):
        assert is_stuck(seconds, predicted, factor=10, minimum=10) is stuck

    def test_an_idle_device_is_not_stuck(self, serve: Serve):
        with serve(simulated(), watchdog_seconds=0.05) as running:
            checks = 0
            progress = running.service.dispatcher.progress

            def counted():
                nonlocal checks
                checks += 1
                return progress()

            running.service.dispatcher.progress = counted
            until(lambda: checks > 10)
            assert live(running)[0] == 200

    def test_a_queued_image_expires_while_a_long_step_is_running(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()}, max_batch=1, slots=1)
        with serve(runtime, watchdog_seconds=60) as running, ThreadPoolExecutor(2) as pool:
            runtime.pause()
            first = pool.submit(running.decode)
            until(lambda: running.service.dispatcher.query(Scheduler.running) == 1)
            assert running.decode(deadline_ms=200).json()["code"] == "deadline-exceeded"
            runtime.resume()
            assert first.result().status_code == 200


class TestBoundedMemory:
    def test_undelivered_images_count_against_a_limit(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        image_bytes = 3 * SIZE[0] * SIZE[1]
        with serve(runtime, pending_bytes=2 * image_bytes) as running, ThreadPoolExecutor(8) as pool:
            runtime.pause()
            responses = [pool.submit(running.decode) for _ in range(8)]
            until(lambda: sum(response.done() for response in responses) == 6)
            runtime.resume()
            results = sorted(
                (response.result().status_code, response.result().headers.get("retry-after")) for response in responses
            )
            assert results == [(200, None)] * 2 + [(429, "1")] * 6
            until(lambda: running.service.undelivered.bytes == 0)
            assert running.decode().status_code == 200

    def test_a_single_image_may_exceed_the_limit(self, serve: Serve):
        with serve(simulated(), pending_bytes=1) as running:
            assert running.decode().status_code == 200

    def test_clients_of_one_key_that_read_nothing_do_not_lock_out_another(self, serve: Serve, tmp_path: Path):
        size = Size(2048, 2048)
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        runtime = SimulatedRuntime({size: SimulatedCost(), SIZE: SimulatedCost()}, {size: noise}, slots=1, max_batch=1)
        keys = tmp_path / "keys"
        keys.write_text("a:0123456789abcdef\nb:fedcba9876543210\n")
        # Two images have to fit even if one is encoded already: the PNG of noise is a little larger than its pixels.
        with serve(runtime, api_keys=keys, pending_bytes=int(4.2 * noise.size)) as running:
            latent = make_latent(16, 64, 64)
            readers = [reader(running, latent, "Authorization: Bearer 0123456789abcdef\r\n") for _ in range(8)]
            responses = [connection.recv(12) for connection in readers]
            assert sorted(responses) == [b"HTTP/1.1 200"] * 2 + [b"HTTP/1.1 429"] * 6
            running.client.headers["Authorization"] = "Bearer fedcba9876543210"
            assert running.decode(latent).status_code == 200
            for connection in readers:
                connection.close()

    def test_a_slow_reader_delays_no_other_request_and_is_disconnected(self, serve: Serve):
        size = Size(2048, 2048)
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        runtime = SimulatedRuntime({size: SimulatedCost(), SIZE: SimulatedCost()}, {size: noise}, slots=1, max_batch=1)
        with serve(runtime, response_timeout=1.0) as running:
            slow = reader(running, make_latent(16, 64, 64))
            assert slow.recv(12) == b"HTTP/1.1 200"
            assert running.service.undelivered.requests == 1
            assert [running.decode().status_code for _ in range(3)] == [200] * 3
            until(lambda: running.service.undelivered.requests == 0)
            received = 0
            with pytest.raises(ConnectionResetError):  # noqa: PT012
                while data := slow.recv(1 << 20):
                    received += len(data)
                raise ConnectionResetError
            assert received < noise.size
            slow.close()


def reader(running: Running, latent, headers: str = "") -> socket.socket:
    """Return a connection with a small receive window that has sent a request and reads nothing."""
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    body = save({"latent": latent})
    connection.sendall(
        b"POST /decode?compression=none HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-safetensors\r\n"
        b"%bContent-Length: %d\r\n\r\n" % (headers.encode(), len(body)) + body
    )
    return connection


class TestLimitsUnderConcurrency:
    def test_priority_classes_get_exactly_their_shares_in_any_order(self):
        settings = Settings(bundle=".", queue_images=50, standard_share=0.8, batch_share=0.3)
        service = DecodeService(settings, {"simulated": {"device": simulated()}})
        dispatcher = service.dispatcher
        dispatcher.accept(True)  # the workers are never started, so nothing leaves the queue
        start, rejected = threading.Barrier(12), Counter()

        def burst(priority: Priority) -> None:
            start.wait()
            for _ in range(20):
                try:
                    dispatcher.submit([Job(OUTPUT, (0,), priority, payload=None)])
                except QueueFullError:
                    rejected[priority] += 1

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(burst, [Priority.BATCH, Priority.STANDARD] * 6))
        waiting = Counter({priority: dispatcher.query(lambda s, p=priority: s.queued(p)) for priority in Priority})
        assert waiting.total() == 40
        assert waiting[Priority.BATCH] <= 15
        for _ in range(10):
            dispatcher.submit([Job(OUTPUT, (0,), Priority.INTERACTIVE, payload=None)])
        with pytest.raises(QueueFullError, match=r"The queue is full \(limit: 50 images\)"):
            dispatcher.submit([Job(OUTPUT, (0,), Priority.INTERACTIVE, payload=None)])

    def test_bursts_from_many_threads_never_exceed_the_queue(self):
        """Call the dispatcher directly, without an event loop that would serialise the threads."""
        service = DecodeService(
            Settings(bundle=".", queue_images=50, standard_share=1), {"simulated": {"device": simulated()}}
        )
        dispatcher = service.dispatcher
        dispatcher.accept(True)  # the workers are never started, so nothing leaves the queue
        start, counts = threading.Barrier(16), []

        def burst() -> None:
            start.wait()
            accepted = 0
            for size in (1, 2, 3) * 10:
                try:
                    dispatcher.submit([Job(OUTPUT, (0,), payload=None) for _ in range(size)])
                except QueueFullError:
                    assert dispatcher.query(Scheduler.queued) > 50 - 3
                else:
                    accepted += size
            counts.append(accepted)

        threads = [threading.Thread(target=burst) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(counts) == dispatcher.query(Scheduler.queued) == 50
