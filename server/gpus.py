"""Memory and utilisation of a GPU: from NVML, and memory from CUDA if NVML does not report it.

Every query may fail on its own: the library may be missing or of another version than the driver, the GPU may be lost,
and unified memory, vGPUs and MIG instances support only some of the queries. A query that fails returns None.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from engines.runtime.devices import device_memory

log = logging.getLogger(__name__)

T = TypeVar("T")

# Errors after which a handle is useless. Other errors concern one query.
_SESSION_ERRORS = (
    "NVML_ERROR_UNINITIALIZED",
    "NVML_ERROR_DRIVER_NOT_LOADED",
    "NVML_ERROR_GPU_IS_LOST",
    "NVML_ERROR_RESET_REQUIRED",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH",
)
REOPEN_SECONDS = 60.0  # between attempts to open a GPU in NVML, which may take seconds without persistence mode


@dataclass(frozen=True)
class Memory:
    """Memory of a device in bytes, across all processes."""

    used: int
    free: int


def load_nvml() -> Any:
    """Import NVIDIA's binding of NVML."""
    return importlib.import_module("pynvml")


def cuda_uuid(device: str) -> str:
    """Return the UUID of a CUDA device without a prefix; for a MIG instance, current drivers return the instance's."""
    return str(torch.cuda.get_device_properties(device).uuid)


def cuda_memory(device: str) -> Memory:
    """Return the memory of a device that this process has opened, as CUDA reports it; during the call others run."""
    free, total = device_memory(device)
    return Memory(total - free, free)


class Gpu:
    """One GPU or MIG instance. Call its methods from one thread at a time; they may hang if the driver does.

    CUDA and NVML number devices differently (CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER, MIG), so NVML finds the device by
    its UUID. Each kind of failure is logged once.
    """

    def __init__(
        self,
        device: str,
        nvml: Callable[[], Any] = load_nvml,
        uuid: Callable[[str], str] = cuda_uuid,
        cuda: Callable[[str], Memory] = cuda_memory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describe a CUDA device. Nothing is loaded before the first query.

        Args:
            device: PyTorch's name of the device, such as "cuda:0".
            nvml: Returns the module `pynvml`.
            uuid: Returns the UUID of a device.
            cuda: Returns the memory of a device as CUDA reports it.
            clock: Returns the time in seconds.
        """
        self._device, self._load, self._uuid, self._cuda, self._clock = device, nvml, uuid, cuda, clock
        self._nvml: Any = None  # the module, while the GPU is open
        self._handle: Any = None
        self._reopen_at = -float("inf")
        self._logged: set[str] = set()

    def memory(self) -> Memory | None:
        """Return the memory of the device, or None if neither NVML nor CUDA reports it."""
        info = self._query("memory", lambda nvml, handle: nvml.nvmlDeviceGetMemoryInfo(handle))
        if info is not None and info.total > 0:
            return Memory(info.used, info.free)
        return self.attempt("CUDA does not report the memory", lambda: self._cuda(self._device))

    def utilisation(self) -> float | None:
        """Return the fraction of the last sample period in which a kernel ran, or None if NVML does not report it."""
        rates = self._query("utilisation", lambda nvml, handle: nvml.nvmlDeviceGetUtilizationRates(handle))
        return None if rates is None else rates.gpu / 100

    def attempt(self, failure: str, read: Callable[[], T]) -> T | None:
        """Return the result of `read`. If it fails, return None, and log `failure` with the reason once."""
        try:
            return read()
        except MemoryError:
            raise
        except Exception as error:
            self._log(failure, error)
            return None

    def _query(self, quantity: str, ask: Callable[[Any, Any], T]) -> T | None:
        """Ask NVML. If the GPU or the driver was lost, the GPU is opened again later."""
        if self._nvml is None and not self._open():
            return None
        try:
            return ask(self._nvml, self._handle)
        except MemoryError:
            raise
        except Exception as error:
            self._log(f"NVML does not report the {quantity}", error)
            if getattr(error, "value", None) in [getattr(self._nvml, name) for name in _SESSION_ERRORS]:
                self._close()
            return None

    def _open(self) -> bool:
        if self._clock() < self._reopen_at:
            return False
        self._reopen_at = self._clock() + REOPEN_SECONDS
        self.attempt("NVML is not available", self._find)
        return self._nvml is not None

    def _find(self) -> None:
        """Initialise NVML and find the device."""
        nvml = self._load()
        nvml.nvmlInit()
        try:
            self._handle = _find_handle(nvml, self._uuid(self._device))
        except BaseException:
            _shut_down(nvml)
            raise
        self._nvml = nvml

    def _close(self) -> None:
        nvml, self._nvml = self._nvml, None
        _shut_down(nvml)

    def _log(self, failure: str, error: Exception) -> None:
        first = (str(error).splitlines() or [""])[0].rstrip(".")
        message = f"{self._device}: {failure}: {first or type(error).__name__}"
        if message not in self._logged:
            self._logged.add(message)
            log.warning("%s; this is logged once", message)


def _shut_down(nvml: Any) -> None:
    with contextlib.suppress(Exception):
        nvml.nvmlShutdown()


class _WholeGpuError(Exception):
    """NVML knows only the GPU that the MIG instance is a part of."""


def _find_handle(nvml: Any, uuid: str) -> Any:
    """Return the handle of the GPU or MIG instance with this UUID, which has no prefix."""
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError as error:
        if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
            raise
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
    if _is_divided(nvml, handle):
        raise _WholeGpuError("CUDA returns the UUID of the whole GPU instead of the MIG instance")
    return handle


def _is_divided(nvml: Any, handle: Any) -> bool:
    """Return whether a GPU is divided into MIG instances."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # most GPUs do not support MIG, and old drivers do not have this function
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)
