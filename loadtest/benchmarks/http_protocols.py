"""Benchmark of HTTP/1.1 implementations: CPU time of one request in this server and in uvicorn.

The protocols run without sockets, with an application that reads the body and responds at once. Rounds of the
implementations alternate; the best round counts.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from engines.cli import ArgumentParser
from server.http.http1.connection import Connection
from server.http.http1.connections import Connections, HttpContext
from server.metrics import Metrics
from server.settings import Settings

BODY = bytes(512 * 1024)
PIECE = 64 * 1024  # bytes per read
_HEADERS = (
    b"Host: 127.0.0.1:8000\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\nUser-Agent: python-httpx/0.28.1\r\n"
    b"Authorization: Bearer 0123456789abcdef\r\nContent-Type: application/x-safetensors\r\n"
)


class Application:
    """ASGI application that reads a request and responds with `chunks` of 64 KiB."""

    def __init__(self) -> None:
        self.chunks = 0
        self.responses = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request."""
        while (await receive())["more_body"]:
            pass
        headers = [(b"content-type", b"image/png"), (b"x-request-id", b"0123456789abcdef0123456789abcdef")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(self.chunks):
            await send({"type": "http.response.body", "body": BODY[:PIECE], "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        self.responses += 1


class Sink(asyncio.Transport):
    """Transport that discards what is written."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Discard `data`."""

    def get_write_buffer_size(self) -> int:
        """Return 0."""
        return 0

    def is_closing(self) -> bool:
        """Return False."""
        return False

    def pause_reading(self) -> None:
        """Do nothing: the benchmark waits for the application after each piece."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def requests() -> dict[str, tuple[list[bytes], int]]:
    """Return, by name, the pieces of a request and the number of chunks of its response."""
    head = b"POST /decode?seed=1 HTTP/1.1\r\n" + _HEADERS
    sized = head + b"Content-Length: %d\r\n\r\n"
    tiny = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n\0\r\n" * len(BODY) + b"0\r\n\r\n"
    empty = [sized % 0]
    return {
        "head": (empty, 0),
        "body of 0.5 MB": (split(sized % len(BODY) + BODY), 0),
        "body of 0.5 MB, chunks of one byte": (split(tiny), 0),
        "response of 0.5 MB, chunks of 64 KiB": (empty, len(BODY) // PIECE),
    }


def split(data: bytes) -> list[bytes]:
    """Split `data` into the pieces in which it is received."""
    return [data[start : start + PIECE] for start in range(0, len(data), PIECE)]


def implementations(config: uvicorn.Config) -> dict[str, Callable[[], Any]]:
    """Return factories of protocols by name."""
    settings = Settings(bundle=Path())
    context = HttpContext(settings, Metrics(60.0, []), Connections(8), 8 * len(BODY), is_draining=lambda: False)
    common: dict[str, Any] = {"config": config, "server_state": ServerState(), "app_state": {}}
    return {
        "this server": partial(Connection, context, **common),
        "uvicorn, httptools": partial(HttpToolsProtocol, **common),
        "uvicorn, h11": partial(H11Protocol, **common),
    }


async def cpu_seconds(protocol: Any, application: Application, pieces: list[bytes], count: int) -> float:
    """Return the CPU time of one of `count` requests."""
    protocol.connection_made(Sink())
    began, expected = time.process_time(), application.responses
    for _ in range(count):
        for piece in pieces:
            protocol.data_received(piece)
            await asyncio.sleep(0)
        expected += 1
        while application.responses < expected:  # noqa: ASYNC110  # an event would cost more than what is measured
            await asyncio.sleep(0)
    seconds = (time.process_time() - began) / count
    protocol.connection_lost(None)
    return seconds


async def measure(rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Return the milliseconds of CPU time of each request by case and implementation."""
    application = Application()
    config = uvicorn.Config(application, ws="none", log_config=None, access_log=False, proxy_headers=False)
    config.load()
    results: dict[str, dict[str, float]] = {}
    for case, (pieces, application.chunks) in requests().items():
        best: dict[str, float] = {}
        for _ in range(rounds):
            for name, create in implementations(config).items():
                once = await cpu_seconds(create(), application, pieces, 1)
                count = max(1, round(seconds / once))
                best[name] = min(best.get(name, once), await cpu_seconds(create(), application, pieces, count))
        results[case] = {name: round(1000 * once, 4) for name, once in best.items()}
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = ArgumentParser(
        prog="python -m loadtest.benchmarks.http_protocols",
        usage="%(prog)s [options]",
        description="Measure the CPU time of one request in this server's HTTP implementation and in uvicorn's.",
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5, metavar="COUNT", help="rounds per implementation (default: %(default)s)")
    add("--seconds", type=float, default=1.0, metavar="SECONDS", help="length of a round (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(arguments)
    results = asyncio.run(measure(options.rounds, options.seconds))
    for case, times in results.items():
        print(f"{case}, CPU time in ms")
        for name, milliseconds in times.items():
            print(f"  {name:<40}{milliseconds:>12.4f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
