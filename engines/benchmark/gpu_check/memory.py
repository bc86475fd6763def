"""Device memory: releasing what is unused, and reading what is in use."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch


def reset_memory(device: torch.device) -> int | None:
    """Release unused memory and restart the peak; return the bytes that remain reserved, or None without CUDA."""
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()  # one per stream that was ever used
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_reserved(device)


def device_bytes_in_use(device: torch.device) -> int | None:
    """Return the memory in use on a CUDA device by all processes as NVML reports it; None if it does not."""
    try:
        return int(torch.cuda.device_memory_used(device))
    except Exception:  # no pynvml, no NVML library, or a device that does not report its memory
        return None


def process_bytes(device: torch.device) -> Mapping[int, int]:
    """Return the bytes that each process holds on a CUDA device by process id, as far as NVML reports them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except Exception:  # as above; a MIG instance has no UUID of this form
        return {}
    return {process.pid: process.usedGpuMemory for process in processes if process.usedGpuMemory is not None}


def mebibytes(count: float) -> int:
    """Convert bytes to whole MiB."""
    return round(count / 2**20)
