"""Unix sockets that the server listens on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from engines.errors import ConfigError

_MAX_PATH = 107  # bytes, on Linux
_MODE = 0o666  # as uvicorn's; the permissions of the directory say who may connect


class UnixSocket:
    """A bound Unix socket and its file, which is removed when the socket is closed."""

    def __init__(self, path: Path) -> None:
        """Bind `path`, without listening yet. The file of a server that no longer runs is replaced.

        Raises:
            ConfigError: The path is too long, in use or not a socket, or the file cannot be made.
        """
        if len(os.fsencode(path)) > _MAX_PATH:
            raise ConfigError(f"--uds {path} is longer than the {_MAX_PATH} bytes that a Unix socket may have.")
        self._path = path.absolute()
        try:
            _remove_unused(path)
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self.socket.bind(str(path))
                path.chmod(_MODE)
                self._file = _identity(self._path)
            except OSError:
                self.socket.close()
                raise
        except OSError as error:
            raise ConfigError(f"Cannot listen on --uds {path}: {error.strerror}.") from error

    def close(self) -> None:
        """Close the socket and remove its file, unless another server has replaced it."""
        self.socket.close()
        with contextlib.suppress(OSError):
            if _identity(self._path) == self._file:
                self._path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _remove_unused(path: Path) -> None:
    """Remove the file of a socket that no process has open.

    Raises:
        ConfigError: The file is not a socket, or a process has it open.
        OSError: The file cannot be examined or removed.
    """
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise ConfigError(f"--uds {path} exists and is not a socket; choose another path.")
    # Connecting with another socket type always fails. The error says whether a process has the socket open, even if it
    # does not listen yet.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        number = probe.connect_ex(str(path))
    if number in (0, errno.EPROTOTYPE):
        raise ConfigError(f"--uds {path} is in use; stop the program that uses it, or choose another path.")
    if number != errno.ECONNREFUSED:
        raise OSError(number, os.strerror(number))
    path.unlink()
