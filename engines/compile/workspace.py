"""The folder of a build under way: what its stages made and found out, so that it can go on later or elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from engines.compile.options import BuildOptions
from engines.errors import BundleError, ConfigError
from engines.pid.sampler import MODEL_TIMESTEPS

SUFFIX = ".build"
_STATE = "build.json"
_FORMAT = 1
_OPTIONS = TypeAdapter(BuildOptions)

Result = TypeVar("Result", bound=BaseModel)


def workspace_of(output: Path) -> Path:
    output = output.resolve()
    return output.with_name(output.name + SUFFIX)


class Workspace:
    """A folder beside the bundle to be, named after it. Each stage runs once; its result outlives the process."""

    def __init__(self, path: Path, options: BuildOptions, results: dict[str, Any]) -> None:
        self.path, self.options, self._results = path, options, results

    @classmethod
    def create(cls, options: BuildOptions) -> Workspace:
        """For a new build. Raises ConfigError where an earlier one was left, unless it may be overwritten."""
        path = workspace_of(options.output)
        if path.exists():
            if not (path / _STATE).is_file() and any(path.iterdir()):
                raise ConfigError(f"{path} holds something other than a build; it will not be overwritten.")
            if not options.overwrite and (path / _STATE).is_file():
                raise ConfigError(
                    f"{path} holds a build that was not finished: go on with --resume {path}, or start again with "
                    "--overwrite."
                )
            shutil.rmtree(path)
        workspace = cls(path, options, {})
        try:
            path.mkdir(parents=True)
            workspace._save()
        except OSError as error:
            raise BundleError(f"The folder {path} cannot be made: {error.strerror}.") from error
        return workspace

    @classmethod
    def open(cls, path: Path) -> Workspace:
        """One that was left. The bundle goes beside it, wherever it lies now. Raises ConfigError."""
        path = path.resolve()
        if not (path / _STATE).is_file() or not path.name.endswith(SUFFIX):
            raise ConfigError(f"{path} is not the folder of an unfinished build; those end in {SUFFIX}.")
        try:
            state = json.loads((path / _STATE).read_bytes())
            if state.get("format") != _FORMAT or tuple(state.get("times", ())) != MODEL_TIMESTEPS:
                raise ConfigError(f"{path} was begun by another version of the builder; build anew.")
            options = _OPTIONS.validate_python(state["options"])
            results = dict(state["results"])
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ConfigError(f"{path / _STATE} cannot be read: {error}.") from error
        output = path.with_name(path.name.removesuffix(SUFFIX))
        return cls(path, replace(options, output=output), results)

    def has(self, stage: str) -> bool:
        return stage in self._results

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on from."""
        return bool(self._results)

    def stage(self, name: str, kind: type[Result], run: Callable[[], Result]) -> Result:
        """The result of a stage: kept from before, or made now by `run`, whose files are complete when it returns."""
        if name in self._results:
            try:
                return kind.model_validate(self._results[name])
            except ValidationError as error:
                raise ConfigError(f"{self.path / _STATE} has no valid result for {name}; build anew.") from error
        result = run()
        self._results[name] = result.model_dump(mode="json")
        self._save()
        return result

    def remove(self) -> None:
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
