"""Costs as the device thread measures them."""

from __future__ import annotations

import asyncio

from engines.runtime.protocol import Sample, Slot
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from server.lifecycle import State
from server.request import DecodeOptions, DecodeRequest
from server.service import DecodeService
from server.settings import Settings
from tests.server.conftest import SIZE, make_latent, until


class ClockedRuntime(SimulatedRuntime):
    """Runtime with a manual clock, which its work advances."""

    def __init__(self, wait_for_buffer: float = 0.0, first_condition: float = 0.0) -> None:
        super().__init__({SIZE: SimulatedCost()}, max_batch=1)
        self.now = 100.0
        self._wait, self._condition = wait_for_buffer, first_condition

    def clock(self) -> float:
        return self.now

    def start(self, sample: Sample) -> Slot:
        self.now += self._condition
        self._condition = 0.0
        return super().start(sample)

    def wait_for_buffer(self) -> None:
        self.now += self._wait


async def decode(service: DecodeService) -> None:
    admission = service.submit(DecodeRequest(make_latent(1, 16, 2, 2), None, DecodeOptions()), "png")
    while await admission.streams[0].chunk() is not None:
        pass
    admission.release()


def started(runtime: ClockedRuntime) -> DecodeService:
    service = DecodeService(Settings(bundle="."), {"device": runtime}, clock=runtime.clock)
    service.dispatcher.wake()
    service.start()
    until(lambda: service.lifecycle.state is State.READY)
    return service


def test_the_wait_for_a_host_buffer_is_no_cost_of_the_finish():
    """Slow encoders hold the buffers; the device is not slow."""
    service = started(ClockedRuntime(wait_for_buffer=0.5))
    for _ in range(20):
        asyncio.run(decode(service))
        service.dispatcher.wake()
    service.stop()
    assert service.costs.finish(SIZE) == 0.0


def test_a_pause_during_the_warm_up_is_no_cost():
    service = started(ClockedRuntime(first_condition=20.0))
    service.stop()
    assert service.costs.condition(SIZE) == service.costs.baseline.condition(SIZE) == 0.0
