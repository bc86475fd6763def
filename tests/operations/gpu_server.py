"""Run the server with two decoders on two simulated GPUs: `python -m tests.operations.gpu_server [flags]`.

NVML and the text encoder are stand-ins.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial

from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from loadtest.simulated_server import simulated_text_encoder
from server import logs
from server.command_line import read_settings
from server.gpus import Gpu
from server.main import serve
from server.process.listen import listening
from server.swaps import FixedDecoders
from tests.server.nvml import NvmlDevice, StandInNvml, stand_in_gpu

SIZE = Size(256, 256)
CHANNELS = {"flux": 16, "sdxl": 4}  # of the latents, by decoder
GIB = 2**30


class Device(SimulatedRuntime):
    def peak_memory(self) -> int:
        return 18 * GIB


def find_gpus(devices: Iterable[str]) -> dict[str, Gpu]:
    reported = {f"GPU-{name}": NvmlDevice((20 * GIB, 12 * GIB), 0.40 + 0.01 * i) for i, name in enumerate(devices)}
    nvml = StandInNvml(reported)
    return {name: stand_in_gpu(nvml, name, uuid=name) for name in devices}


if __name__ == "__main__":
    settings = read_settings(["--bundle", ".", *sys.argv[1:]])
    logs.configure(settings.log_level, settings.log_format)
    open_captions = partial(simulated_text_encoder, 0.01, 2)
    cost = {SIZE: SimulatedCost(condition=0.002, step=0.02, finish=0.001)}
    runtimes = {
        name: {f"cuda:{index}": Device(cost, max_batch=2, latent_channels=channels) for index in range(2)}
        for name, channels in CHANNELS.items()
    }
    with listening(settings.address) as listener:
        sys.exit(serve(settings, listener, FixedDecoders(runtimes), find_gpus=find_gpus, open_captions=open_captions))
