"""Replacement of decoders while the server runs: no request fails, and one that cannot be used changes nothing."""

from __future__ import annotations

import io
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import pytest
from PIL import Image

from engines.errors import BundleError, DeviceLostError, DeviceMemoryError
from engines.runtime.memory_plan import MemoryItem, MemoryPlan
from engines.runtime.protocol import Runtime, Sample, Slot
from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from server import swaps
from server.errors import InvalidLatentError
from server.lifecycle import State
from server.request import DecodeOptions, DecodeRequest
from tests.server.conftest import SIZE, Running, Serve, make_latent
from tests.server.runtimes import ControlledRuntime
from tests.server.test_metrics import by_decoder
from tests.waiting import until

COST = SimulatedCost(condition=0.001, step=0.002, finish=0.001)
NO_MEMORY = DeviceMemoryError("The device ran out of memory.")


def image(value: int) -> np.ndarray:
    return np.full((*SIZE, 3), value, np.uint8)


class Closing(ControlledRuntime):
    """Decodes images of one colour, which is its version."""

    def __init__(self, version: int, costs: Mapping[Size, SimulatedCost] | None = None, **options: object) -> None:
        super().__init__(costs or {SIZE: COST}, images={SIZE: image(version)}, **options)
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Failing(Closing):
    """Cannot be warmed up."""

    def __init__(self, version: int, failure: Exception) -> None:
        super().__init__(version)
        self._failure = failure

    def warm_up(self) -> None:
        raise self._failure


class Version:
    """A candidate whose runtime `make` creates.

    Attributes:
        shares: Whether its runtimes share memory with others.
        lacking: What `lack` returns for these freed bytes.
    """

    def __init__(
        self,
        make: Callable[[bool], Runtime],
        identity: str,
        shares: bool,
        lacking: Callable[[Mapping[str, int]], str | None] = lambda freed: None,
    ) -> None:
        self.make, self.identity, self.shares, self.lacking = make, identity, shares, lacking

    def __str__(self) -> str:
        return f"version {self.identity}"

    def memory(self) -> Mapping[str, MemoryPlan]:
        item = MemoryItem("slots", None if self.shares else "simulated", 7)
        return {"device": MemoryPlan((MemoryItem("weights", "simulated", int(self.identity)), item))}

    def lack(self, freed: Mapping[str, int]) -> str | None:
        return self.lacking(freed)

    def alone(self) -> Version:
        return Version(self.make, self.identity, shares=False, lacking=self.lacking)

    def open(self) -> Mapping[str, Runtime]:
        return {"device": self.make(self.shares)}


class Source:
    """A source of one decoder, "simulated", whose versions are numbered.

    Attributes:
        number: Number of the version to use.
        make: Creates the runtime of a version.
        error: Raised by `find`, if it is not None.
        runtimes: Those that were created, by version.
        opened: The versions that were opened, and whether they share memory with other runtimes.
    """

    def __init__(self, make: Callable[[int], Runtime] = Closing) -> None:
        self.number, self.make, self.error = 0, make, None
        self.moved = False
        self.runtimes: dict[int, Runtime] = {}
        self.opened: list[tuple[int, bool]] = []

    def find_all(self) -> Mapping[str, Version]:
        first = self.find("simulated")
        return {"simulated": Version(first.make, first.identity, shares=True)}

    def find(self, name: str) -> Version:
        self.moved = False
        if self.error is not None:
            raise self.error
        number = self.number
        return Version(lambda shares: self._create(number, shares), str(number), shares=False)

    def is_moved(self, name: str) -> bool:
        return self.moved

    def _create(self, number: int, shares: bool) -> Runtime:
        self.opened.append((number, shares))
        self.runtimes[number] = runtime = self.make(number)
        return runtime


def counted(running: Running, result: str) -> float:
    series = f'pid_bundle_swaps_total{{decoder="simulated",result="{result}"}} '
    (line,) = [line for line in running.client.get("/metrics").text.splitlines() if line.startswith(series)]
    return float(line.removeprefix(series))


def swap(running: Running, source: Source, result: str = "done") -> None:
    """Increase the version, request the swap, and wait for its result."""
    before = counted(running, result)
    source.number += 1
    running.swaps.request()
    until(lambda: counted(running, result) == before + 1)


