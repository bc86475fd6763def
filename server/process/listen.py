"""Sockets that the server listens on, bound before anything else is loaded."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engines.errors import ConfigError
from server.process.tls import TlsFiles, server_context
from server.process.unix_socket import UnixSocket

_REASONS = {
    errno.EADDRINUSE: "the port is in use; stop the program that uses it, or choose another --port",
    errno.EACCES: "this user may not use the port; choose a --port above 1023",
    errno.EPERM: "this user may not use the port; choose a --port above 1023",
    errno.EADDRNOTAVAIL: "this machine does not have the address; choose another --host",
}


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str = "127.0.0.1"
    port: int = 0  # 0 picks a free port
    unix_socket: Path | None = None  # instead of host and port
    tls: TlsFiles | None = None


@dataclass(frozen=True)
class Listener:
    """Bound sockets, and the context for TLS on their connections, if any."""

    sockets: list[socket.socket]
    tls: ssl.SSLContext | None = None


@contextlib.contextmanager
def listening(address: Address) -> Iterator[Listener]:
    """Yield a listener on `address` that does not listen yet, and close it in the end.

    Raises:
        ConfigError: The address is invalid or not available, or a file for TLS cannot be used.
    """
    tls = None if address.tls is None else server_context(address.tls)
    with contextlib.ExitStack() as stack:
        if address.unix_socket is not None:
            unix_socket = UnixSocket(address.unix_socket)
            stack.callback(unix_socket.close)
            sockets = [unix_socket.socket]
        else:
            sockets = [stack.enter_context(each) for each in bind(address.host, address.port)]
        yield Listener(sockets, tls)


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


def describe(listener: socket.socket, tls: bool) -> str:
    """Return the address of a socket for the log."""
    name = listener.getsockname()
    suffix = " with TLS" if tls else ""
    return f"the Unix socket {name}{suffix}" if isinstance(name, str) else f"{name[0]} port {name[1]}{suffix}"


def allow_restart(listener: socket.socket) -> None:
    """Let another server bind the port while connections of this one linger in TIME_WAIT.

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
