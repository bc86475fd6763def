"""Properties and peak rates of the device."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch

from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Finding, Measurement
from engines.benchmark.roofline import measure_rates
from engines.benchmark.timing import best_seconds
from engines.machine import device_name, driver_version
from engines.pid.fp8 import FP8


def device_properties(config: RunConfig) -> Iterator[Finding]:
    """Yield one row per property: the hardware, the software, and measured peak rates."""
    device = config.device
    rates = measure_rates(device, torch.bfloat16)
    properties = {"device": device_name(device)}
    if device.type == "cuda":
        properties |= _cuda_properties(device)
    properties |= {
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "bf16 matmul": f"{rates.matmul_flops / 1e12:.4g} TFLOP/s",
        "copy in device memory": f"{rates.copy_bytes / 1e9:.4g} GB/s",
    }
    for name, value in properties.items():
        yield Measurement({"property": name, "value": value})


def _cuda_properties(device: torch.device) -> dict[str, str]:
    cuda = torch.cuda.get_device_properties(device)
    properties = {
        "compute capability": f"{cuda.major}.{cuda.minor}",
        "memory": f"{cuda.total_memory / 2**30:.1f} GiB",
        "multiprocessors": str(cuda.multi_processor_count),
        "driver": driver_version() or "unknown",
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }
    if (cuda.major, cuda.minor) >= (8, 9):
        properties["FP8 matmul"] = f"{_fp8_flops(device) / 1e12:.4g} TFLOP/s"
    return properties


def _fp8_flops(device: torch.device) -> float:
    side, one = 8192, torch.ones((), device=device)
    a, b = (torch.randn(side, side, device=device).to(FP8) for _ in range(2))
    seconds = best_seconds(
        device, lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    )
    return 2 * side**3 / seconds
