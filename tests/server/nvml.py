"""A stand-in for NVML and CUDA: devices by UUID, each of whose queries can be made to fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml

from server.gpus import Gpu, Memory

UUID = "01020304-0506-0708-090a-0b0c0d0e0f10"
CUDA = Memory(used=7, free=93)  # as CUDA reports it


@dataclass
class NvmlDevice:
    """A GPU or MIG instance as NVML reports it. Values that are an int are error codes."""

    memory: tuple[int, int] | int = (10, 90)  # used, free
    utilisation: float | int = 0.5
    divided: bool | int = False  # into MIG instances


@dataclass
class StandInNvml:
    """The functions of `pynvml` that the server calls, and its error codes.

    Attributes:
        devices: Devices by UUID with prefix; an error code if the lookup fails.
        init_error: Error code of `nvmlInit`, 0 for none.
        open: Number of calls of `nvmlInit` without `nvmlShutdown`.
        lookups: UUIDs that were looked up.
    """

    devices: Mapping[str, NvmlDevice | int] = field(default_factory=lambda: {f"GPU-{UUID}": NvmlDevice()})
    init_error: int = 0
    open: int = 0
    lookups: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        if name.startswith(("NVML", "NVMLError")):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:  # noqa: N802
        check(self.init_error)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> NvmlDevice:  # noqa: N802
        self.lookups.append(uuid)
        device = self.devices.get(uuid, pynvml.NVML_ERROR_NOT_FOUND)
        check(device)
        assert isinstance(device, NvmlDevice)
        return device

    def nvmlDeviceGetMigMode(self, device: NvmlDevice) -> list[int]:  # noqa: N802
        if device.divided not in (True, False):
            check(device.divided)
        return [int(device.divided), int(device.divided)]

    def nvmlDeviceGetMemoryInfo(self, device: NvmlDevice) -> SimpleNamespace:  # noqa: N802
        check(device.memory)
        assert isinstance(device.memory, tuple)
        used, free = device.memory
        return SimpleNamespace(used=used, free=free, total=used + free)

    def nvmlDeviceGetUtilizationRates(self, device: NvmlDevice) -> SimpleNamespace:  # noqa: N802
        check(device.utilisation)
        return SimpleNamespace(gpu=round(100 * device.utilisation))


def check(value: object) -> None:
    """Raise NVML's error if `value` is an error code."""
    if isinstance(value, int) and value:
        raise pynvml.NVMLError(value)


def stand_in_gpu(nvml: StandInNvml, device: str = "cuda:0", uuid: str = UUID) -> Gpu:
    """Return a GPU whose NVML and CUDA are stand-ins."""
    return Gpu(device, lambda: nvml, lambda name: uuid, lambda name: CUDA)
