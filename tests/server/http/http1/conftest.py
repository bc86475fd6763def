"""A connection protocol on a local port, in the event loop of a test, with a small ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from server.http.http1.connection import Connection
from server.http.http1.connections import Connections, HttpContext
from server.metrics import Metrics
from server.settings import Settings


class Echo:
    """Application that responds with the method, the path and the body of a request, and records them."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        self.seen.append((scope["method"], scope["path"], body))
        await respond(send, f"{scope['method']} {scope['path']} ".encode() + body)


async def respond(send: Send, body: bytes, status: int = 200, framed: bool = True) -> None:
    headers = [(b"content-length", b"%d" % len(body))] if framed else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def reject(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond without reading the body."""
    await respond(send, b"rejected", 401)


class Local:
    """A listening server."""

    def __init__(self, app: ASGIApp, **settings: Any) -> None:
        self.settings = Settings(bundle=".", **settings)
        self.metrics, self.state, self.draining = Metrics(60.0, []), ServerState(), False
        self.state.default_headers = [(b"date", b"today")]
        self.context = HttpContext(
            self.settings,
            self.metrics,
            Connections(self.settings.max_connections),
            max_wire_bytes=2**20,
            is_draining=lambda: self.draining,
        )
        self._config = SimpleNamespace(loaded_app=app)
        self.port = 0

    def connection(self) -> Connection:
        return Connection(self.context, self._config, self.state, {})  # type: ignore[arg-type]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, *pieces: bytes) -> bytes:
        """Send each piece in a packet of its own; return what arrives until the server closes the connection."""
        reader, writer = await self.connect()
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.001)
        data = await read_all(reader)
        writer.close()
        return data

    def aborted(self, reason: str) -> float | None:
        return self.metrics.registry.get_sample_value("pid_aborted_connections_total", {"reason": reason})


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Read until the end of the connection, which may be a reset."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65536):
            data += chunk
    return bytes(data)


def run(app: ASGIApp, test: Callable[[Local], Awaitable[None]], **settings: Any) -> None:
    """Run `test` against a server of `app`; the limit only ends a test that would hang."""

    @contextlib.asynccontextmanager
    async def listening() -> AsyncIterator[Local]:
        local = Local(app, **settings)
        server = await asyncio.get_running_loop().create_server(local.connection, "127.0.0.1", 0)
        local.port = server.sockets[0].getsockname()[1]
        async with server:
            yield local
            for connection in list(local.state.connections):
                connection.abort("refused")  # type: ignore[attr-defined]

    async def main() -> None:
        async with asyncio.timeout(60), listening() as local:
            await test(local)

    asyncio.run(main())


async def eventually(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)
