"""Which of Triton's two assemblers is used for Hopper."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from engines.runtime.triton import assembler
from engines.runtime.triton.assembler import use_correct_assembler

BUNDLED = "/triton/ptxas"
BLACKWELL = "/triton/ptxas-blackwell"
VARIABLE = "TRITON_PTXAS_PATH"


class Tools:
    """As triton.knobs.nvidia: reads the environment variable whenever the assembler is used."""

    def __init__(self, versions: dict[str, str]) -> None:
        self._versions = versions

    @property
    def ptxas(self) -> SimpleNamespace:
        return self._tool(os.environ.get(VARIABLE, BUNDLED))

    @property
    def ptxas_blackwell(self) -> SimpleNamespace:
        return self._tool(BLACKWELL)

    def _tool(self, path: str) -> SimpleNamespace:
        return SimpleNamespace(path=path, version=self._versions[path])


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # restored afterwards
    monkeypatch.delenv(VARIABLE)


def use(monkeypatch: pytest.MonkeyPatch, bundled: str, blackwell: str, cuda: str | None, **others: str) -> str | None:
    versions = {BUNDLED: bundled, BLACKWELL: blackwell, **{f"/{name}": text for name, text in others.items()}}
    monkeypatch.setattr(assembler, "knobs", SimpleNamespace(nvidia=Tools(versions)))
    monkeypatch.setattr(assembler, "driver_cuda", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    return use_correct_assembler("sm_90")


@pytest.mark.parametrize(("blackwell", "cuda"), [("12.9", "13.0"), ("12.9", "12.8"), ("13.1", "13.0"), ("13.1", None)])
def test_the_newer_one_replaces_one_that_miscompiles(blackwell: str, cuda: str | None, monkeypatch: pytest.MonkeyPatch):
    assert use(monkeypatch, "12.8", blackwell, cuda) is None
    assert os.environ[VARIABLE] == BLACKWELL


def test_other_architectures_use_the_assembler_of_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assembler, "knobs", SimpleNamespace(nvidia=Tools({BUNDLED: "12.8", BLACKWELL: "12.9"})))
    assert use_correct_assembler("sm_100") is None
    assert VARIABLE not in os.environ


def test_a_correct_one_is_kept(monkeypatch: pytest.MonkeyPatch):
    assert use(monkeypatch, "12.9", "13.1", "13.0") is None
    assert VARIABLE not in os.environ


def test_the_driver_may_support_a_newer_cuda_than_pytorch(monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, "12.8", "13.1", "12.9")
    monkeypatch.setattr(assembler, "driver_cuda", lambda: 13)
    assert use_correct_assembler("sm_90") is None
    assert os.environ[VARIABLE] == BLACKWELL


def test_code_that_the_driver_may_not_load_is_not_made(monkeypatch: pytest.MonkeyPatch):
    """PyTorch for CUDA 12 needs no driver that loads code of CUDA 13."""
    reason = use(monkeypatch, "12.8", "13.1", "12.9")
    assert reason == (
        "ptxas 12.8 at /triton/ptxas miscompiles the others; "
        "set TRITON_PTXAS_PATH to a version from 12.9 to the CUDA version of the driver"
    )
    assert VARIABLE not in os.environ


@pytest.mark.parametrize(("version", "usable"), [("12.8", False), ("12.10", True), ("13.0", True)])
def test_the_choice_of_the_operator_is_kept(version: str, usable: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "/mine")
    assert (use(monkeypatch, "12.8", "13.1", "13.0", mine=version) is None) == usable
    assert os.environ[VARIABLE] == "/mine"


def test_an_empty_path_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "")
    assert use(monkeypatch, "12.8", "12.9", "13.0") is None
    assert os.environ[VARIABLE] == BLACKWELL


def test_a_newer_one_is_not_needed_if_the_other_is_correct(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tools, "ptxas_blackwell", None)
    assert use(monkeypatch, "13.0", "13.1", "13.0") is None


@pytest.mark.parametrize(
    "error", [RuntimeError("Cannot find ptxas"), PermissionError(13, "Permission denied"), AttributeError("ptxas")]
)
def test_a_triton_without_assemblers_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def raises(self: Tools) -> None:
        raise error

    monkeypatch.setattr(Tools, "ptxas", property(raises))
    assert use(monkeypatch, "12.8", "13.1", "13.0") == f"Triton has no assembler for NVIDIA GPUs ({error})"


def test_the_installed_version_of_triton_has_an_assembler_that_can_be_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assembler, "driver_cuda", lambda: 13)
    assert use_correct_assembler("sm_90") is None
