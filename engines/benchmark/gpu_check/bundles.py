"""Time of the engines in a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Finding, Measurement, Note, Skipped, Value
from engines.benchmark.gpu_check.memory import mebibytes
from engines.benchmark.gpu_check.rows import time_decodes
from engines.benchmark.timing import measure_seconds
from engines.bundle import Bundle, open_bundle
from engines.errors import ConfigError
from engines.manifest import Package
from engines.runtime.open import open_runtime
from engines.runtime.trt import import_package

PACKAGES: tuple[Package, ...] = get_args(Package)


def decode_with_engines(config: RunConfig) -> Iterator[Finding]:
    """Time the engines of a bundle, if TensorRT is installed and --bundle names one."""
    installed = [package for package in PACKAGES if _installed(package)]
    if not installed:
        yield Skipped(f"neither {' nor '.join(PACKAGES)} is installed")
        return
    if config.bundle is None:
        yield Skipped(f"{' and '.join(installed)} installed, but no --bundle with engines was passed")
        return
    yield from _time_engines(config, open_bundle(config.bundle))


def _time_engines(config: RunConfig, bundle: Bundle) -> Iterator[Finding]:
    manifest = bundle.manifest
    yield Note(f"{manifest.decoder}, {manifest.precision}, {manifest.runtime.package} {manifest.runtime.version}")
    runtime = open_runtime(bundle, config.device, slots=manifest.max_batch)
    seconds = measure_seconds(config.device, runtime.warm_up)
    yield Note(f"warm-up of all sizes and batches: {seconds:.1f} s")
    for size in manifest.sizes:
        for batch in range(1, manifest.max_batch + 1):
            row: dict[str, Value] = {"size": str(size), "batch": batch}
            yield Measurement(row | time_decodes(runtime, size, batch).columns())
    yield Note(f"peak memory: {mebibytes(runtime.peak_memory() or 0):,} MiB")


def _installed(package: Package) -> bool:
    try:
        import_package(package)
    except ConfigError:
        return False
    return True
