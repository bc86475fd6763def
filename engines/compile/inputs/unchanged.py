"""Detects that a file changes while it is being read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from engines.bundle import sha256
from engines.compile.inputs.calibrate import calibration_files
from engines.compile.planning.plan import BuildPlan
from engines.errors import ConfigError


def input_files(plan: BuildPlan) -> list[Path]:
    """List all files that a build reads."""
    options = plan.options
    files = [path for path in (plan.checkpoint, options.empty_caption) if path is not None]
    return files if options.calibration is None else [*files, *calibration_files(options.calibration)]


@contextlib.contextmanager
def unchanged(paths: Iterable[Path]) -> Iterator[None]:
    """Compare the hashes of files before and after the block.

    Raises:
        ConfigError: A file cannot be read, or it has changed.
    """
    before = {path: _hash(path) for path in paths}
    yield
    for path, digest in before.items():
        if _hash(path) != digest:
            raise ConfigError(f"{path} changed during the build; start the build again.")


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
