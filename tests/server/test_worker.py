"""Costs as the device thread measures them."""

from __future__ import annotations

from engines.runtime.protocol import Sample, Slot
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from server.lifecycle import State
from server.service import DecodeService
from server.settings import Settings
from tests.server.conftest import SIZE
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
    service = DecodeService(Settings(bundle="."), {"device": runtime}, clock=runtime.clock)
    service.dispatcher.wake()
    service.start()
    until(lambda: service.lifecycle.state is State.READY)
    return service


def test_a_pause_during_the_warm_up_is_no_cost():
    service = started(ClockedRuntime(first_condition=20.0))
    service.stop()
    assert service.costs.condition(SIZE) == service.costs.baseline.condition(SIZE) == 0.0
