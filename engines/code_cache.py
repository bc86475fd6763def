"""Directory in which compiled code is kept between starts; one for all compilers of a process.

Its layout is `uid-<user>/pid-<version>-torch-<version>/{inductor,triton,numba,tmp}`, `uid-<user>/tensorrt-rtx` and
`uid-<user>/cuda`. Compiled code is executed when it is loaded, so only this user may be able to write to it.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engines import __version__
from engines.errors import ConfigError
from engines.private_directories import REQUIRED_BYTES, open_private, open_temporary, temporary_parents

log = logging.getLogger(__name__)

VARIABLE = "PID_CACHE_DIR"  # also the server's flag --cache-dir
_VERSIONED = f"pid-{__version__}-torch-{torch.__version__}"
_UNUSED_DAYS = 90
_NOT_KEPT = "compiled code is not kept, so every start compiles it again"
_lock = threading.RLock()
_chosen: CodeCache | None = None


@dataclass(frozen=True)
class CodeCache:
    """Directory of compiled code.

    Attributes:
        directory: A private directory; None if no directory is usable.
        reason: Why `directory` is None; otherwise empty.
        substitutes: Directories in which a temporary one may replace `directory`. `provide_temporary_files` makes the
            environment select one in `directory`, so these are determined before.
    """

    directory: Path | None
    reason: str = ""
    substitutes: tuple[Path, ...] = field(default_factory=lambda: tuple(temporary_parents()))

    def folder(self, name: str) -> Path | None:
        """Return a directory for code that depends on nothing else; None if `directory` is None. Raises OSError."""
        if self.directory is None:
            return None
        path = self.directory / name
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def versioned_folder(self, name: str) -> Path | None:
        """Return a directory for code of this version of the project and of PyTorch, otherwise like `folder`."""
        self.folder(_VERSIONED)
        return self.folder(f"{_VERSIONED}/{name}")

    def environment(self) -> Mapping[str, str]:
        """Return the variables that make PyTorch, Triton, numba and CUDA use this directory."""
        if self.directory is None:
            return {}
        versioned = self.directory / _VERSIONED
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(versioned / "inductor"),
            "TRITON_CACHE_DIR": str(versioned / "triton"),
            "NUMBA_CACHE_DIR": str(versioned / "numba"),
            "CUDA_CACHE_PATH": str(self.directory / "cuda"),
        }

    def require(self) -> Path:
        """Return the directory.

        Raises:
            ConfigError: `directory` is None.
        """
        if self.directory is None:
            raise ConfigError(
                f"PyTorch cannot compile without a writable directory; mount a volume, and set --cache-dir (or "
                f"{VARIABLE}) to it. Not usable are {self.reason}."
            )
        return self.directory


def choose_code_cache(directory: Path | None = None) -> CodeCache:
    """Choose the directory for the code that this process compiles, and set the variables of the compilers.

    If `directory` is not usable, a temporary one is used instead, with a warning. Call it before CUDA is initialised.

    Args:
        directory: By default PID_CACHE_DIR, else `pid-server` in the user's cache directory.
    """
    global _chosen
    with _lock:
        cache = _open(directory)
        previous = _chosen.environment() if _chosen else {}
        ignored = [
            name
            for name, value in cache.environment().items()
            if os.environ.get(name, value) not in (value, previous.get(name))
        ]
        if ignored:
            log.warning("--cache-dir (or %s) sets the directory; ignored: %s", VARIABLE, ", ".join(ignored))
        os.environ.update(cache.environment())
        _chosen = cache
        return cache


def code_cache() -> CodeCache:
    """Return the directory that `choose_code_cache` has chosen; if it has not been called, the default one."""
    with _lock:
        return _chosen or choose_code_cache()


def use_temporary_directory(reason: str = "") -> None:
    """Use a temporary directory for the rest of this process.

    Args:
        reason: Why code cannot be kept, for a warning; empty if only this process cannot use the directory.

    Raises:
        ConfigError: No directory for temporary files is usable.
    """
    global _chosen
    with _lock:
        if reason:
            log.warning("%s: %s; %s", _NOT_KEPT, reason, _remedy())
        substitutes = code_cache().substitutes
        try:
            _chosen = CodeCache(open_temporary(substitutes), substitutes=substitutes)
        except OSError as error:
            _chosen = CodeCache(None, str(error), substitutes)
        _chosen.require()
        os.environ.update(_chosen.environment())


def provide_temporary_files() -> None:
    """Keep temporary files of this process and of the compilers that it starts in the directory of compiled code.

    PyTorch precompiles headers in `torchinductor_USER` in the directory for temporary files, where another user could
    have put some, and fails if the user has no name.

    Raises:
        ConfigError: No directory for compiled code is usable.
    """
    code_cache().require()
    tempfile.tempdir = os.environ["TMPDIR"] = str(code_cache().versioned_folder("tmp"))
    try:
        getpass.getuser()
    except (KeyError, OSError):  # as of Python 3.13, OSError
        os.environ["LOGNAME"] = f"uid-{os.geteuid()}"


def default_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return PID_CACHE_DIR, else `pid-server` in XDG_CACHE_HOME, else in `~/.cache`.

    Raises:
        OSError: No variable is set, and the user has no home directory.
    """
    if directory := environment.get(VARIABLE, "").strip():
        return Path(directory)
    if (cache := environment.get("XDG_CACHE_HOME", "")) and os.path.isabs(cache):
        return Path(cache, "pid-server")
    try:
        return Path.home() / ".cache" / "pid-server"
    except RuntimeError:
        raise OSError(f"uid {os.getuid()} has no home directory") from None


def _open(directory: Path | None) -> CodeCache:
    try:
        cache = CodeCache(open_private(default_directory() if directory is None else directory))
        _prepare(cache)
        return cache
    except OSError as error:
        return _open_temporary(str(error))


def _prepare(cache: CodeCache) -> None:
    """Create directories, mark those of this version as used, and delete old ones. Raises OSError."""
    cache.folder("cuda")  # the driver may not create it
    versioned = cache.folder(_VERSIONED)
    if cache.directory is not None and versioned is not None:
        os.utime(versioned)
        _delete_unused(cache.directory)


def _open_temporary(reason: str) -> CodeCache:
    try:
        private = open_temporary(temporary_parents())
    except OSError as error:
        log.warning("%s: %s; %s", _NOT_KEPT, reason, _remedy())
        return CodeCache(None, f"{reason}; {error}")
    log.warning("%s: %s; %s. Until it exits, this process uses %s", _NOT_KEPT, reason, _remedy(), private)
    return CodeCache(private)


def _remedy() -> str:
    return (
        f"set --cache-dir (or {VARIABLE}) to a directory that only uid {os.geteuid()} can write to, "
        f"with at least {REQUIRED_BYTES // 2**20} MiB free"
    )


def _delete_unused(private: Path) -> None:
    """Delete the code of versions and bundles that have not been used for _UNUSED_DAYS. CUDA limits its own cache."""
    limit = time.time() - _UNUSED_DAYS * 86400
    for path in (*private.glob("pid-*"), *private.glob("pid-*/tmp/*"), *private.glob("tensorrt-rtx/*")):
        with contextlib.suppress(OSError):  # another process may delete it at the same time
            if path.stat().st_mtime < limit:
                log.info("deleting %s, which was not used for %d days", path, _UNUSED_DAYS)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
