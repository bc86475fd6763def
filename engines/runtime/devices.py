"""The devices of this machine: finding one, and explaining in one sentence why CUDA cannot use a GPU.

PyTorch counts GPUs through NVML, so its count does not show that CUDA works. Only the first real use of a device does,
and it reports failures through several exception types.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from engines.errors import ConfigError

_DISPLAY_CLASSES = ("0x0300", "0x0302")  # PCI: VGA controller, 3D controller
_NVIDIA = "0x10de"  # PCI vendor
_NOTHING_FOUND = re.compile(
    r"no NVIDIA driver|No CUDA GPUs|no CUDA-capable device|initialization failed, you might not have|"
    r"not compiled with CUDA",
    re.IGNORECASE,
)
# Patterns of CUDA's and PyTorch's messages, with the reason and the remedy.
_EXPLANATIONS = (
    (
        r"invalid device ordinal|Error 101\b",
        "there is no GPU with this index",
    ),
    (
        r"Error 802\b|system not yet initialized",
        "its NVLink fabric is not ready (CUDA error 802); start nvidia-fabricmanager and wait until it has finished",
    ),
    (
        r"Error 803\b|unsupported display driver|driver/library version mismatch",
        "the libraries of the driver do not match its kernel module (CUDA error 803); reboot, or reload the module",
    ),
    (
        r"Error 804\b|forward compatibility",
        "the CUDA compatibility libraries do not support it (CUDA error 804); update the driver, or remove them from "
        "LD_LIBRARY_PATH",
    ),
    (
        r"driver on your system is too old|Error 35\b|driver version is insufficient",
        f"the NVIDIA driver is too old for CUDA {torch.version.cuda}; update it",
    ),
    (
        r"busy or unavailable|Error 46\b",
        "it is busy or unavailable (CUDA error 46); look for another process that uses it, or for MIG mode without "
        "instances, with nvidia-smi",
    ),
    (
        r"uncorrectable ECC|Error 214\b",
        "its memory has an uncorrectable error (CUDA error 214); reset or replace the GPU",
    ),
    (
        r"no kernel image|Error 209\b",
        "this build of PyTorch has no kernels for it (CUDA error 209); install a build that supports it",
    ),
    (
        r"Error 304\b|OS call failed",
        "a call to the operating system failed (CUDA error 304); check the permissions of /dev/nvidia* and the driver",
    ),
    (
        r"Error 999\b|CUDA unknown error",
        "CUDA reports an unknown error (999); look for errors of the driver with dmesg and nvidia-smi, then reboot",
    ),
    (
        r"out of memory",
        "it has no free memory; stop other processes that use it",
    ),
)


def find_device(name: str, system: Path = Path("/")) -> torch.device:
    """Return the device "cpu", "cuda" (the first GPU) or "cuda:N", after running a kernel on a GPU.

    Args:
        name: Name of the device.
        system: Root of the file system, in which devices of the machine are looked up.

    Raises:
        ConfigError: The name is invalid, or the device is not available; the message explains why.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if found is None:
        raise ConfigError(f"{name!r} is not a device; use cpu, cuda, or a CUDA device such as cuda:0.")
    if name == "cpu":
        return torch.device("cpu")
    index = int(found[1] or 0)
    problem = cuda_problem(index, system)
    if problem is not None:
        raise ConfigError(f"The device {name} is not available: {problem}.")
    return torch.device("cuda", index)


