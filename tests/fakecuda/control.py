"""The counters of the fake CUDA device in this process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fakecuda.build import LIBRARY


class FakeCuda:
    """The fake CUDA device that this process runs on."""

    def __init__(self) -> None:
        """Open the library that was preloaded. Raises RuntimeError without it."""
        preloaded = [path for path in os.environ.get("LD_PRELOAD", "").split() if Path(path).name == LIBRARY]
        if not preloaded:
            raise RuntimeError("This process does not run on the fake CUDA device; see tests/fakecuda/README.md.")
        self._library = ctypes.CDLL(preloaded[0])
        library = self._library
        for function in (library.fakecuda_used_memory, library.fakecuda_peak_memory, library.fakecuda_mapped_memory):
            function.restype = ctypes.c_size_t
        self._library.fakecuda_violations.restype = ctypes.c_long

    def violations(self) -> int:
        """Return how often this process has broken a rule; the log describes each."""
        return self._library.fakecuda_violations()

    def used_memory(self, device: int = 0) -> int:
        """Return the bytes in use on a device, as NVML reports them."""
        return self._library.fakecuda_used_memory(device)

    def peak_memory(self, device: int = 0) -> int:
        """Return the largest number of bytes in use since `reset`."""
        return self._library.fakecuda_peak_memory(device)

    def mapped_memory(self) -> int:
        """Return the bytes of all devices that are mapped to reserved addresses."""
        return self._library.fakecuda_mapped_memory()

    def operations(self) -> Mapping[str, int]:
        """Return how often each operation was enqueued since `reset`; those in graphs begin with "captured "."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "counters")
            if self._library.fakecuda_write_counters(bytes(path)) != 0:
                raise OSError(f"cannot write {path}")
            rows = (line.split("\t", 1) for line in path.read_text().splitlines())
            return {operation: int(number) for number, operation in rows}

    def reset(self) -> None:
        """Forget the operations and the peak."""
        self._library.fakecuda_reset_counters()
        self._library.fakecuda_reset_peak_memory()


def on_fake_device() -> bool:
    """Return whether this process runs on the fake CUDA device, where no kernel computes anything."""
    return any(Path(path).name == LIBRARY for path in os.environ.get("LD_PRELOAD", "").split())
