"""What the machine at hand is, as far as engines depend on it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def driver_version() -> str | None:
    """Version of the NVIDIA driver, such as "580.95.05"; None where there is none or it does not tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # not installed, no driver, or one without its library: the kernel may still know
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", _KERNEL_MODULE.read_text()) if _KERNEL_MODULE.is_file() else None
        return found[1] if found else None
