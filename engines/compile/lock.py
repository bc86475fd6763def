"""Lock on the output of a build, so that two builds never write the same workspace or bundle."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from engines.errors import ConfigError


@contextlib.contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Hold the lock on an output path, `.<name>.lock` next to it, and create missing parent directories.

    The kernel releases the lock when the process ends, however it ends, so no lock is ever stale.

    Args:
        output: Path of the bundle, without symbolic links.

    Raises:
        ConfigError: Another build holds the lock, or the file cannot be created.
    """
    path = output.with_name(f".{output.name}.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except BlockingIOError:
        raise ConfigError(
            f"Another build with the output {output} is running; wait until it ends, or choose another --output."
        ) from None
    except OSError as error:
        raise ConfigError(f"Cannot create the lock file {path}: {error.strerror}.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # another user's file in a directory like /tmp
            path.unlink()  # while it is locked, so that it is not the file of a later build
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Return a descriptor of the locked file.

    Raises:
        BlockingIOError: The file is locked.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # NFS locks only files that are open for writing
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the previous holder has deleted this file: lock the new one
