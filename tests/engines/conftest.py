"""Fixtures shared by the tests of the engines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

BuildOnce = Callable[[str, Callable[[Path], None]], Path]


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
