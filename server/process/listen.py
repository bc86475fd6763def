"""Sockets that the server listens on, bound before anything else is loaded."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

from engines.errors import ConfigError

_REASONS = {
    errno.EADDRINUSE: "the port is in use; stop the program that uses it, or choose another --port",
    errno.EACCES: "this user may not use the port; choose a --port above 1023",
    errno.EPERM: "this user may not use the port; choose a --port above 1023",
    errno.EADDRNOTAVAIL: "this machine does not have the address; choose another --host",
}


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Yield the sockets of `bind`, and close them in the end. Raises ConfigError as `bind`."""
    sockets = bind(host, port)
    try:
        yield sockets
    finally:
        for each in sockets:
            each.close()


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind one socket per address of `host`, without listening yet; port 0 picks a free port.

    Raises:
        ConfigError: The host is unknown, or an address or the port is not available.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} is not a valid address: {reason}.") from error
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(addresses):
            sockets.append(_bound(family, (address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:])))
    except OSError as error:
        for each in sockets:
            each.close()
        reason = _REASONS.get(error.errno or 0, f"{os.strerror(error.errno)}." if error.errno else str(error))
        raise ConfigError(f"Cannot listen on {host} port {port}: {reason.rstrip('.')}.") from error
    return sockets


def allow_restart(listener: socket.socket) -> None:
    """Let another server bind the address while connections of this one linger in TIME_WAIT.

    Call it just before the socket listens: of two sockets with this option that do not listen yet, Linux would bind
    both, and one of two servers that start at the same time would fail only after it has loaded its bundle.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    try:
        return _bind(family, address, reuse=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    return _bind(family, address, reuse=True)  # possible if only connections in TIME_WAIT use the address


def _bind(family: int, address: tuple[object, ...], reuse: bool) -> socket.socket:
    # asyncio turns off Nagle's algorithm, which delays small responses by 40 ms, only for an explicit protocol.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if reuse:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
