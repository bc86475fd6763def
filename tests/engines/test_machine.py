"""Properties of the machine: the version of the driver, with and without NVML."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from engines import machine

KERNEL_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC\n"


def fail(code: int) -> None:
    raise pynvml.NVMLError(code)


@pytest.fixture
def kernel_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "version"
    file.write_text(KERNEL_MODULE)
    monkeypatch.setattr(machine, "_KERNEL_MODULE", file)
    return file


def test_the_driver_version_is_that_of_nvml(kernel_module: Path, monkeypatch: pytest.MonkeyPatch):
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: "580.1")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert machine.driver_version() == "580.1"


@pytest.mark.parametrize(
    "nvml",
    [
        None,  # not installed
        SimpleNamespace(nvmlInit=lambda: fail(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)),
        SimpleNamespace(nvmlInit=lambda: fail(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)),
    ],
)
def test_without_nvml_it_is_that_of_the_kernel_module(
    kernel_module: Path, monkeypatch: pytest.MonkeyPatch, nvml: object
):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert machine.driver_version() == "580.95.05"


@pytest.mark.parametrize("content", [None, b"", b"unknown format", b"\xff\xfe"])
def test_it_is_unknown_if_neither_states_it(
    kernel_module: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    if content is None:
        kernel_module.unlink()
    else:
        kernel_module.write_bytes(content)
    assert machine.driver_version() is None
