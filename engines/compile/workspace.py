"""Workspace of a build: a directory with the files and results of completed stages, so that it can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from engines.bundle import Bundle, sha256, writing
from engines.compile.planning.options import BuildOptions
from engines.compile.planning.paths import STATE, SUFFIX, workspace_path
from engines.errors import ConfigError
from engines.manifest import FileEntry, Manifest
from engines.pid.sampler import MODEL_TIMESTEPS

_FORMAT = 4
_OPTIONS = TypeAdapter(BuildOptions)

Result = TypeVar("Result", bound=BaseModel)


@dataclass
class Workspace:
    """A directory next to the future bundle, which may be resumed after an interruption or on another machine.

    Use `create` or `open`, while holding the lock on the output.
    """

    path: Path
    options: BuildOptions
    _results: dict[str, Any] = field(default_factory=dict)
    _files: dict[str, FileEntry] = field(default_factory=dict)  # of completed stages

    @classmethod
    def create(cls, options: BuildOptions) -> Workspace:
        """Create the workspace of a new build.

        Raises:
            ConfigError: The directory is in use, or holds an interrupted build that may not be overwritten.
            BundleError: The directory cannot be created.
        """
        path = workspace_path(options.output)
        if path.is_symlink() or path.exists():
            _check_replaceable(path, options)
            with writing(path):
                shutil.rmtree(path)
        workspace = cls(path, options)
        try:
            with writing(path):
                path.mkdir()
            workspace._save({}, {})
        except BaseException:
            workspace.remove()
            raise
        return workspace

    @classmethod
    def open(cls, path: Path) -> Workspace:
        """Open the workspace of an interrupted build. The bundle is written next to it, even if it was moved.

        Args:
            path: The directory, without symbolic links.

        Raises:
            ConfigError: The directory is not a valid workspace, or was created by an incompatible version.
        """
        try:
            state = json.loads((path / STATE).read_bytes())
            if state.get("format") != _FORMAT or tuple(state.get("times", ())) != MODEL_TIMESTEPS:
                raise ConfigError(f"{path} was created by an incompatible version of the builder; start a new build.")
            options = _OPTIONS.validate_python(state["options"])
            results = dict(state["results"])
            files = {name: FileEntry.model_validate(entry) for name, entry in state["files"].items()}
        except OSError as error:
            raise ConfigError(f"Cannot read {path / STATE}: {error.strerror}.") from error
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path / STATE} is damaged; start a new build.") from error
        return cls(path, replace(options, output=output_path(path)), results, files)

    def has(self, stage: str) -> bool:
        """Return whether a stage is complete."""
        return stage in self._results

    @property
    def started(self) -> bool:
        """Whether any stage is complete, so that the build is worth resuming."""
        return bool(self._results)

    def stage(self, name: str, kind: type[Result], run: Callable[[], Result], files: Sequence[str] = ()) -> Result:
        """Return the stored result of a stage, or run the stage and store its result.

        Args:
            name: Name of the stage.
            kind: Type of the result.
            run: Runs the stage; its files must be complete when it returns.
            files: Names of the files that the stage leaves, which later stages get with `bundle` or `file`.

        Raises:
            ConfigError: The stored result is invalid.
            BundleError: The result cannot be stored.
        """
        if name in self._results:
            try:
                return kind.model_validate(self._results[name])
            except ValidationError as error:
                message = f"{self.path / STATE} has no valid result for {name!r}; start a new build."
                raise ConfigError(message) from error
        result = run()
        entries = {file: _describe(self.path / file) for file in files}
        self._save({**self._results, name: result.model_dump(mode="json")}, {**self._files, **entries})
        return result

    def file(self, name: str) -> Path:
        """Return the path of a file after checking that it is what its stage has written.

        Raises:
            ConfigError: The file is missing, or it was modified or damaged.
        """
        path = self.path / name
        if name not in self._files or not path.is_file():
            raise ConfigError(f"The workspace {self.path} has no file {name}; copy it again, or start a new build.")
        if _describe(path) != self._files[name]:
            raise ConfigError(f"{path} was modified or damaged; copy it again, or start a new build.")
        return path

    def bundle(self, manifest: Manifest, files: Sequence[str]) -> Bundle:
        """Return the workspace as a bundle of only these files, after checking them.

        Raises:
            ConfigError: A file is missing, or it was modified or damaged.
        """
        entries = {self.file(name).name: self._files[name] for name in files}
        return Bundle(self.path, manifest.model_copy(update={"files": entries}))

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _save(self, results: dict[str, Any], files: dict[str, FileEntry]) -> None:
        """Replace the results and the files, on disk first."""
        state = {
            "format": _FORMAT,
            "times": MODEL_TIMESTEPS,
            "options": _OPTIONS.dump_python(self.options, mode="json"),
            "results": results,
            "files": {name: entry.model_dump() for name, entry in files.items()},
        }
        partial = self.path / f".{STATE}"
        try:
            with writing(self.path / STATE):
                partial.write_text(json.dumps(state, indent=1), encoding="utf-8")
                partial.replace(self.path / STATE)
        finally:
            partial.unlink(missing_ok=True)
        self._results, self._files = results, files


def output_path(workspace: Path) -> Path:
    """Return the path of the bundle that a workspace belongs to.

    Raises:
        ConfigError: The directory is not a workspace.
    """
    if not (workspace / STATE).is_file() or not workspace.name.endswith(SUFFIX):
        raise ConfigError(f"{workspace} is not an interrupted build; --resume needs a directory that ends in {SUFFIX}.")
    return workspace.with_name(workspace.name.removesuffix(SUFFIX))


def _check_replaceable(path: Path, options: BuildOptions) -> None:
    interrupted = (path / STATE).is_file()
    if path.is_symlink() or not path.is_dir() or (not interrupted and any(path.iterdir())):
        raise ConfigError(f"{path} contains something other than a build and will not be overwritten.")
    if interrupted and not options.overwrite:
        raise ConfigError(
            f"{path} contains an interrupted build. Continue it with --resume {path}, or start again with --overwrite."
        )


def _describe(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
