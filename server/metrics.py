"""What Prometheus sees. Names end in their unit; buckets of durations are derived from the default deadline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, Literal, get_args

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from engines.errors import DecodeError, DeviceLostError, DeviceMemoryError, PidError
from server import errors
from server.images.formats import ImageFormat
from server.scheduling.costs import CostKey
from server.stream import ImageStream, Timings

Outcome = Literal["in-time", "late", "failed", "abandoned"]  # abandoned: the client left

_DEADLINE_SHARES = (
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.35,
    0.5,
    0.7,
    0.85,
    1.0,
    1.5,
    3.0,
)


class Metrics:
    def __init__(self, deadline: float) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        buckets = tuple(float(f"{deadline * share:.3g}") for share in _DEADLINE_SHARES)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        self.requests = counter("pid_requests_total", "Requests to /decode by HTTP status.", "code")
        self.refusals = counter("pid_refusals_total", "Requests to /decode refused, by error code.", "code")
        self._cancelled = counter("pid_cancelled_total", "Images given up, by stage and reason.", "stage", "reason")
        self.images = counter("pid_images_total", "Images answered in full, by format.", "format")
        self.steps = counter("pid_steps_total", "Denoising steps taken, counted per image.")
        self.bytes_out = counter("pid_response_bytes_total", "Bytes of encoded images sent.")
        self.in_flight = gauge("pid_requests_in_flight", "Requests to /decode being served.")
        self.batch = Histogram(
            "pid_batch_size", "Images per step.", buckets=(1, 2, 3, 4, 6, 8, 12, 16), registry=registry
        )
        self._outcomes = counter("pid_image_outcomes_total", "Images admitted, by how they ended.", "outcome")
        self._busy = counter("pid_device_busy_seconds_total", "Time that a device spent at images.", "device")
        self.request_seconds = seconds("pid_request_seconds", "From a request's first byte to its answer's last.")
        self._stage_seconds = seconds("pid_stage_seconds", "What an image spends in each stage.", "stage")
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A series that appears with its first event hides that event from Prometheus' rates."""
        for code in ("200", "400", "422", "429", "499", "500", "503", "504"):
            self.requests.labels(code)
        for code in _refusal_codes():
            self.refusals.labels(code)
        for stage in ("queued", "running"):
            for error in (errors.CancelledError, errors.DeadlineError):
                self._cancelled.labels(stage, error.code)
        for image_format in get_args(ImageFormat):
            self.images.labels(image_format)
        for outcome in get_args(Outcome):
            self._outcomes.labels(outcome)
        for timing in fields(Timings):
            self._stage_seconds.labels(timing.name)

    def stepped(self, batch: int) -> None:
        self.batch.observe(batch)
        self.steps.inc(batch)

    def cancelled(self, stage: str, error: PidError) -> None:
        self._cancelled.labels(stage, error.code).inc()

    def busy(self, device: str, seconds: float) -> None:
        self._busy.labels(device).inc(seconds)

    def ended(self, answer: ImageStream, late: bool) -> None:
        """An admitted image has ended, one way or another."""
        outcome: Outcome = "late" if late else "in-time"
        if isinstance(answer.error, errors.CancelledError):
            outcome = "abandoned"
        elif answer.error is not None:
            outcome = "late" if isinstance(answer.error, errors.DeadlineError) else "failed"
        self._outcomes.labels(outcome).inc()
        if answer.error is None:
            self._image_done(answer)

    def _image_done(self, answer: ImageStream) -> None:
        self.images.labels(answer.media_type.removeprefix("image/")).inc()
        for stage, seconds in asdict(answer.timings).items():
            self._stage_seconds.labels(stage).observe(seconds)

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def add_gauges(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Gauges that are read together when scraped, one for each value of `label`."""
        self.registry.register(_Gauges(name, text, (label,), lambda: {(key,): x for key, x in read().items()}))

    def add_info(self, **labels: str) -> None:
        Gauge("pid_info", "1; what is served, and on what.", labels, registry=self.registry).labels(**labels).set(1)

    def add_costs(self, table: Callable[[], Mapping[CostKey, float]]) -> None:
        def read() -> dict[tuple[str, ...], float]:
            return {(key.stage, f"{key.size}", str(key.batch)): x for key, x in table().items()}

        text = "Running estimate of what a stage costs."
        self.registry.register(_Gauges("pid_cost_seconds", text, ("stage", "size", "batch"), read))

    def add_memory(self, gpus: Mapping[str, Gpu], peaks: Callable[[], Mapping[str, int | None]]) -> None:
        self.registry.register(_Memory(gpus, peaks))

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


def _refusal_codes() -> Iterator[str]:
    """The codes of every error that a request can be answered with."""
    known = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, PidError)]
    ours: list[type[PidError]] = [*known, DecodeError, DeviceMemoryError, DeviceLostError]
    return (error.code for error in ours if error not in (PidError, errors.CancelledError))


class _Gauges:
    def __init__(
        self, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Mapping[tuple[str, ...], float]]
    ) -> None:
        self._name, self._text, self._labels, self._read = name, text, labels, read

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for values, x in self._read().items():
            family.add_metric(values, x)
        yield family


class Gpu:
    """One NVIDIA GPU through NVML."""

    def __init__(self, index: int) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml: Any = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)

    def memory(self) -> tuple[int, int]:
        """Bytes used and free on the device, by whomever."""
        info = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return info.used, info.free

    def utilisation(self) -> float:
        """Share of the last sample period in which a kernel ran."""
        return self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100


class _Memory:
    """VRAM where there are GPUs, the process's memory otherwise."""

    def __init__(self, gpus: Mapping[str, Gpu], peaks: Callable[[], Mapping[str, int | None]]) -> None:
        self._gpus, self._peaks = gpus, peaks
        self._process = psutil.Process()

    def collect(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily("pid_memory_bytes", "Memory of a device that decodes.", labels=("device", "kind"))
        name, text = "pid_gpu_utilisation_ratio", "Share of time in which kernels ran."
        utilisation = GaugeMetricFamily(name, text, labels=("device",))
        for device, gpu in self._gpus.items():
            used, free = gpu.memory()
            memory.add_metric((device, "used"), used)
            memory.add_metric((device, "free"), free)
            utilisation.add_metric((device,), gpu.utilisation())
        if not self._gpus:
            memory.add_metric(("cpu", "used"), self._process.memory_info().rss)
            memory.add_metric(("cpu", "free"), psutil.virtual_memory().available)
        for device, peak in self._peaks().items():
            if peak is not None:
                memory.add_metric((device, "peak"), peak)
        yield memory
        if self._gpus:
            yield utilisation
