"""Gauges for Prometheus, read when they are scraped: scheduler, lifecycle, costs and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import psutil
import pynvml
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Values = Mapping[tuple[str, ...], float]  # by label values


def add_gauge(registry: CollectorRegistry, name: str, text: str, read: Callable[[], float]) -> None:
    """Add a gauge without labels."""
    Gauge(name, text, registry=registry).set_function(read)


def add_gauges(
    registry: CollectorRegistry, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Values]
) -> None:
    """Add a gauge with labels, all of whose series are read together."""
    registry.register(_Gauges(name, text, labels, read))


def add_memory(
    registry: CollectorRegistry, gpus: Mapping[str, Gpu], peaks: Callable[[], Mapping[str, int | None]]
) -> None:
    """Add memory and utilisation of the GPUs by device name, or of the process and its machine if there are no GPUs.

    `peaks` returns the peak bytes that each device's runtime has held, or None if that is unknown.
    """
    registry.register(_Memory(gpus, peaks))


def add_counter(registry: CollectorRegistry, name: str, text: str, read: Callable[[], float]) -> None:
    """Add a counter without labels, whose value is read when it is scraped."""
    registry.register(_Counter(name, text, read))


class _Counter(Collector):
    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._name, self._text, self._read = name, text, read

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._text, value=self._read())


class _Gauges(Collector):
    def __init__(self, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Values]) -> None:
        self._name, self._text, self._labels, self._read = name, text, labels, read

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for values, x in self._read().items():
            family.add_metric(values, x)
        yield family


class Gpu:
    """One NVIDIA GPU, through NVML."""

    def __init__(self, index: int) -> None:
        """Open the GPU with this CUDA device index."""
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)

    def memory(self) -> tuple[int, int]:
        """Return the bytes used and free on the device, across all processes."""
        info = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
        return info.used, info.free

    def utilisation(self) -> float:
        """Return the fraction of the last sample period in which a kernel ran."""
        return pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100


class _Memory(Collector):
    def __init__(self, gpus: Mapping[str, Gpu], peaks: Callable[[], Mapping[str, int | None]]) -> None:
        self._gpus, self._peaks = gpus, peaks
        self._process = psutil.Process()

    def collect(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily("pid_memory_bytes", "Memory of a device that decodes.", labels=("device", "kind"))
        name, text = "pid_gpu_utilisation_ratio", "Fraction of time in which kernels ran."
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
