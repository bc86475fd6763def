"""One row of a table of decodes: times and memory of a runtime, next to the prediction."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from engines.benchmark.decoders import ServingDecoder, weight_bytes
from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Value
from engines.benchmark.gpu_check.memory import device_bytes_in_use, mebibytes, reset_memory
from engines.benchmark.predictions import Prediction, find_gpu, predict
from engines.machine import device_name
from engines.manifest import Precision
from engines.pid import FoldedDecoder
from engines.pid.sampler import MAX_STEPS
from engines.runtime.device_runtime import DeviceRuntime
from engines.size import Size

DECODES = 5  # timed decodes of a row, at most
TIMED_SECONDS = 5.0  # no further decode starts after this time


@dataclass(frozen=True)
class StageTimes:
    """Median seconds of each stage of decodes of a batch."""

    batch: int
    stages: Mapping[str, float]  # condition and finish of one image, step of the batch

    @property
    def decode_seconds(self) -> float:
        """Seconds of a four-step decode of the batch: the sum of its stages."""
        stages = self.stages
        return self.batch * (stages["condition"] + stages["finish"]) + MAX_STEPS * stages["step"]

    @property
    def images_per_second(self) -> float:
        """Throughput of such batches one after another."""
        return self.batch / self.decode_seconds

    def columns(self) -> dict[str, Value]:
        """Return the columns of the report."""
        stages = {f"{stage} ms": milliseconds(seconds) for stage, seconds in self.stages.items()}
        throughput = float(f"{self.images_per_second:.4g}")
        return {**stages, "decode ms": milliseconds(self.decode_seconds), "images/s": throughput}

    def compared_with(self, prediction: Prediction | None) -> dict[str, Value]:
        """Return the predicted times of the batch, and the measured ones as multiples of them."""
        if prediction is None:
            return {}
        step, decode = self.batch * prediction.step, self.batch * prediction.decode
        return {
            "predicted step ms": milliseconds(step),
            "step / predicted": round(self.stages["step"] / step, 2),
            "predicted decode ms": milliseconds(decode),
            "decode / predicted": round(self.decode_seconds / decode, 2),
        }


@dataclass(frozen=True)
class Row:
    """Times and memory of a runtime that was made, warmed up and closed for one size and batch."""

    times: StageTimes
    warm_up_seconds: float
    columns: Mapping[str, Value]


def measure_row(config: RunConfig, folded: FoldedDecoder, make: Callable[[], DeviceRuntime]) -> Row:
    """Make a runtime for one size, warm it up, time its largest batch, and release it.

    Raises:
        DeviceMemoryError: The device runs out of memory.
    """
    before = reset_memory(config.device)
    runtime = make()
    info = runtime.info
    try:
        started = time.monotonic()
        runtime.warm_up()
        warm_up = time.monotonic() - started
        times = time_decodes(runtime, info.sizes[0], info.max_batch)
        memory = {} if before is None else _memory(config, folded, runtime, before)
        prediction = find_prediction(config, info.sizes[0], info.precision)
    finally:
        runtime.close()
        del runtime
        reset_memory(config.device)
    columns = {**times.columns(), **times.compared_with(prediction), "warm-up s": round(warm_up, 1), **memory}
    return Row(times, warm_up, columns)


def time_decodes(runtime: DeviceRuntime, size: Size, batch: int) -> StageTimes:
    """Time complete decodes of a batch, after one step that is not timed."""
    decoder = ServingDecoder(runtime, batch, size)
    decoder.decode(steps=1)
    decoder.reset_times()
    started = time.monotonic()
    for _ in range(DECODES):
        decoder.decode()
        if time.monotonic() - started > TIMED_SECONDS:
            break
    return StageTimes(batch, decoder.stage_seconds())


def find_prediction(config: RunConfig, size: Size, precision: str) -> Prediction | None:
    """Return the prediction for the device; None for other devices, networks and precisions."""
    gpu = find_gpu(device_name(config.device)) if config.on_cuda and not config.small else None
    if gpu is None or precision not in ("bf16", "fp8"):
        return None
    known: Precision = "fp8" if precision == "fp8" else "bf16"
    return predict(gpu, size, known)


def _memory(config: RunConfig, folded: FoldedDecoder, runtime: DeviceRuntime, before: int) -> dict[str, Value]:
    """Return the columns of memory on CUDA: before the runtime was made, its peak, and all of the device now."""
    in_use = device_bytes_in_use(config.device)
    return {
        "weights MiB": mebibytes(weight_bytes(folded)),
        "reserved before MiB": mebibytes(before),
        "peak MiB": mebibytes(runtime.peak_memory() or 0),
        "PyTorch peak MiB": mebibytes(torch.cuda.max_memory_reserved(config.device)),
        "NVML MiB": None if in_use is None else mebibytes(in_use),
    }


def milliseconds(seconds: float) -> float:
    """Convert seconds to milliseconds with four significant digits."""
    return float(f"{1000 * seconds:.4g}")