def default_device(system: Path = Path("/")) -> torch.device:
    """Return the first GPU, or the CPU if this process has no GPU to use.

    A GPU that CUDA_VISIBLE_DEVICES hides does not count, and none does if PyTorch is a build without CUDA.

    Args:
        system: Root of the file system, in which devices of the machine are looked up.

    Raises:
        ConfigError: CUDA cannot use the GPU. The CPU would take hours instead of minutes, so it is not used instead.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not torch.backends.cuda.is_built() or not gpu_present(system):
        return torch.device("cpu")
    problem = cuda_problem(system=system)
    if problem is not None:
        raise ConfigError(f"{problem}. To use the CPU instead, set CUDA_VISIBLE_DEVICES to an empty string.")
    return torch.device("cuda", 0)


def cuda_problem(index: int = 0, system: Path = Path("/")) -> str | None:
    """Initialise CUDA and run a kernel on a GPU; return why that fails, as a clause, or None if it works.

    Args:
        index: PyTorch's index of the GPU.
        system: Root of the file system, in which devices of the machine are looked up.
    """
    try:
        torch.cuda.init()
        torch.ones(1, device=f"cuda:{index}").item()
    except MemoryError:
        raise
    except Exception as error:  # RuntimeError, AssertionError or DeferredCudaCallError
        code = getattr(error, "error_code", None)  # of torch.AcceleratorError
        return _explain(str(error) if code is None else f"Error {code}: {error}", system)
    return None


def device_memory(device: torch.device | str) -> tuple[int, int]:
    """Return the free and the total memory of a CUDA device in bytes, across all processes.

    An integrated GPU, such as that of the GB10, shares the memory of the machine. CUDA counts the page cache there as
    used, although Linux releases it for allocations, so the memory that Linux reports as available is free.
    """
    free, total = torch.cuda.mem_get_info(device)
    if torch.cuda.get_device_properties(device).is_integrated:
        import psutil  # only here, so that the GPU check runs without it on other GPUs

        free = min(total, max(free, psutil.virtual_memory().available))
    return free, total


def gpu_present(system: Path = Path("/")) -> bool:
    """Return whether this machine has an NVIDIA GPU, even if CUDA or this process cannot use it."""
    listed = torch.cuda.device_count() > 0  # by NVML, which may work without CUDA
    return (
        listed
        or any(_device_files(system))
        or any(
            _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAY_CLASSES)
            for device in (system / "sys/bus/pci/devices").glob("*")
        )
    )


def _explain(message: str, system: Path) -> str:
    """Turn the message of an exception into a clause with the reason and the remedy."""
    if _NOTHING_FOUND.search(message):
        if not gpu_present(system):
            return "this machine has no NVIDIA GPU"
        return f"CUDA cannot use the GPU of this machine: {_why_nothing_is_found(message, system)}"
    for pattern, explanation in _EXPLANATIONS:
        if re.search(pattern, message, re.IGNORECASE):
            if (file := _closed_device_file(system)) is not None:
                explanation = f"{file} cannot be opened; allow this user to read and write it"
            return f"CUDA cannot use the GPU: {explanation}"
    first = next(iter(message.strip().splitlines()), "unknown error").rstrip(".")
    return f"CUDA cannot use the GPU: {first}"


def _why_nothing_is_found(message: str, system: Path) -> str:
    if not torch.backends.cuda.is_built():
        return f"PyTorch {torch.__version__} is a build without CUDA; install one with CUDA"
    if (file := _closed_device_file(system)) is not None:
        return f"{file} cannot be opened; allow this user to read and write it"
    if re.search("no NVIDIA driver", message, re.IGNORECASE):
        return "no NVIDIA driver is available; install it, or give the container access to the GPU"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}; set it to the index or UUID of a GPU, or unset it"
    return "the driver offers none to CUDA; look for errors, or for MIG mode without instances, with nvidia-smi"


def _device_files(system: Path) -> Iterator[Path]:
    return (system / "dev").glob("nvidia[0-9]*")


def _closed_device_file(system: Path) -> Path | None:
    """Return a device file of the driver that this process must not open, if there is one."""
    for file in (*sorted(_device_files(system)), system / "dev/nvidiactl", system / "dev/nvidia-uvm"):
        try:
            os.close(os.open(file, os.O_RDWR))
        except PermissionError:
            return file
        except OSError:
            continue
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