def colour(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return int(np.asarray(Image.open(io.BytesIO(response.content)))[0, 0, 0])


def test_requests_are_decoded_by_the_new_version_and_the_old_one_is_closed(serve: Serve):
    source = Source()
    with serve(source=source) as running:
        assert colour(running.decode()) == 0
        swap(running, source)
        assert colour(running.decode()) == 1
        assert source.runtimes[0].closed.wait(60)
        assert not source.runtimes[1].closed.is_set()


def test_the_planned_memory_is_that_of_the_decoders_in_use(serve: Serve):
    source = Source()
    with serve(source=source) as running:

        def memory() -> list[tuple[str, str, str | None, int]]:
            parts = running.client.get("/info").json()["memory"]
            return [(part["device"], part["part"], part["decoder"], part["bytes"]) for part in parts]

        assert memory() == [("device", "weights", "simulated", 0), ("device", "slots", None, 7)]
        swap(running, source)
        until(lambda: memory() == [("device", "weights", "simulated", 1), ("device", "slots", "simulated", 7)])


def begin(running: Running, source: Source, pool: ThreadPoolExecutor) -> tuple[Closing, Future[httpx.Response]]:
    """Send a decode and stop it in its first step; return the runtime, which can resume it, and the response."""
    first = source.runtimes[0]
    first.pause()
    response = pool.submit(running.decode)
    assert first.entered.wait(60)
    return first, response


def test_nothing_keeps_an_old_version_in_memory(serve: Serve):
    source = Source()
    with serve(source=source) as running:
        old = weakref.ref(source.runtimes.pop(0))
        swap(running, source)
        until(lambda: old() is None)


def test_images_in_progress_are_finished_by_the_version_that_began_them(serve: Serve):
    source = Source()
    with serve(source=source) as running, ThreadPoolExecutor(1) as pool:
        first, response = begin(running, source, pool)
        swap(running, source)
        assert not first.closed.is_set()
        later = pool.submit(running.decode)
        first.resume()
        assert (colour(response.result()), colour(later.result())) == (0, 1)
        assert first.closed.wait(60)


def test_twenty_swaps_under_load_fail_no_request(serve: Serve):
    source, stop = Source(), threading.Event()
    with serve(source=source, queue_images=64, standard_share=1) as running, ThreadPoolExecutor(4) as pool:

        def send() -> list[httpx.Response]:
            responses = []
            while not stop.is_set():
                responses.append(running.decode())
            return responses

        clients = [pool.submit(send) for _ in range(4)]
        for _ in range(20):
            swap(running, source)
        stop.set()
        responses = [response for client in clients for response in client.result()]
        colours = {colour(response) for response in responses}
    assert len(colours) > 5, "the load did not overlap with the swaps"


def test_an_unchanged_bundle_is_not_loaded_again(serve: Serve, caplog: pytest.LogCaptureFixture):
    source = Source()
    with caplog.at_level("INFO"), serve(source=source) as running:
        running.swaps.request()
        until(lambda: "has not changed" in caplog.text)
        assert list(source.runtimes) == [0]
        assert (counted(running, "done"), counted(running, "failed")) == (0, 0)


def test_a_moved_source_is_noticed_without_a_request(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(swaps, "POLL_SECONDS", 0.05)
    source = Source()
    with serve(source=source) as running:
        source.number, source.moved = 1, True
        until(lambda: colour(running.decode()) == 1)


class Hanging(Source):
    """A source of two decoders. While `responds` is not set, `method` does not return for "simulated"."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self._method, self.hangs, self.responds = method, threading.Event(), threading.Event()
        self.responds.set()

    def find_all(self) -> Mapping[str, Version]:
        return {name: self.find(name) for name in ("simulated", "other")}

    def find(self, name: str) -> Version:
        version = super().find(name)
        self._enter("find", name)
        return Version(lambda shares: self._open(name, int(version.identity), shares), version.identity, version.shares)

    def is_moved(self, name: str) -> bool:
        self._enter("is_moved", name)
        return super().is_moved(name)

    def _open(self, name: str, number: int, shares: bool) -> Runtime:
        self._enter("open", name)
        return self._create(number, shares)

    def _enter(self, method: str, name: str) -> None:
        if (method, name) == (self._method, "simulated") and not self.responds.is_set():
            self.hangs.set()
            assert self.responds.wait(60)


@pytest.mark.parametrize("method", ["is_moved", "find", "open"])
def test_a_hanging_replacement_is_reported_and_requests_continue(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, method: str
):
    monkeypatch.setattr(swaps, "POLL_SECONDS", 0.05)
    source = Hanging(method)
    with serve(source=source) as running:
        assert by_decoder(running, "pid_bundle_swap_seconds").keys() == {"simulated", "other"}
        source.responds.clear()
        source.number, source.moved = 1, True
        try:
            assert source.hangs.wait(60)
            first, second = (by_decoder(running, "pid_bundle_swap_seconds") for _ in range(2))
            assert 0 < first["simulated"] < second["simulated"]
            assert first["other"] == second["other"] == 0
            assert [colour(running.decode(decoder=name)) for name in ("simulated", "other")] == [0, 0]
        finally:
            source.responds.set()
        until(lambda: set(by_decoder(running, "pid_bundle_swap_seconds").values()) == {0})
        until(lambda: colour(running.decode(decoder="simulated")) == 1)


class TestFailure:
    def check(self, running: Running, source: Source, caplog: pytest.LogCaptureFixture, message: str) -> None:
        """Check that the swap was counted and logged and that the old version serves, also for another swap."""
        assert counted(running, "done") == 0
        assert message in caplog.text
        assert running.service.lifecycle.state is State.READY
        assert colour(running.decode()) == 0
        source.error, source.make = None, Closing
        swap(running, source)
        assert colour(running.decode()) == source.number

    def test_of_the_check_changes_nothing(self, serve: Serve, caplog: pytest.LogCaptureFixture):
        source = Source()
        with serve(source=source) as running:
            source.error = BundleError("The bundle is damaged.")
            swap(running, source, "failed")
            self.check(running, source, caplog, "The bundle is damaged.")

    def test_of_the_warm_up_changes_nothing(self, serve: Serve, caplog: pytest.LogCaptureFixture):
        source = Source()
        with serve(source=source) as running:
            source.make = lambda number: Failing(number, BundleError("The engine cannot be deserialised."))
            swap(running, source, "failed")
            costs = running.client.get("/info").json()["costs"]
            self.check(running, source, caplog, "cannot be deserialised")
            assert len(running.client.get("/info").json()["costs"]) == len(costs)

    def test_with_a_bug_changes_nothing(self, serve: Serve, caplog: pytest.LogCaptureFixture):
        class Broken(Closing):
            def start(self, sample: Sample) -> Slot:
                raise ValueError("a bug")

        source = Source()
        with serve(source=source) as running:
            source.make = Broken
            swap(running, source, "failed")
            self.check(running, source, caplog, "a bug")

    def test_of_the_device_fails_the_server(self, serve: Serve):
        source = Source()
        with serve(source=source) as running:
            source.make, source.number = lambda number: Failing(number, DeviceLostError("The device is lost.")), 1
            running.swaps.request()
            until(lambda: running.client.get("/health/live").status_code == 503)


class Hungry(Closing):
    """Fits into memory only once `others` are closed."""

    def __init__(self, version: int, others: list[Closing]) -> None:
        super().__init__(version)
        self._others = others

    def warm_up(self) -> None:
        if not all(other.closed.is_set() for other in self._others):
            raise NO_MEMORY
        super().warm_up()


class Lacking(Source):
    """Version `number` cannot be loaded alone; writes the bytes that would be freed for it to `freed`."""

    def __init__(self, number: int, freed: list[Mapping[str, int]]) -> None:
        super().__init__()
        self._lacking, self._freed = number, freed

    def find_all(self) -> Mapping[str, Version]:
        (version,) = super().find_all().values()
        return {"simulated": self._limited(version)}

    def find(self, name: str) -> Version:
        return self._limited(super().find(name))

    def _limited(self, version: Version) -> Version:
        def lack(freed: Mapping[str, int]) -> str | None:
            self._freed.append(freed)
            return "too little memory, even then" if int(version.identity) == self._lacking else None

        version.lacking = lack
        return version


class TestWithoutMemoryForBoth:
    def test_the_old_version_is_unloaded_first(self, serve: Serve):
        source = Source()
        with serve(source=source) as running, ThreadPoolExecutor(1) as pool:
            first, response = begin(running, source, pool)
            source.make, source.number = lambda number: Hungry(number, [first]), 1
            running.swaps.request()
            until(lambda: running.service.lifecycle.state is State.LOADING)
            ready = running.client.get("/health/ready")
            assert (ready.status_code, ready.json()["state"]) == (503, "loading")
            assert "simulated is being replaced" in ready.json()["reason"]
            assert running.client.get("/health/live").status_code == 200
            (decoder,) = running.client.get("/info").json()["decoders"]
            assert (decoder["name"], decoder["kernels"]) == ("simulated", [])
            assert running.client.get("/metrics").status_code == 200
            assert running.client.get("/v2/models/simulated/ready").status_code == 503
            rejected = running.decode()
            assert (rejected.status_code, rejected.json()["code"]) == (503, "unavailable")
            assert int(rejected.headers["retry-after"]) > 0
            first.resume()
            assert colour(response.result()) == 0
            until(lambda: running.client.get("/health/ready").status_code == 200)
            assert colour(running.decode()) == 1
            assert counted(running, "done") == 1

    def test_if_the_new_version_fails_the_old_one_is_loaded_again(self, serve: Serve):
        source = Source()
        with serve(source=source) as running:
            source.make = lambda number: Failing(number, NO_MEMORY) if number else Closing(number)
            swap(running, source, "failed")
            assert running.service.lifecycle.state is State.READY
            assert colour(running.decode()) == 0
        assert source.opened == [(0, True), (1, False), (1, False), (0, False)]

    @pytest.mark.parametrize("lacking", [0, 3])
    def test_nothing_is_unloaded_if_either_version_would_lack_memory_even_then(
        self, serve: Serve, caplog: pytest.LogCaptureFixture, lacking: int
    ):
        freed: list[Mapping[str, int]] = []
        source = Lacking(lacking, freed)
        with serve(source=source) as running:
            source.make = lambda number: Failing(number, NO_MEMORY)
            source.number = 2  # the swap increases it
            swap(running, source, "failed")
            assert running.service.lifecycle.state is State.READY
            assert colour(running.decode()) == 0
        assert source.opened == [(0, True), (3, False)]
        assert "even then" in caplog.text
        assert freed[-1] == {"device": 7}

    def test_if_neither_can_be_loaded_the_server_fails(self, serve: Serve):
        source = Source()
        with serve(source=source) as running:
            source.make, source.number = lambda number: Failing(number, NO_MEMORY), 1
            running.swaps.request()
            until(lambda: running.client.get("/health/live").status_code == 503)


def test_the_next_swap_waits_until_the_memory_of_the_last_one_is_free(serve: Serve):
    source = Source()
    with serve(source=source) as running, ThreadPoolExecutor(1) as pool:
        first, response = begin(running, source, pool)
        swap(running, source)
        source.make = lambda number: Hungry(number, [first])
        source.number += 1
        running.swaps.request()
        time.sleep(0.3)
        assert (running.service.lifecycle.state, list(source.runtimes)) == (State.READY, [0, 1])
        first.resume()
        assert colour(response.result()) == 0
        until(lambda: counted(running, "done") == 2)
        assert counted(running, "failed") == 0


def test_a_slower_version_soon_has_its_own_costs(serve: Serve):
    source = Source()
    with serve(source=source) as running:
        slow = {SIZE: SimulatedCost(condition=0.001, step=0.05, finish=0.001)}
        source.make = lambda number: Closing(number, slow)
        swap(running, source)
        for _ in range(4):
            assert running.decode().status_code == 200
        costs = running.client.get("/info").json()["costs"]
        step = next(cost["seconds"] for cost in costs if (cost["stage"], cost["batch"]) == ("step", 1))
        assert step > 0.02


def test_another_model_does_not_inherit_costs(serve: Serve):
    def make(number: int) -> Runtime:
        step = 0.05 if number else 0.001
        runtime = Closing(number, {SIZE: SimulatedCost(condition=0.001, step=step, finish=0.001)})
        runtime.info = replace(runtime.info, decoder=f"model-{number}")
        return runtime

    source = Source(make)
    with serve(source=source) as running:
        swap(running, source)
        costs = running.client.get("/info").json()["costs"]
        assert all(cost["seconds"] >= 0.05 for cost in costs if cost["stage"] == "step")


def test_a_latent_of_the_old_version_is_rejected_even_if_it_was_parsed_before_the_switch(serve: Serve):
    other = {Size(128, 128): COST}
    source = Source(lambda number: Closing(number, other if number else None))
    with serve(source=source) as running:
        parsed = DecodeRequest(make_latent(1, 16, 2, 2), None, DecodeOptions(), "simulated")
        swap(running, source)
        with pytest.raises(InvalidLatentError, match="was replaced while the request arrived"):
            running.service.submit(parsed, "png")
        response = running.decode()
        assert (response.status_code, response.json()["code"]) == (422, "invalid-latent")
        assert running.decode(make_latent(16, 4, 4)).status_code == 200
        (decoder,) = running.client.get("/info").json()["decoders"]
        assert [size["output"] for size in decoder["sizes"]] == [[128, 128]]


def test_costs_measured_beside_other_work_are_not_too_high(serve: Serve):
    class SlowAtFirst(Closing):
        def step(self, slots, indices) -> None:
            time.sleep(0.05 if self.steps < 12 else 0)
            super().step(slots, indices)

    source = Source()
    with serve(source=source) as running:

        def step() -> float:
            costs = running.client.get("/info").json()["costs"]
            return next(cost["seconds"] for cost in costs if (cost["stage"], cost["batch"]) == ("step", 1))

        before = step()
        source.make = SlowAtFirst
        swap(running, source)
        assert step() < before + 0.02
