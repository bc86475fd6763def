"""TLS between the transport of a connection and HTTP."""

from __future__ import annotations

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol
from typing import Any

from server.http.http1.connection import Connection


class TlsConnection(SSLProtocol):
    """TLS protocol of an accepted connection, to whose `Connection` it passes the decrypted data.

    asyncio's own way, `create_server(ssl=...)`, calls the protocol only after the handshake. Here it knows of the
    connection before, so that limits on their number and time apply to handshakes too.
    """

    def __init__(self, connection: Connection, context: ssl.SSLContext) -> None:
        """Put TLS below `connection`."""
        super().__init__(asyncio.get_running_loop(), connection, context, None, server_side=True)  # type: ignore[arg-type]  # no future to complete
        self._connection = connection

    def connection_made(self, transport: Any) -> None:
        """Count the connection, and begin the handshake unless there are too many."""
        self._connection.accept(transport)
        if not transport.is_closing():
            super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the connection; asyncio reports this to the protocol only if the handshake was complete."""
        super().connection_lost(exc)
        self._connection.connection_lost(None)


def tls_connection(tls: ssl.SSLContext, **arguments: Any) -> TlsConnection:
    """Return the protocol of a connection with TLS; `arguments` are those of `Connection`."""
    return TlsConnection(Connection(**arguments), tls)
