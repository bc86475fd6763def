"""The state machine behind /health, and the requests that the service accepts in each state."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest
import torch

from engines.runtime.protocol import Rows
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server.errors import UnavailableError
from server.images.encoder import Encoder
from server.images.encoding import Encoding
from server.lifecycle import Lifecycle, State
from server.request import DecodeOptions, DecodeRequest
from server.scheduling.costs import Output
from server.scheduling.jobs import Job
from server.service import DecodeService
from server.settings import Settings
from server.stream import ImageStream
from server.watchdog import Watchdog
from tests.server.conftest import LARGER, OUTPUT, SIZE, Serve, make_latent, simulated
from tests.server.runtimes import ControlledRuntime
from tests.waiting import until


def test_the_server_is_ready_once_every_device_is():
    calls: list[int] = []
    lifecycle = Lifecycle(devices=2, on_ready=lambda: calls.append(1))
    lifecycle.device_ready()
    assert (lifecycle.state, calls) == (State.STARTING, [])
    lifecycle.device_ready()
    assert (lifecycle.state, calls) == (State.READY, [1])


def test_requests_are_accepted_before_the_state_is_ready():
    states: list[State] = []
    lifecycle = Lifecycle(devices=1, on_ready=lambda: states.append(lifecycle.state))
    lifecycle.device_ready()
    assert states == [State.STARTING]


@pytest.mark.parametrize("change", ["drain", "fail"])
def test_a_drain_or_failure_waits_until_requests_are_accepted(change: str):
    """Otherwise the server could accept requests after it has stopped accepting them."""
    changed = threading.Event()

    def drain_or_fail() -> None:
        lifecycle.drain() if change == "drain" else lifecycle.fail("for the test")
        changed.set()

    def on_ready() -> None:
        thread.start()
        assert not changed.wait(0.1)

    lifecycle = Lifecycle(devices=1, on_ready=on_ready)
    thread = threading.Thread(target=drain_or_fail)
    lifecycle.device_ready()
    thread.join()
    assert lifecycle.state is (State.DRAINING if change == "drain" else State.FAILED)


def test_a_device_that_is_ready_after_the_drain_began_changes_nothing():
    calls: list[int] = []
    lifecycle = Lifecycle(devices=1, on_ready=lambda: calls.append(1))
    assert lifecycle.drain()
    lifecycle.device_ready()
    assert (lifecycle.state, calls) == (State.DRAINING, [])


def test_a_failure_is_final_and_reported_once():
    failures = []
    lifecycle = Lifecycle(devices=1, on_failure=lambda: failures.append(1))
    lifecycle.fail("first")
    lifecycle.fail("second")
    assert (lifecycle.state, lifecycle.reason, failures) == (State.FAILED, "first", [1])
    assert not lifecycle.drain()
    lifecycle.device_ready()
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


def test_after_a_device_is_lost_liveness_is_off_before_requests_are_rejected(serve: Serve):
    """Otherwise a client could get 503 from a server that /health/live still reports as live."""
    runtime, states = ControlledRuntime({SIZE: SimulatedCost()}), []
    with serve(runtime) as running:
        accept = running.service.dispatcher.accept

        def recorded(accepting: bool) -> None:
            states.append(running.service.lifecycle.state)
            accept(accepting)

        running.service.dispatcher.accept = recorded  # type: ignore[method-assign]
        runtime.error = RuntimeError("not a PidError")
        assert running.decode().json()["code"] == "device-lost"
        assert states == [State.FAILED]


def test_requests_during_the_warm_up_are_rejected_while_costs_are_measured():
    """The default deadline reads the cost table, which other threads change during the warm-up."""
    service = DecodeService(Settings(bundle="."), {"simulated": {"device": simulated()}})
    for width in range(1, 3000):
        service.dispatcher.measure("step", Output("simulated", Size(1, width)), 1.0)
    stop = threading.Event()

    def warm_up() -> None:
        width = 3000
        while not stop.is_set():
            service.dispatcher.measure("step", Output("simulated", Size(1, width)), 1.0)
            width += 1

    async def submit() -> None:
        request = DecodeRequest(make_latent(1, 16, 2, 2), None, DecodeOptions(), "simulated")
        for _ in range(50):
            with pytest.raises(UnavailableError):
                service.submit(request, "png")

    interval, thread = sys.getswitchinterval(), threading.Thread(target=warm_up)
    thread.start()
    try:
        sys.setswitchinterval(1e-5)
        asyncio.run(submit())
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


def test_nothing_is_admitted_after_the_service_has_stopped():
    """The last device may become ready during the stop; no thread would decode what is admitted then."""
    service = DecodeService(Settings(bundle="."), {"simulated": {"device": simulated()}})
    service.start()
    until(lambda: service.lifecycle.state is State.READY)
    service.stop()
    service.dispatcher.accept(True)
    with pytest.raises(UnavailableError):
        service.dispatcher.submit([Job(OUTPUT, (0,), payload=None)])


def test_a_service_stops_although_the_rows_of_an_image_never_arrive(monkeypatch: pytest.MonkeyPatch):
    """A hanging device can leave an encoder thread waiting forever; the process has to exit nevertheless."""
    monkeypatch.setattr("server.service.STOP_SECONDS", 0.1)
    arrived, encoders = threading.Event(), []

    class Recorded(Encoder):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            encoders.append(self)

    class Missing(Rows):
        pixels = torch.zeros(*SIZE, 3, dtype=torch.uint8).numpy()

        def wait(self, stop: int) -> None:
            assert arrived.wait(60)

        def close(self) -> None:
            pass

    async def encode() -> None:
        encoders[0].encode(Missing(), ImageStream(0, "image/png"), Encoding())

    service = DecodeService(Settings(bundle="."), {"simulated": {"device": simulated()}}, encoder_factory=Recorded)
    asyncio.run(encode())
    service.start()
    until(lambda: service.lifecycle.state is State.READY)
    stopping = threading.Thread(target=service.stop, daemon=True)
    stopping.start()
    stopping.join(30)
    stopped = not stopping.is_alive()
    arrived.set()
    assert stopped


def test_a_failed_check_does_not_end_the_watchdog(caplog: pytest.LogCaptureFixture):
    calls, repeated = [], threading.Event()

    def check() -> bool:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("for the test")
        repeated.set()
        return False

    Watchdog(check, interval=0.01).start()
    assert repeated.wait(10)
    assert "check" in caplog.text
