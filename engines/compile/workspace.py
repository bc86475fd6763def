"""Workspace of a build: a directory with the files and results of completed stages, so that it can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from engines.bundle import Bundle
from engines.compile.planning.options import BuildOptions
from engines.errors import BundleError, ConfigError
from engines.pid.sampler import MODEL_TIMESTEPS

SUFFIX = ".build"
_STATE = "build.json"
_FORMAT = 1
_OPTIONS = TypeAdapter(BuildOptions)

Result = TypeVar("Result", bound=BaseModel)


class UnfinishedBundle(Bundle):
    """The workspace as a bundle, whose manifest has no table of files yet; the files are neither hashed nor checked."""

    def file(self, name: str) -> Path:
        """Return the path of a file that a stage has written.

        Raises:
            BundleError: There is no such file.
        """
        path = self.path / name
        if not path.is_file():
            raise BundleError(f"The workspace {self.path} has no file {name}.")
        return path


def workspace_path(output: Path) -> Path:
    """Return the path of the workspace for a bundle: next to it, with the suffix .build."""
    output = output.resolve()
    return output.with_name(output.name + SUFFIX)


class Workspace:
    """A directory next to the future bundle, which may be resumed after an interruption or on another machine."""

    def __init__(self, path: Path, options: BuildOptions, results: dict[str, Any]) -> None:
        """Use `create` or `open` instead."""
        self.path, self.options, self._results = path, options, results

    @classmethod
    def create(cls, options: BuildOptions) -> Workspace:
        """Create the workspace of a new build.

        Raises:
            ConfigError: The directory is in use, or holds an interrupted build that may not be overwritten.
            BundleError: The directory cannot be created.
        """
        path = workspace_path(options.output)
        if path.exists():
            if not (path / _STATE).is_file() and any(path.iterdir()):
                raise ConfigError(f"{path} contains something other than a build and will not be overwritten.")
            if not options.overwrite and (path / _STATE).is_file():
                raise ConfigError(
                    f"{path} contains an interrupted build. Continue it with --resume {path}, or start again with "
                    "--overwrite."
                )
            shutil.rmtree(path)
        workspace = cls(path, options, {})
        try:
            path.mkdir(parents=True)
            workspace._save()
        except OSError as error:
            raise BundleError(f"Cannot create the directory {path}: {error.strerror}.") from error
        return workspace

    @classmethod
    def open(cls, path: Path) -> Workspace:
        """Open the workspace of an interrupted build. The bundle is written next to it, even if it was moved.

        Raises:
            ConfigError: The directory is not a valid workspace, or was created by an incompatible version.
        """
        path = path.resolve()
        if not (path / _STATE).is_file() or not path.name.endswith(SUFFIX):
            raise ConfigError(f"{path} is not an interrupted build; --resume needs a directory that ends in {SUFFIX}.")
        try:
            state = json.loads((path / _STATE).read_bytes())
            if state.get("format") != _FORMAT or tuple(state.get("times", ())) != MODEL_TIMESTEPS:
                raise ConfigError(f"{path} was created by an incompatible version of the builder; start a new build.")
            options = _OPTIONS.validate_python(state["options"])
            results = dict(state["results"])
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ConfigError(f"Cannot read {path / _STATE}: {error}.") from error
        output = path.with_name(path.name.removesuffix(SUFFIX))
        return cls(path, replace(options, output=output), results)

    def has(self, stage: str) -> bool:
        """Return whether a stage is complete."""
        return stage in self._results

    @property
    def started(self) -> bool:
        """Whether any stage is complete, so that the build is worth resuming."""
        return bool(self._results)

    def stage(self, name: str, kind: type[Result], run: Callable[[], Result]) -> Result:
        """Return the stored result of a stage, or run the stage and store its result.

        Args:
            name: Name of the stage.
            kind: Type of the result.
            run: Runs the stage; its files must be complete when it returns.

        Raises:
            ConfigError: The stored result is invalid.
        """
        if name in self._results:
            try:
                return kind.model_validate(self._results[name])
            except ValidationError as error:
                message = f"{self.path / _STATE} has no valid result for {name!r}; start a new build."
                raise ConfigError(message) from error
        result = run()
        self._results[name] = result.model_dump(mode="json")
        self._save()
        return result

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _save(self) -> None:
        state = {
            "format": _FORMAT,
            "times": MODEL_TIMESTEPS,
            "options": _OPTIONS.dump_python(self.options, mode="json"),
            "results": self._results,
        }
        partial = self.path / f".{_STATE}"
        partial.write_text(json.dumps(state, indent=1), encoding="utf-8")
        partial.replace(self.path / _STATE)
