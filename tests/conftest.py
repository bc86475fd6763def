"""Settings and fixtures shared by all tests.

PyTorch uses one thread: on a small machine, waiting for a second thread costs more than it gains.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

import build_engines
from engines.runtime import devices
from tests.fakecuda.control import on_fake_device
from tests.tiny_text_encoder import write_tiny_text_encoder

BuildOnce = Callable[[str, Callable[[Path], None]], Path]

torch.set_num_threads(1)

# The shell ignores SIGINT in background jobs, and nohup ignores SIGHUP, but tests send both.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Compiled code, which is kept between runs.
os.environ.setdefault("PID_CACHE_DIR", str(Path(__file__).parent.parent / ".cache"))

os.environ["NO_PROXY"] = "*"  # the servers under test are on this machine

# No deadline: how long an example takes depends on the load of the machine, not on the code under test.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    fake, has_cuda = on_fake_device(), torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") is None:  # keywords also contain the name of the checkout
            continue
        if not has_cuda:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif fake and item.get_closest_marker("computes") is not None:
            item.add_marker(
                pytest.mark.skip(reason="asserts what kernels compute, which they do not on the fake device")
            )


@pytest.fixture
def unusable_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine with a GPU that CUDA cannot use; return the beginning of the message."""
    problem = "CUDA cannot use the GPU: it is busy"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(devices, "gpu_present", lambda system: True)
    monkeypatch.setattr(devices, "cuda_problem", lambda system: problem)
    return f"{problem}. "


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> BuildOnce:
    """Return a function that builds the content of a directory once per test session, for all pytest-xdist workers.

    `build_once(name, build)` returns a directory that `build(directory)` has filled. Do not modify it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # each worker has its own base directory

    def build_directory(name: str, build: Callable[[Path], None]) -> Path:
        directory, partial = shared / name, shared / f"{name}.partial"
        with FileLock(shared / f"{name}.lock"):
            if not directory.exists():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                build(partial)
                partial.rename(directory)
        return directory

    return build_directory


@pytest.fixture(scope="session")
def demo_bundle(build_once: BuildOnce) -> Path:
    """Bundle of the decoder that ships with the project, at its smallest size."""

    def build(directory: Path) -> None:
        arguments = ["--decoder", "dct-demo", "--target", "cpu", "--sizes", "256x256"]
        assert build_engines.main([*arguments, "--output", str(directory / "bundle")]) == 0

    return build_once("demo-bundle", build) / "bundle"


@pytest.fixture(scope="session")
def tiny_text_encoder(build_once: BuildOnce) -> Path:
    """Directory of a text encoder whose embeddings have the width of the bundled decoder."""
    return build_once("tiny-text-encoder", write_tiny_text_encoder)
