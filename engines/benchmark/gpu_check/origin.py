"""Where and when a part ran, recorded with its results."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Origin
from engines.machine import device_name, driver_version


def describe_origin(config: RunConfig) -> Origin:
    """Return device, driver, versions, commit and date."""
    origin = {"device": device_name(config.device)}
    if config.on_cuda:
        origin |= {"driver": driver_version() or "unknown", "CUDA": str(torch.version.cuda)}
    origin |= {"PyTorch": torch.__version__, "Python": platform.python_version()}
    origin |= {"commit": config.commit or _commit() or "unknown"}
    return origin | {"measured": datetime.now(UTC).isoformat(timespec="seconds")}


def _commit() -> str | None:
    """Return the commit of the checkout, with "-dirty" if files were changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
