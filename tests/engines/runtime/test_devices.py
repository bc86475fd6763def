"""Devices: why CUDA cannot use a GPU is one sentence, whatever PyTorch raises."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from engines.errors import ConfigError
from engines.runtime.devices import cuda_problem, default_device, find_device, gpu_present

NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by …"


def unexpected(code: int, text: str) -> RuntimeError:
    """Return PyTorch's exception for an error of cudaGetDeviceCount that it does not know."""
    return RuntimeError(
        "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() "
        f"that might have already set an error? Error {code}: {text}"
    )


def at_first_use(code: int, text: str) -> torch.AcceleratorError:
    error = torch.AcceleratorError(f"CUDA error: {text}\nCUDA kernel errors might be asynchronously reported …")
    error.error_code = code
    return error


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root of the file system of a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def add_pci_device(system: Path, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    device = system / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


def add_device_files(system: Path) -> None:
    (system / "dev").mkdir()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        (system / "dev" / name).touch()


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception, first_use: bool = False) -> None:
    """Let CUDA fail while it is initialised, or when a device is used for the first time."""

    def raise_error(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "init", (lambda: None) if first_use else raise_error)
    monkeypatch.setattr(torch, "ones", raise_error)


class TestProblem:
    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (unexpected(802, "system not yet initialized"), "start nvidia-fabricmanager"),
            (unexpected(803, "system has unsupported display driver / cuda driver combination"), "reboot"),
            (unexpected(804, "forward compatibility was attempted on non supported HW"), "LD_LIBRARY_PATH"),
            (unexpected(304, "OS call failed or operation not supported on this OS"), "permissions of /dev/nvidia"),
            (RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"), "(999)"),
            (RuntimeError(TOO_OLD), "driver is too old"),
            (unexpected(123, "something new"), "Error 123: something new"),
            (
                torch.cuda.DeferredCudaCallError("CUDA call failed: Invalid device id\n\nFile …"),
                "Invalid device",
            ),
        ],
    )
    def test_an_error_of_the_initialisation_is_one_clause(
        self, system: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
    ):
        fail(monkeypatch, error)
        self.check(cuda_problem(0, system), reason)

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (at_first_use(46, "CUDA-capable device(s) is/are busy or unavailable"), "busy or unavailable"),
            (at_first_use(214, "uncorrectable ECC error encountered"), "reset or replace"),
            (at_first_use(209, "no kernel image is available for execution on the device"), "build of PyTorch"),
            (at_first_use(101, "invalid device ordinal"), "no GPU with this index"),
            (at_first_use(999, "unknown error"), "dmesg"),
            (at_first_use(802, "system not yet initialized"), "nvidia-fabricmanager"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), "no free memory"),
        ],
    )
    def test_an_error_of_the_first_use_is_one_clause(
        self, system: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
    ):
        fail(monkeypatch, error, first_use=True)
        self.check(cuda_problem(0, system), reason)

    @staticmethod
    def check(problem: str | None, reason: str) -> None:
        assert problem is not None
        assert reason in problem
        assert problem.startswith("CUDA cannot use the GPU: ")
        assert "\n" not in problem
        assert not problem.endswith(".")

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError(NO_DRIVER),
            RuntimeError("No CUDA GPUs are available"),
            AssertionError("Torch not compiled with CUDA enabled"),
            at_first_use(100, "no CUDA-capable device is detected"),
        ],
    )
    def test_a_machine_without_a_gpu_is_not_called_broken(
        self, system: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ):
        fail(monkeypatch, error)
        assert cuda_problem(0, system) == "this machine has no NVIDIA GPU"

    @pytest.mark.parametrize("is_built", [False, True])
    def test_a_gpu_without_what_it_needs_is_mentioned(
        self, system: Path, monkeypatch: pytest.MonkeyPatch, is_built: bool
    ):
        add_pci_device(system)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: is_built)
        fail(
            monkeypatch, RuntimeError(NO_DRIVER) if is_built else AssertionError("Torch not compiled with CUDA enabled")
        )
        problem = cuda_problem(0, system)
        assert problem is not None
        assert problem.startswith("CUDA cannot use the GPU of this machine: ")
        assert ("no NVIDIA driver" if is_built else "is a build without CUDA") in problem

    def test_a_hidden_gpu_names_the_variable(self, system: Path, monkeypatch: pytest.MonkeyPatch):
        add_pci_device(system)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        fail(monkeypatch, RuntimeError("No CUDA GPUs are available"))
        assert "CUDA_VISIBLE_DEVICES is '-1'" in (cuda_problem(0, system) or "")

    @pytest.mark.parametrize("error", [RuntimeError("No CUDA GPUs are available"), unexpected(304, "OS call failed")])
    def test_a_device_file_that_this_user_must_not_open_is_named(
        self, system: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ):
        add_device_files(system)
        closed, opened = system / "dev/nvidia-uvm", os.open

        def deny(path: Path, flags: int, *arguments: object, **keywords: object) -> int:
            if path == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, flags, *arguments, **keywords)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", deny)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        fail(monkeypatch, error)
        assert f"{closed} cannot be opened" in (cuda_problem(0, system) or "")

    def test_a_device_that_works_has_none(self, system: Path, monkeypatch: pytest.MonkeyPatch):
        ones = torch.ones
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch, "ones", lambda count, device: ones(count))
        assert cuda_problem(0, system) is None

    def test_a_lack_of_host_memory_is_not_blamed_on_the_gpu(self, system: Path, monkeypatch: pytest.MonkeyPatch):
        fail(monkeypatch, MemoryError())
        with pytest.raises(MemoryError):
            cuda_problem(0, system)


