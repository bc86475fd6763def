"""A server on whose devices only some decoders have their weights at a time (`--resident`)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines.errors import DeviceMemoryError
from engines.runtime.protocol import Slot
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from server import dispatch
from server.scheduling import residency
from tests.server.conftest import SIZE, Running, Serve, make_latent
from tests.waiting import until

COST = SimulatedCost(condition=0.001, step=0.002, finish=0.001)


class Weights(SimulatedRuntime):
    """Counts the decoders of a device whose weights are there.

    Attributes:
        error: Raised by `restore`, if it is not None.
    """

    def __init__(self, device: Device) -> None:
        super().__init__({SIZE: COST}, max_batch=1, restore=0.001)
        self._device = device
        self.error: Exception | None = None

    def warm_up(self) -> None:
        self._device.add(self)
        super().warm_up()

    def offload(self) -> None:
        self._device.resident.remove(self)
        super().offload()

    def restore(self) -> None:
        if self.error is not None:
            raise self.error
        self._device.add(self)
        super().restore()


class Device:
    """A device with room for the weights of `limit` decoders."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.resident: list[Weights] = []

    def add(self, weights: Weights) -> None:
        self.resident.append(weights)
        assert len(self.resident) <= self.limit


def decoders(*devices: Device, names: str = "abc") -> dict[str, dict[str, Weights]]:
    return {name: {str(i): Weights(device) for i, device in enumerate(devices)} for name in names}


def restores(running: Running, name: str) -> float:
    return running.service.metrics.registry.get_sample_value("pid_weight_restores_total", {"decoder": name}) or 0.0


def test_three_decoders_decode_with_the_weights_of_two_on_the_device(serve: Serve):
    device = Device(2)
    with serve(decoders=decoders(device), resident=2) as running, ThreadPoolExecutor(6) as pool:
        assert device.resident == []
        responses = list(pool.map(lambda name: running.decode(decoder=name), "abcacb" * 5))
        assert [response.status_code for response in responses] == [200] * 30
        assert all(restores(running, name) >= 1 for name in "abc")


def test_each_device_has_its_own_weights(serve: Serve):
    devices = Device(1), Device(1)
    with serve(decoders=decoders(*devices, names="ab"), resident=1) as running, ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda name: running.decode(decoder=name), "ab" * 20))
        assert {response.status_code for response in responses} == {200}
        assert all(len(device.resident) == 1 for device in devices)


@pytest.mark.parametrize("resident", [None, 2, 3])
def test_weights_stay_where_they_are_if_there_is_room_for_all(serve: Serve, resident: int | None):
    device = Device(2)
    with serve(decoders=decoders(device, names="ab"), resident=resident) as running:
        assert len(device.resident) == 2
        assert [running.decode(decoder=name).status_code for name in "ab"] == [200, 200]
        assert restores(running, "a") == restores(running, "b") == 0
        assert "restore" not in {cost["stage"] for cost in running.client.get("/info").json()["costs"]}


def test_info_and_metrics_have_the_measured_time(serve: Serve):
    with serve(decoders=decoders(Device(1), names="ab"), resident=1) as running:
        costs = [cost for cost in running.client.get("/info").json()["costs"] if cost["stage"] == "restore"]
        assert [cost["decoder"] for cost in costs] == ["a", "b"]
        assert all(cost["size"] is cost["tile"] is None for cost in costs)
        assert all(cost["seconds"] >= 0.001 for cost in costs)
        labels = {"stage": "restore", "decoder": "a", "size": "", "tile": "", "batch": "1", "encoding": ""}
        assert running.service.metrics.registry.get_sample_value("pid_cost_seconds", labels) >= 0.001


def test_weights_that_do_not_fit_fail_the_images_that_need_them_and_no_others(serve: Serve):
    device = Device(1)
    runtimes = decoders(device, names="ab")
    with serve(decoders=runtimes, resident=1) as running:
        assert running.decode(decoder="b").status_code == 200
        runtimes["a"]["0"].error = DeviceMemoryError("no room")
        failed = running.decode(make_latent(2, 16, 2, 2), decoder="a")
        assert failed.content.count(b"X-Status: 503") == 2
        assert running.decode(decoder="b").status_code == 200
        runtimes["a"]["0"].error = None
        assert running.decode(decoder="a").status_code == 200


class Waiting(Weights):
    """Steps wait while `resumed` is not set."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.begun, self.resumed = threading.Event(), threading.Event()
        self.resumed.set()

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        self.begun.set()
        assert self.resumed.wait(60)
        super().step(slots, indices)


def test_an_image_continues_after_its_weights_were_moved(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(residency, "KEEP_FACTOR", 0.0)  # otherwise the first image would be finished first
    device = Device(1)
    slow = Waiting(device)
    with (
        serve(decoders={"a": {"0": slow}, "b": {"0": Weights(device)}}, resident=1) as running,
        ThreadPoolExecutor(2) as pool,
    ):
        slow.begun.clear()
        slow.resumed.clear()
        first = pool.submit(running.decode, decoder="a", priority="batch")
        assert slow.begun.wait(60)
        second = pool.submit(running.decode, decoder="b", priority="interactive")
        until(lambda: running.service.dispatcher.query(lambda scheduler: scheduler.queued(decoder="b")) == 1)
        slow.resumed.set()
        assert [image.result().status_code for image in (first, second)] == [200, 200]
        assert (restores(running, "a"), restores(running, "b")) == (2, 1)


def test_a_device_takes_what_it_left_to_another_that_became_busy(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    """Otherwise, it would notice only when it checks for expired images."""
    monkeypatch.setattr(dispatch, "_MAX_WAIT", 1000.0)
    runtimes = {"a": {name: Waiting(Device(1)) for name in "01"}, "b": {name: Weights(Device(1)) for name in "01"}}
    with serve(decoders=runtimes, resident=1) as running, ThreadPoolExecutor(1) as pool:
        assert [running.decode(decoder=name).status_code for name in "ab"] == [200, 200]  # on different devices
        waiting = runtimes["a"].values()
        for runtime in waiting:
            runtime.begun.clear()
            runtime.resumed.clear()
        images = pool.submit(running.decode, make_latent(2, 16, 2, 2), decoder="a", deadline_ms=600_000)
        try:
            assert all(runtime.begun.wait(20) for runtime in waiting)
        finally:
            for runtime in waiting:
                runtime.resumed.set()
        assert images.result().content.count(b"X-Status: 503") == 0
        assert images.result().status_code == 200
