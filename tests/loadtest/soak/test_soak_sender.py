"""Clients of the soak test against scripted servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from loadtest.soak import sender as module
from loadtest.soak.kinds import CLOSED, Behaviour, Kind
from loadtest.soak.sender import LEFT, TIMEOUT, Sender

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
REQUEST = b"GET / HTTP/1.1\r\n\r\n"
RESPONSE = b"HTTP/1.1 418 Teapot\r\nContent-Length: 0\r\n\r\n"


async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Respond with nothing and keep the connection open."""
    await reader.read(-1)


async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def responding(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(RESPONSE)
    await reader.read(1)  # keeps the connection open until the client closes it


async def responding_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(RESPONSE)


async def truncating(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(RESPONSE.replace(b": 0", b": 9"))


async def streaming(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(bytes(65536))
            await writer.drain()


async def waiting_for_drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(len(REQUEST) + 3)
    writer.write(RESPONSE)


def send(handler: Handler, behaviour: Behaviour, times: int = 1) -> list[str]:
    """Send a request `times` times and return the results; fail if the server still sees a client afterwards."""
    kind = Kind("test", 1, REQUEST, () if behaviour is Behaviour.UNREAD else ("200",), behaviour)

    async def test() -> list[str]:
        open_now, all_closed = 0, asyncio.Event()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal open_now
            open_now += 1
            all_closed.clear()
            try:
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    await handler(reader, writer)
            finally:
                writer.close()
                open_now -= 1
                if not open_now:
                    all_closed.set()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        sender = Sender("127.0.0.1", server.sockets[0].getsockname()[1])
        results = [await sender.send(kind) for _ in range(times)]
        sender.close()
        await asyncio.wait_for(all_closed.wait(), 10)
        server.close()
        return results

    return asyncio.run(test())


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 1.0)
    monkeypatch.setattr(module, "DRIP_SECONDS", 0.02)
    monkeypatch.setattr(module, "UNREAD_SECONDS", 0.1)


@pytest.mark.parametrize(
    ("handler", "behaviour", "result"),
    [
        (responding, Behaviour.READ, "418"),
        (closing, Behaviour.READ, CLOSED),
        (truncating, Behaviour.READ, "418, incomplete"),
        (nothing, Behaviour.READ, TIMEOUT),
        (responding_once, Behaviour.WAIT, "418"),
        (closing, Behaviour.WAIT, CLOSED),
        (responding, Behaviour.WAIT, TIMEOUT),  # a response is not enough: the connection has to be closed
        (waiting_for_drips, Behaviour.DRIP, "418"),
        (nothing, Behaviour.ABORT, LEFT),
        (streaming, Behaviour.ABORT_STREAMING, LEFT),
        (streaming, Behaviour.UNREAD, LEFT),
    ],
)
def test_the_result_is_what_the_client_observed(handler: Handler, behaviour: Behaviour, result: str):
    assert send(handler, behaviour) == [result]


def test_a_request_is_sent_again_if_the_server_closed_the_idle_connection():
    assert send(responding_once, Behaviour.READ, times=3) == ["418"] * 3
