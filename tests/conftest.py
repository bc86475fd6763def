"""Settings and fixtures shared by all tests.

PyTorch uses one thread: on a small machine, waiting for a second thread costs more than it gains.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

import build_engines

torch.set_num_threads(1)

# Examples are slow on a loaded machine; how long one takes says nothing about the code under test.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of the decoder that ships with the project, at its smallest size; built once per run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # shared by the workers of this run
    output = folder / "demo-bundle"
    with FileLock(folder / "demo-bundle.lock"):
        if not output.exists():
            arguments = ["--decoder", "dct-demo", "--target", "cpu", "--sizes", "256x256", "--output", str(output)]
            assert build_engines.main(arguments) == 0
    return output
