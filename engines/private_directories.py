"""Directories that only this user can write to, for files whose content is trusted."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

REQUIRED_BYTES = 32 * 2**20  # free space that a directory must have to be worth using
_TEMPORARY_PREFIX = "pid-compiled-"
_temporary: dict[Path, int] = {}  # with the process that created it
_YOUNG_SECONDS = 60.0  # a new temporary directory may not be locked yet


def open_private(parent: Path) -> Path:
    """Return the directory of `create_private`, for code: files in it can be written and executed.

    Raises:
        OSError: As for `create_private`, or the directory cannot be written, is full or does not allow to execute
            files. The message begins with the path.
    """
    path = create_private(parent)
    with _reasons(path):
        _check_usable(path)
    return path


def create_private(parent: Path) -> Path:
    """Return a directory in `parent` that belongs to this user only; create it and `parent` if they are missing.

    Its name contains the user id, so that several users can share `parent`. `parent` and the directories above it must
    not let others replace it: they belong to this user or to root, and others can write to them only if they are
    sticky. A mount point is accepted as it is, because only root mounts volumes, and those of containers often belong
    to nobody and are open to everybody. An existing directory may be read-only.

    Raises:
        OSError: The directory cannot be created, or others can write to it. The message begins with the path.
    """
    with _reasons(parent):
        parent.mkdir(parents=True, exist_ok=True)
        parent = parent.resolve()
        _check_ancestors(parent)
        path = parent / f"uid-{os.geteuid()}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    with _reasons(path):
        _check_private(path)
    return path


def open_temporary(parents: Iterable[Path]) -> Path:
    """Create a private directory in the first of `parents` that is usable, and delete it when the process exits.

    Directories that earlier processes could not delete, because they were killed, are deleted too.

    Raises:
        OSError: None is usable; the message gives the reason for each.
    """
    reasons = []
    parents = tuple(parents)
    for parent in parents:
        _delete_abandoned(parent)
    for parent in parents:
        try:
            return _create_temporary(parent)
        except OSError as error:
            reasons.append(str(error))
    raise OSError("; ".join(reasons))


def delete_temporary() -> None:
    """Delete the directories of `open_temporary`. Needed only before `os._exit`, which runs no exit handlers."""
    for path, owner in _temporary.items():
        if os.getpid() == owner:  # not in a child process that was forked
            shutil.rmtree(path, ignore_errors=True)


def temporary_parents() -> list[Path]:
    """Return the directories for temporary files, the one that the environment selects first."""
    selected = [Path(value) for name in ("TMPDIR", "TEMP", "TMP") if (value := os.environ.get(name))]
    return list(dict.fromkeys([*selected, Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")]))  # noqa: S108


def _create_temporary(parent: Path) -> Path:
    with _reasons(parent):
        parent = parent.resolve(strict=True)
        _check_ancestors(parent)
        path = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=parent))
        try:
            _check_usable(path)
            fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)  # held until the process ends
        except OSError:
            path.rmdir()
            raise
    if not _temporary:
        atexit.register(delete_temporary)
    _temporary[path] = os.getpid()
    return path


def _delete_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):  # locked by a running process, or being deleted
            status = path.lstat()
            if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _YOUNG_SECONDS:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _check_ancestors(path: Path) -> None:
    for folder in (path, *path.parents):
        if os.path.ismount(folder):
            return
        status = folder.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise OSError(f"{folder} belongs to uid {status.st_uid}, who could replace files below it")
        if _others_can_write(status) and not status.st_mode & stat.S_ISVTX:
            raise OSError(f"other users can write to {folder}")


def _check_private(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if status.st_uid != os.geteuid():
        raise OSError(f"it belongs to uid {status.st_uid}, but this process runs as uid {os.geteuid()}")
    if _others_can_write(status):
        raise OSError("other users can write to it; delete it")


def _others_can_write(status: os.stat_result) -> bool:
    # Kubernetes makes volumes writable for the group in `fsGroup`, which is the process's own.
    shared_group = status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid()
    return bool(status.st_mode & stat.S_IWOTH or shared_group)


def _check_usable(path: Path) -> None:
    """Check that files in `path` can be written, of at least REQUIRED_BYTES, and executed. Raises OSError."""
    with tempfile.TemporaryFile(dir=path) as file:
        os.posix_fallocate(file.fileno(), 0, REQUIRED_BYTES)
        try:
            mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
        except OSError as error:
            raise OSError("files in it cannot be executed; it may be mounted with noexec") from error


@contextlib.contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """Rewrite the messages of errors as "path: reason"."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"less than {REQUIRED_BYTES // 2**20} MiB are free"
        raise OSError(f"{path}: {reason}") from error
