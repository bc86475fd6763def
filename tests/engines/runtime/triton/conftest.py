"""Runs the kernels on the GPU if there is one, otherwise in Triton's interpreter on the CPU.

The tests are the same. Test modules that import kernels must be in this directory, so that this module is imported
before them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

DIRECTORY = Path(__file__).parent

pytest.importorskip("triton", reason="needs Triton, which is installed on Linux only")

if torch.cuda.is_available():
    from engines.runtime.triton.architectures import architecture
    from engines.runtime.triton.assembler import use_correct_assembler

    found = architecture(torch.cuda.get_device_capability())
    if found is not None and (reason := use_correct_assembler(found)):
        raise RuntimeError(reason)
    MARKS = (pytest.mark.gpu, pytest.mark.computes)
else:
    import tests.engines.runtime.triton.interpreter  # noqa: F401

    MARKS = (pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == DIRECTORY:
            for mark in MARKS:
                item.add_marker(mark)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
