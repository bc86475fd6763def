"""Sockets that the server listens on, bound before anything else is loaded."""

from __future__ import annotations

import errno
import os
import socket
import sys

from engines.errors import ConfigError

_REASONS = {
    errno.EADDRINUSE: "the port is in use; stop the program that uses it, or choose another --port",
    errno.EACCES: "this user may not use the port; choose a --port above 1023",
    errno.EPERM: "this user may not use the port; choose a --port above 1023",
    errno.EADDRNOTAVAIL: "this machine does not have the address; choose another --host",
}


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


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    # asyncio turns off Nagle's algorithm, which delays small responses by 40 ms, only for an explicit protocol.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
