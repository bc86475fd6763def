"""Which devices the kernels of this project run on."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from engines.runtime.kernels.workload import Unavailable, own_kernels

CUDA = torch.device("cuda", 0)
ASSEMBLER = "engines.runtime.triton.assembler"


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is installed, on every system, with an assembler that can be used."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, ASSEMBLER, SimpleNamespace(use_correct_assembler=lambda architecture: None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((9, 0), "sm_90"), ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((12, 0), "sm_120"), ((12, 1), "sm_120")],
)
def test_a_device_uses_the_tiles_of_its_architecture(
    capability: tuple[int, int], architecture: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert own_kernels(CUDA, torch.bfloat16) == architecture


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (13, 0)])
def test_other_devices_use_the_kernels_of_pytorch(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    major, minor = capability
    reason = f"there are no others for compute capability {major}.{minor}"
    assert own_kernels(CUDA, torch.bfloat16) == Unavailable(reason)


def test_hopper_needs_an_assembler_that_compiles_the_kernels_correctly(monkeypatch: pytest.MonkeyPatch):
    reasons = {"sm_90": "it is too old"}
    old = SimpleNamespace(use_correct_assembler=reasons.get)
    monkeypatch.setitem(sys.modules, ASSEMBLER, old)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert own_kernels(CUDA, torch.bfloat16) == Unavailable("it is too old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert own_kernels(CUDA, torch.bfloat16) == "sm_100"


def test_float32_and_a_missing_triton_are_reasons_too(monkeypatch: pytest.MonkeyPatch):
    assert own_kernels(CUDA, torch.float32) == Unavailable("the others are for networks in 16 bits and FP8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert own_kernels(CUDA, torch.float16) == Unavailable("the package triton is not installed")
