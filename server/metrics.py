"""What Prometheus sees. Names end in their unit; buckets of durations are derived from the default deadline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from engines.errors import PidError
from server.answer import Answer
from server.costs import CostKey

_DEADLINE_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.5, 3.0)


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
        self.request_seconds = seconds("pid_request_seconds", "From a request's first byte to its answer's last.")
        self._stage_seconds = seconds("pid_stage_seconds", "What an image spends in each stage.", "stage")

    def stepped(self, batch: int) -> None:
        self.batch.observe(batch)
        self.steps.inc(batch)

    def cancelled(self, stage: str, error: PidError) -> None:
        self._cancelled.labels(stage, error.code).inc()

    def image_done(self, answer: Answer) -> None:
        self.images.labels(answer.media_type.removeprefix("image/")).inc()
        for stage, seconds in asdict(answer.timings).items():
            self._stage_seconds.labels(stage).observe(seconds)

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def add_costs(self, table: Callable[[], Mapping[CostKey, float]]) -> None:
        self.registry.register(_Costs(table))

    def add_memory(self, gpu: Gpu | None, peak: Callable[[], int | None]) -> None:
        self.registry.register(_Memory(gpu, peak))

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class _Costs:
    def __init__(self, table: Callable[[], Mapping[CostKey, float]]) -> None:
        self._table = table

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "pid_cost_seconds", "Running estimate of what a stage costs.", labels=("stage", "size", "batch")
        )
        for key, seconds in self._table().items():
            family.add_metric((key.stage, f"{key.size[0]}x{key.size[1]}", str(key.batch)), seconds)
        yield family


class Gpu:
    """One NVIDIA GPU through NVML."""

    def __init__(self, index: int) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml: Any = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self.name = str(index)

    def memory(self) -> tuple[int, int]:
        """Bytes used and free on the device, by whomever."""
        info = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return info.used, info.free

    def utilisation(self) -> float:
        """Share of the last sample period in which a kernel ran."""
        return self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100


class _Memory:
    """VRAM where there is a GPU, the process's memory otherwise."""

    def __init__(self, gpu: Gpu | None, peak: Callable[[], int | None]) -> None:
        self._gpu, self._peak = gpu, peak
        self._process = psutil.Process()

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("pid_memory_bytes", "Memory of the device that decodes.", labels=("device", "kind"))
        device = "cpu" if self._gpu is None else self._gpu.name
        if self._gpu is None:
            family.add_metric((device, "used"), self._process.memory_info().rss)
            family.add_metric((device, "free"), psutil.virtual_memory().available)
        else:
            used, free = self._gpu.memory()
            family.add_metric((device, "used"), used)
            family.add_metric((device, "free"), free)
            name, text = "pid_gpu_utilisation_ratio", "Share of time in which kernels ran."
            utilisation = GaugeMetricFamily(name, text, labels=("device",))
            utilisation.add_metric((device,), self._gpu.utilisation())
            yield utilisation
        peak = self._peak()
        if peak is not None:
            family.add_metric((device, "peak"), peak)
        yield family
