"""The device thread: costs as it measures them, and the runtimes of several decoders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.errors import DecodeError
from engines.runtime.protocol import CompleteRows, Sample, Slot
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from server.lifecycle import State
from server.service import DecodeService
from server.settings import Settings
from tests.server.conftest import OUTPUT, SIZE, Serve
from tests.waiting import until


class ClockedRuntime(SimulatedRuntime):
    """Runtime with a manual clock, which its work advances."""

    def __init__(self, first_condition: float = 0.0) -> None:
        super().__init__({SIZE: SimulatedCost()}, max_batch=1)
        self.now = 100.0
        self._condition = first_condition

    def clock(self) -> float:
        return self.now

    def start(self, sample: Sample) -> Slot:
        self.now += self._condition
        self._condition = 0.0
        return super().start(sample)


def started(runtime: ClockedRuntime) -> DecodeService:
    service = DecodeService(Settings(bundle="."), {"simulated": {"device": runtime}}, clock=runtime.clock)
    service.dispatcher.wake()
    service.start()
    until(lambda: service.lifecycle.state is State.READY)
    return service


def test_a_pause_during_the_warm_up_is_no_cost():
    service = started(ClockedRuntime(first_condition=20.0))
    service.stop()
    assert service.costs.condition(OUTPUT) == service.costs.baseline.condition(OUTPUT) == 0.0


class Reporting(SimulatedRuntime):
    """Writes each call to a list that several runtimes share."""

    def __init__(self, name: str, calls: list[tuple[str, str]], **options: object) -> None:
        super().__init__({SIZE: SimulatedCost()}, **options)  # type: ignore[arg-type]
        self._name, self._calls = name, calls
        self.error: Exception | None = None

    def start(self, sample: Sample) -> Slot:
        self._calls.append((self._name, "start"))
        return super().start(sample)

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        self._calls.append((self._name, "step"))
        if self.error is not None:
            raise self.error
        super().step(slots, indices)

    def preview(self, slot: Slot) -> np.ndarray:
        self._calls.append((self._name, "preview"))
        return super().preview(slot)

    def finish(self, slot: Slot) -> CompleteRows:
        self._calls.append((self._name, "finish"))
        return super().finish(slot)

    def release(self, slot: Slot) -> None:
        self._calls.append((self._name, "release"))
        super().release(slot)


class TestSeveralDecoders:
    def test_each_image_runs_on_the_runtime_of_its_decoder(self, serve: Serve):
        calls: list[tuple[str, str]] = []
        decoders = {name: {"device": Reporting(name, calls)} for name in ("flux", "sd3")}
        with serve(decoders=decoders) as running:
            for name in ("sd3", "flux"):
                calls.clear()
                assert running.decode(decoder=name).status_code == 200
                until(lambda: running.service.dispatcher.open_jobs() == 0)
                assert calls == [(name, call) for call in ("start", *("step",) * 4, "finish", "release")]

    def test_previews_come_from_the_runtime_of_the_image(self, serve: Serve):
        calls: list[tuple[str, str]] = []
        decoders = {name: {"device": Reporting(name, calls)} for name in ("flux", "sd3")}
        with serve(decoders=decoders) as running:
            calls.clear()
            assert running.decode(decoder="sd3", preview="steps").status_code == 200
            assert [call for call in calls if call[1] == "preview"] == [("sd3", "preview")] * 4

    def test_a_failed_image_of_one_decoder_leaves_the_other_alone(self, serve: Serve):
        calls: list[tuple[str, str]] = []
        flux, sd3 = (Reporting(name, calls, max_batch=1, slots=1) for name in ("flux", "sd3"))
        with serve(decoders={"flux": {"device": flux}, "sd3": {"device": sd3}}) as running:
            flux.error = DecodeError("broken")
            for _ in range(2):  # the only slot is free again
                assert running.decode(decoder="flux").json()["code"] == "decode-failed"
                assert running.decode(decoder="sd3").status_code == 200
            flux.error = None
            assert running.decode(decoder="flux").status_code == 200
