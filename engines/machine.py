"""Properties of this machine that compiled engines depend on."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def device_name(device: torch.device) -> str:
    """Return the GPU's product name on CUDA, e.g. "NVIDIA H200", and `str(device)` otherwise."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def driver_cuda() -> int | None:
    """Return the major version of CUDA that the NVIDIA driver supports, or None if it cannot be determined."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlSystemGetCudaDriverVersion_v2()) // 1000
    except Exception:  # as in `driver_version`
        return None


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, e.g. "580.95.05", or None if it cannot be determined."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # pynvml or its library is missing, or does not match the kernel module, which may be loaded
        return _kernel_module_version()


def _kernel_module_version() -> str | None:
    try:
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", _KERNEL_MODULE.read_text())
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None
