"""Stalled devices and pauses of the process: which of them stop the server from accepting requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest

from engines.runtime.simulated import SimulatedCost
from server.lifecycle import Lifecycle, State
from server.scheduling.jobs import Job
from server.service import CHECK_SECONDS, DecodeService
from server.settings import Settings
from tests.server.conftest import LARGER, OUTPUT, SIZE, Running, Serve, make_latent, simulated
from tests.server.runtimes import ControlledRuntime
from tests.waiting import until


def ready(running: Running) -> tuple[int, str]:
    response = running.client.get("/health/ready")
    return response.status_code, response.json()["state"]


class TestStalledDevice:
    def test_it_stops_new_requests_until_the_step_ends(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with serve(runtime, stall_seconds=0.2) as running, ThreadPoolExecutor(1) as pool:
            runtime.pause()
            first = pool.submit(running.decode)
            until(lambda: ready(running) == (503, "stalled"))
            assert "Device device" in running.client.get("/health/ready").json()["reason"]
            assert running.client.get("/health/live").json() == {"state": "stalled"}
            rejected = running.decode()
            assert (rejected.status_code, rejected.json()["code"]) == (503, "unavailable")
            assert int(rejected.headers["retry-after"]) >= 1
            assert not first.done()
            runtime.resume()
            assert first.result().status_code == 200
            until(lambda: ready(running) == (200, "ready"))
            assert running.decode().status_code == 200

    def test_one_of_two_makes_the_server_not_ready(self, serve: Serve):
        """The watchdog ends the whole process, so no device should get more work."""
        stalled = ControlledRuntime({LARGER: SimulatedCost()})
        good = simulated(costs={SIZE: SimulatedCost()})
        with serve({"good": good, "bad": stalled}, stall_seconds=0.2) as running, ThreadPoolExecutor(1) as pool:
            stalled.pause()
            first = pool.submit(running.decode, make_latent(16, 2, 4))
            until(lambda: ready(running) == (503, "stalled"))
            assert running.decode().json()["code"] == "unavailable"
            stalled.resume()
            assert first.result().status_code == 200

    def test_it_ends_in_failure_if_the_step_never_ends(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with serve(runtime, stall_seconds=0.2, watchdog_seconds=2) as running, ThreadPoolExecutor(1) as pool:
            runtime.pause()
            first = pool.submit(running.decode)
            until(lambda: ready(running)[1] == "stalled")
            until(lambda: ready(running)[1] == "failed")
            assert first.result().json()["code"] == "device-lost"
            runtime.resume()

    def test_a_step_that_is_predicted_to_be_slow_is_not_stalled(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with serve(runtime, stall_seconds=0.05) as running, ThreadPoolExecutor(1) as pool:
            running.service.dispatcher.query(lambda s: [s.costs.set(key, 60.0) for key in s.costs.table()])
            progress, checks = running.service.dispatcher.progress, 0

            def counted():
                nonlocal checks
                checks += 1
                return progress()

            runtime.pause()
            first = pool.submit(running.decode)
            until(lambda: any(x.elapsed > 0.1 for x in progress().values()))
            running.service.dispatcher.progress = counted
            until(lambda: checks > 1)
            assert ready(running) == (200, "ready")
            runtime.resume()
            assert first.result().status_code == 200

    def test_a_stall_is_visible_only_while_the_server_would_be_ready(self):
        lifecycle = Lifecycle(devices=1)
        lifecycle.stall("slow")
        assert lifecycle.state is State.STARTING
        lifecycle.device_ready()
        assert (lifecycle.state, lifecycle.reason) == (State.STALLED, "slow")
        lifecycle.stall(None)
        assert (lifecycle.state, lifecycle.reason) == (State.READY, None)
        lifecycle.stall("slow")
        assert lifecycle.drain()
        assert lifecycle.state is State.DRAINING
        assert lifecycle.stalled
        lifecycle.fail("lost")
        assert (lifecycle.state, lifecycle.reason) == (State.FAILED, "lost")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def idle_service() -> tuple[DecodeService, Clock]:
    """Return a service that accepts jobs and measures steps of 1 s, without threads, and its clock."""
    clock = Clock()
    service = DecodeService(Settings(bundle="."), {"simulated": {"device": simulated()}}, clock=clock)
    service.dispatcher.measure("step", OUTPUT, 1.0)
    service.dispatcher.accept(True)
    return service, clock


def run_for(service: DecodeService, clock: Clock, seconds: float) -> None:
    """Let time pass while the watchdog runs."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now += CHECK_SECONDS
        service.dispatcher.wake()


class TestPause:
    def test_it_does_not_count_as_time_of_a_step(self):
        service, clock = idle_service()
        service.dispatcher.wake()
        service.dispatcher.submit([Job(OUTPUT, (0,), payload=Mock())])
        service.dispatcher.next_plan("device")
        run_for(service, clock, 0.5)
        clock.now += 3600
        paused = service.dispatcher.progress()["device"]  # before the watchdog runs again
        assert paused.elapsed < 1
        run_for(service, clock, 0.5)
        assert service.dispatcher.progress()["device"].elapsed == pytest.approx(1.0, abs=2 * CHECK_SECONDS)

    def test_a_step_that_hangs_after_it_is_still_found(self):
        service, clock = idle_service()
        service.dispatcher.wake()
        service.dispatcher.submit([Job(OUTPUT, (0,), payload=Mock())])
        service.dispatcher.next_plan("device")
        clock.now += 3600
        run_for(service, clock, 60)
        assert service.dispatcher.progress()["device"].elapsed > 59

    def test_a_cost_that_includes_it_is_not_observed(self):
        service, clock = idle_service()
        service.dispatcher.wake()
        clock.now += 20
        service.dispatcher.observe("step", OUTPUT, 20.0)  # before the watchdog runs again
        service.dispatcher.wake()
        service.dispatcher.observe("step", OUTPUT, 20.0)
        assert service.costs.step(OUTPUT) == 1.0
        run_for(service, clock, 20)
        service.dispatcher.observe("step", OUTPUT, 20.0)
        assert service.costs.step(OUTPUT) > 1.0
