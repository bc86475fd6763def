"""Run the server on two simulated GPUs with a stand-in for NVML: `python -m tests.operations.gpu_server [flags]`."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server import gauges, logs
from server.main import serve
from server.settings import read_settings

SIZE = Size(256, 256)
GIB = 2**30

gauges.pynvml = SimpleNamespace(
    nvmlInit=lambda: None,
    nvmlDeviceGetHandleByIndex=lambda index: index,
    nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=20 * GIB, free=12 * GIB),
    nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=40 + handle),
)


class Device(SimulatedRuntime):
    def peak_memory(self) -> int:
        return 18 * GIB


if __name__ == "__main__":
    settings = read_settings(["--bundle", ".", *sys.argv[1:]])
    logs.configure(settings.log_level)
    cost = {SIZE: SimulatedCost(condition=0.002, step=0.02, finish=0.001)}
    devices = {f"cuda:{index}": Device(cost, max_batch=2) for index in range(2)}
    sys.exit(serve(settings, lambda: devices))
