"""The state machine behind /health."""

import threading

from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from server.lifecycle import Lifecycle, State
from tests.server.conftest import LARGER, SIZE, Serve, until


def test_the_server_is_ready_once_every_device_is():
    lifecycle = Lifecycle(devices=2)
    assert not lifecycle.device_ready()
    assert lifecycle.state is State.STARTING
    assert lifecycle.device_ready()
    assert lifecycle.state is State.READY


def test_a_device_that_is_ready_after_the_drain_began_changes_nothing():
    lifecycle = Lifecycle(devices=1)
    assert lifecycle.drain()
    assert not lifecycle.device_ready()
    assert lifecycle.state is State.DRAINING


def test_a_failure_is_final_and_reported_once():
    failures = []
    lifecycle = Lifecycle(devices=1, on_failure=lambda: failures.append(1))
    lifecycle.fail("first")
    lifecycle.fail("second")
    assert (lifecycle.state, lifecycle.reason, failures) == (State.FAILED, "first", [1])
    assert not lifecycle.drain()
    assert not lifecycle.device_ready()
    assert lifecycle.state is State.FAILED


def test_a_device_lost_during_the_warm_up_leaves_the_server_rejecting_requests(serve: Serve):
    warm = threading.Event()

    class Slow(SimulatedRuntime):
        def warm_up(self) -> None:
            assert warm.wait(60)

    class Broken(SimulatedRuntime):
        def warm_up(self) -> None:
            raise RuntimeError("no such device")

    runtimes = {"slow": Slow({SIZE: SimulatedCost()}), "broken": Broken({LARGER: SimulatedCost()})}
    with serve(runtimes, wait=False) as running:
        until(lambda: running.service.lifecycle.state is State.FAILED)
        warm.set()
        assert running.decode().json()["code"] == "unavailable"
        assert running.client.get("/health/live").status_code == 503