class TestPresence:
    def test_an_empty_machine_has_no_gpu(self, system: Path):
        assert not gpu_present(system)

    def test_device_files_show_a_gpu(self, system: Path):
        add_device_files(system)
        assert gpu_present(system)

    @pytest.mark.parametrize(
        ("vendor", "kind", "present"),
        [
            ("0x10de", "0x030000", True),
            ("0x10de", "0x030200", True),
            ("0x10de", "0x040300", False),  # the sound device of a graphics card
            ("0x1002", "0x030000", False),
        ],
    )
    def test_the_pci_bus_shows_a_gpu(self, system: Path, vendor: str, kind: str, present: bool):
        add_pci_device(system, vendor, kind)
        assert gpu_present(system) is present

    def test_nvml_shows_a_gpu_that_cuda_cannot_use(self, system: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert gpu_present(system)


class TestFindDevice:
    def test_the_cpu_is_available_without_initialising_cuda(self, system: Path, monkeypatch: pytest.MonkeyPatch):
        fail(monkeypatch, RuntimeError("CUDA was initialised"))
        assert find_device("cpu", system) == torch.device("cpu")

    @pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
    def test_a_gpu_that_works_is_returned_with_its_index(
        self, system: Path, monkeypatch: pytest.MonkeyPatch, name: str, index: int
    ):
        ones, used = torch.ones, []
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch, "ones", lambda count, device: used.append(device) or ones(count))
        assert find_device(name, system) == torch.device("cuda", index)
        assert used == [f"cuda:{index}"]

    def test_a_gpu_that_does_not_work_is_an_error(self, system: Path, monkeypatch: pytest.MonkeyPatch):
        fail(monkeypatch, RuntimeError("No CUDA GPUs are available"))
        with pytest.raises(
            ConfigError, match=r"^The device cuda:1 is not available: this machine has no NVIDIA GPU\.$"
        ):
            find_device("cuda:1", system)

    @pytest.mark.parametrize("name", ["", "GPU0", "cuda:", "cuda:x", "cuda:-1", "cuda:1000", "meta", "CPU"])
    def test_any_other_name_is_invalid(self, system: Path, name: str):
        with pytest.raises(ConfigError, match="is not a device"):
            find_device(name, system)


class TestDefaultDevice:
    @pytest.fixture
    def with_gpu(self, system: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        add_pci_device(system)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        fail(monkeypatch, unexpected(802, "system not yet initialized"))
        return system

    def test_without_a_gpu_it_is_the_cpu(self, system: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        assert default_device(system) == torch.device("cpu")

    def test_a_gpu_that_works_is_used(self, with_gpu: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch, "ones", lambda count, device: torch.zeros(count))
        assert default_device(with_gpu) == torch.device("cuda", 0)

    def test_a_gpu_that_cuda_cannot_use_is_an_error_with_a_way_around(self, with_gpu: Path):
        with pytest.raises(
            ConfigError, match=r"802.*\. To use the CPU instead, set CUDA_VISIBLE_DEVICES to an empty string\.$"
        ):
            default_device(with_gpu)

    @pytest.mark.parametrize("visible", ["", "-1"])
    def test_a_hidden_gpu_is_not_used(self, with_gpu: Path, visible: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert default_device(with_gpu) == torch.device("cpu")

    def test_a_build_of_pytorch_without_cuda_uses_the_cpu(self, with_gpu: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
        assert default_device(with_gpu) == torch.device("cpu")
