"""Gauges for Prometheus, read when they are scraped: scheduler, lifecycle, costs and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import psutil
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.gpus import Gpu, Memory
from server.process.background import BackgroundReader

Values = Mapping[tuple[str, ...], float]  # by label values

READ_SECONDS = 1.0  # limit for reading the values of a GPU


def add_gauge(registry: CollectorRegistry, name: str, text: str, read: Callable[[], float]) -> None:
    """Add a gauge without labels."""
    Gauge(name, text, registry=registry).set_function(read)


def add_gauges(
    registry: CollectorRegistry, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Values]
) -> None:
    """Add a gauge with labels, all of whose series are read together."""
    registry.register(_Gauges(name, text, labels, read))


def add_memory(registry: CollectorRegistry, gpus: Mapping[str, tuple[Gpu, Callable[[], int | None]]]) -> None:
    """Add memory and utilisation of the GPUs, or memory of the process and its machine if there are no GPUs.

    Starts a thread per GPU, because its driver may hang. Values that are not available within a second are left out.

    Args:
        registry: Registry of the metrics.
        gpus: By device name, the GPU, and a function that returns the peak of the memory that its runtime has held in
            bytes, or None if that is unknown.
    """
    registry.register(_Memory(gpus))


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


@dataclass(frozen=True)
class _Reading:
    """Values of one GPU; None for those that are not available."""

    memory: Memory | None
    peak: int | None
    utilisation: float | None


def _read(gpu: Gpu, peak: Callable[[], int | None]) -> _Reading:
    return _Reading(gpu.memory(), gpu.attempt("the peak of the memory is unknown", peak), gpu.utilisation())


class _Memory(Collector):
    def __init__(self, gpus: Mapping[str, tuple[Gpu, Callable[[], int | None]]]) -> None:
        # One thread per GPU, because one that is lost may block its own queries but not those of the others.
        self._readers = {
            device: BackgroundReader(f"metrics {device}", partial(_read, gpu, peak), READ_SECONDS)
            for device, (gpu, peak) in gpus.items()
        }
        self._process = psutil.Process()

    def collect(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily("pid_memory_bytes", "Memory of a device that decodes.", labels=("device", "kind"))
        name, text = "pid_gpu_utilisation_ratio", "Fraction of time in which kernels ran."
        utilisation = GaugeMetricFamily(name, text, labels=("device",))
        for device, reading in self._read().items():
            if reading.memory is not None:
                memory.add_metric((device, "used"), reading.memory.used)
                memory.add_metric((device, "free"), reading.memory.free)
            if reading.peak is not None:
                memory.add_metric((device, "peak"), reading.peak)
            if reading.utilisation is not None:
                utilisation.add_metric((device,), reading.utilisation)
        if not self._readers:
            memory.add_metric(("cpu", "used"), self._process.memory_info().rss)
            memory.add_metric(("cpu", "free"), psutil.virtual_memory().available)
        yield memory
        yield utilisation

    def _read(self) -> dict[str, _Reading]:
        """Return the values of the GPUs that respond in time."""
        waits = {device: reader.request() for device, reader in self._readers.items()}
        readings = {device: wait() for device, wait in waits.items()}
        return {device: reading for device, reading in readings.items() if reading is not None}
