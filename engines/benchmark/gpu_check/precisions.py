"""Measurements in both precisions of the server, as far as the time allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Finding, Note
from engines.manifest import Precision


def in_both_precisions(config: RunConfig, measure: Callable[[Precision], Iterator[Finding]]) -> Iterator[Finding]:
    """Measure in FP8, then in bf16, unless that is not expected to finish before the deadline."""
    started = time.monotonic()
    yield from measure("fp8")
    expected = time.monotonic() - started
    if expected > config.seconds_left:
        yield Note(f"bf16 left out: it would take about {expected:.0f} s")
        return
    yield from measure("bf16")
