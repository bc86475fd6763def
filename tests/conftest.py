"""One intra-op thread: tests share small machines, where waiting for a second thread costs more than it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import build_engines

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled decoder as its users build it, at its smallest size."""
    output = tmp_path_factory.mktemp("bundles") / "demo"
    arguments = ["--decoder", "dct-demo", "--target", "cpu", "--sizes", "256x256", "--output", str(output)]
    assert build_engines.main(arguments) == 0
    return output
