"""Sends the requests of the soak test and returns what their clients observed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

from loadtest.http_client import Client
from loadtest.soak.kinds import CLOSED, Behaviour, Kind

LEFT = "left"  # result of a client that disconnects
TIMEOUT = "no response"
LIMIT = 30.0  # seconds for the response, and for the server to close the connection of a slow client
DRIP_SECONDS = 0.25
UNREAD_SECONDS = 10.0  # time after which a client that does not read disconnects
_SMALL_BUFFER = 4096  # bytes
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: send a reset instead of unsent data
_STATUS = slice(9, 12)  # of `HTTP/1.1 200 OK`


class Sender:
    """Sends single requests to one server."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._client = Client(f"http://{host}:{port}")

    def close(self) -> None:
        """Close the idle connections."""
        self._client.close()

    async def send(self, kind: Kind) -> str:
        """Send a request and return its result: the status of the response, CLOSED, LEFT or TIMEOUT."""
        try:
            async with asyncio.timeout(LIMIT):
                if kind.behaviour is Behaviour.READ:
                    return await self._read(kind.data)
                return await self._misbehave(kind)
        except TimeoutError:
            return TIMEOUT
        except OSError:
            return CLOSED if kind.expected else LEFT

    async def _read(self, data: bytes) -> str:
        used = True
        while used:  # the server may have closed a connection that was used before
            connection = await self._client.connect()
            used = connection.used
            exchange = await connection.exchange(data)
            self._client.release(connection)
            if exchange.status:
                return str(exchange.status) if exchange.complete else f"{exchange.status}, incomplete"
        return CLOSED

    async def _misbehave(self, kind: Kind) -> str:
        async with self._connection() as (reader, writer):
            writer.write(kind.data)
            match kind.behaviour:
                case Behaviour.ABORT:
                    await writer.drain()
                case Behaviour.ABORT_STREAMING:
                    await reader.read(1)
                case Behaviour.UNREAD:
                    await asyncio.sleep(UNREAD_SECONDS)
                case _:
                    return await _until_closed(reader, writer, drip=kind.behaviour is Behaviour.DRIP)
        return LEFT

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Open a connection with a small buffer, and reset it at the end."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self._address)
            reader, writer = await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def _until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, drip: bool) -> str:
    """Wait until the server closes the connection and return the status of its response, or CLOSED."""
    dripping = asyncio.create_task(_drip(writer)) if drip else None
    received = b""
    try:
        while data := await reader.read(65536):
            received = (received + data)[: _STATUS.stop]
    except ConnectionError:
        pass  # a reset also closes it
    finally:
        if dripping is not None:
            dripping.cancel()
    return received[_STATUS].decode("latin-1") or CLOSED


async def _drip(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(DRIP_SECONDS)
        writer.write(b"x")
