"""Checks of the paths that a build reads and writes: no input may be inside the output, or the other way round."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from engines.bundle import is_bundle
from engines.compile.planning.options import BuildOptions
from engines.errors import ConfigError
from engines.pid.checkpoint import check_distilled_name

SUFFIX = ".build"  # of workspaces
STATE = "build.json"  # file of a workspace with its options and results
_LONGEST_NAME = 200  # bytes; file systems support 255, and temporary names have prefix and suffix


def workspace_path(output: Path) -> Path:
    """Return the path of the workspace for a bundle: next to it, with the suffix .build."""
    return output.with_name(output.name + SUFFIX)


def check_inputs(options: BuildOptions, checkpoint: Path | None) -> None:
    """Check that the files to read exist and are readable, and that the checkpoint is not named as an undistilled one.

    Raises:
        ConfigError: A file does not exist or cannot be read.
        CheckpointError: The checkpoint is undistilled according to its path.
    """
    for path, name, is_kind in (
        (checkpoint, "checkpoint", Path.is_file),
        (options.empty_caption, "empty caption", Path.is_file),
        (options.calibration, "calibration directory", Path.is_dir),
    ):
        if path is None:
            continue
        try:
            exists = is_kind(path)
        except OSError as error:
            raise ConfigError(f"The {name} {path} cannot be read: {error.strerror}.") from error
        if not exists:
            raise ConfigError(f"The {name} {path} does not exist.")
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            raise ConfigError(f"The {name} {path} cannot be read: Permission denied.")
    if checkpoint is not None:
        check_distilled_name(checkpoint)


def check_output_path(options: BuildOptions, checkpoint: Path | None) -> None:
    """Check that writing the output deletes no input and no part of another bundle or build.

    Raises:
        ConfigError: The output overlaps with an input, a bundle or a workspace, or its name is not possible.
    """
    output = options.output
    if output.name.endswith(SUFFIX):
        raise ConfigError(f"The name of --output may not end in {SUFFIX}, as those of interrupted builds do.")
    if len(os.fsencode(output.name)) > _LONGEST_NAME:
        raise ConfigError(f"The name of --output is too long; use at most {_LONGEST_NAME} bytes.")
    for parent in output.parents:
        if is_bundle(parent) or (parent.name.endswith(SUFFIX) and (parent / STATE).is_file()):
            raise ConfigError(
                f"{output} is inside {parent}, a bundle or an interrupted build; choose another --output."
            )
    replaced = (output, workspace_path(output))
    for name, path in _inputs(options, checkpoint):
        if any(folder in (path, *path.parents) for folder in replaced):
            raise ConfigError(f"{name} {path} is inside --output {output}, which is replaced; move one of them.")
        if path in output.parents and path.is_dir():
            raise ConfigError(f"--output {output} is inside {name} {path}; choose another path.")


def _inputs(options: BuildOptions, checkpoint: Path | None) -> Iterator[tuple[str, Path]]:
    paths = {"--checkpoint": checkpoint, "--empty-caption": options.empty_caption, "--calibration": options.calibration}
    return ((name, path.resolve()) for name, path in paths.items() if path is not None)
