"""Decorator that compiles the inner loops of this package with numba, and the cache of their machine code."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

from engines.code_cache import code_cache

log = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_damaged: list[Path] = []
_unsaved: dict[str, str] = {}  # reason, by kernel


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` at its first call, to run without the GIL; cache the machine code on disk if possible.

    Kernels that call each other belong in one file, because cached code is discarded only if the caller's own file
    changes.
    """
    compiled: Callable[..., Any] = numba.njit(nogil=True, error_model="numpy")(function)
    compiled._cache = _KernelCache(function)  # type: ignore[attr-defined]  # as cache=True does
    return compiled


def warn_about_cache() -> None:
    """Log a warning, once, about kernels that were damaged in the cache, and about those that could not be cached."""
    if _damaged:
        log.warning("%d damaged kernels in %s were compiled again", len(_damaged), _damaged[0].parent)
    if _unsaved:
        log.warning(
            "kernels cannot be cached, so they are compiled at every start; free some space, or set --cache-dir to "
            "another directory: %s",
            next(iter(_unsaved.values())),
        )
    _damaged.clear()
    _unsaved.clear()


class _KernelCache(FunctionCache):
    """Numba's cache of one function, with files that are checked when they are read and errors that are not fatal.

    It is opened at the first call of the function, because the directory is not known when the module is imported.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._name, self._cache_path = function, repr(function), ""
        self._opened = False
        self.disable()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled code for a signature; None if it is not cached."""
        if not self._opened:
            self._opened = True
            self._open()
        return super().load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save the machine code of a signature, if the directory is writable and has space."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _unsaved[self._name] = str(error)

    def _open(self) -> None:
        try:
            folder = code_cache().versioned_folder("numba")
            if folder is None:
                return  # already logged
            numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
            super().__init__(self._function)
        except (OSError, RuntimeError) as error:  # RuntimeError: numba cannot write to the directory
            _unsaved[self._name] = str(error)
            return
        locator = self._impl.locator
        self._cache_file = _CheckedFiles(Path(self.cache_path), self._impl.filename_base, locator.get_source_stamp())


class _CheckedFiles:
    """One file per compiled signature of a function, which begins with the SHA-256 of the rest.

    Numba's own files have no checksum: after a power loss they may be truncated, and altered machine code would run.
    """

    def __init__(self, folder: Path, stem: str, source_stamp: Any) -> None:
        self._folder, self._stem, self._stamp = folder, stem, (numba.__version__, source_stamp)

    def load(self, key: Any) -> Any:
        """Return what was saved under `key`; None if there is nothing, or it is damaged or out of date."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            content = b""
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            _damaged.append(path)
            return None
        stamp, saved = pickle.loads(data)  # noqa: S301  written by this class
        return pickle.loads(saved) if stamp == self._stamp else None  # noqa: S301

    def save(self, key: Any, saved: Any) -> None:
        """Save `saved` under `key`. Raises OSError."""
        path, data = self._path(key), pickle.dumps((self._stamp, dumps(saved)))
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            partial.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    def _path(self, key: Any) -> Path:
        return self._folder / f"{self._stem}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbi"
