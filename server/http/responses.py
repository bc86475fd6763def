"""Answers as HTTP: one image as a chunked body, several as multipart/mixed, both sent as they are encoded."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engines.errors import PidError
from server.http.problem import PROBLEM_MEDIA_TYPE, problem
from server.stream import ImageStream


class StreamingImageResponse(Response):
    """Streams `body` until it ends, the client leaves or has kept it waiting for `seconds`; then calls `on_over`."""

    def __init__(
        self,
        body: AsyncIterator[bytes],
        headers: dict[str, str],
        gone: Awaitable[None],
        seconds: float,
        on_over: Callable[[], None],
    ) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._stream, self._gone, self._seconds, self._on_over = body, gone, seconds, on_over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(self._gone)
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and isinstance(sending.exception(), TimeoutError):
                scope["state"].get("abort", lambda: None)()  # to close it would wait for the client to read on
        finally:
            # An answer that is not sent to its end closes the connection, which tells the client so.
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            self._on_over()

    async def _send(self, send: Send) -> None:
        self._left = self._seconds
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._stream:
            await self._send_body(send, chunk, True)
        await self._send_body(send, b"", False)

    async def _send_body(self, send: Send, chunk: bytes, more: bool) -> None:
        """Send, and count the time only that this takes, not the time until the next chunk is there."""
        clock = asyncio.get_running_loop().time
        began = clock()
        async with asyncio.timeout(self._left):
            await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self._left -= clock() - began


def server_timing(answer: ImageStream) -> str:
    """The stages known so far, for the Server-Timing header, in milliseconds."""
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in asdict(answer.timings).items() if seconds)


async def chunks(first: bytes, answer: ImageStream) -> AsyncIterator[bytes]:
    """`first`, which was taken from `answer` already, and the rest of it."""
    chunk: bytes | None = first
    while chunk is not None:
        yield chunk
        chunk = await answer.chunk()


class Multipart:
    """A multipart/mixed body (RFC 2046): a part an answer, in order; a failed one is a problem document."""

    def __init__(self, answers: tuple[ImageStream, ...], request_id: str) -> None:
        self._answers, self._request_id = answers, request_id
        self._boundary = secrets.token_hex(16)
        self.media_type = f"multipart/mixed; boundary={self._boundary}"

    async def body(self) -> AsyncIterator[bytes]:
        for index, answer in enumerate(self._answers):
            async for chunk in self._part(index, answer):
                yield chunk
        yield f"--{self._boundary}--\r\n".encode()

    async def _part(self, index: int, answer: ImageStream) -> AsyncIterator[bytes]:
        try:
            first = await answer.chunk()
        except PidError as error:
            status, _, document = problem(error, self._request_id)
            yield self._head(index, PROBLEM_MEDIA_TYPE, {"X-Status": str(status)}) + json.dumps(document).encode()
        else:
            yield self._head(
                index, answer.media_type, {"X-Seed": str(answer.seed), "Server-Timing": server_timing(answer)}
            )
            if first is not None:
                async for chunk in chunks(first, answer):
                    yield chunk
        yield b"\r\n"

    def _head(self, index: int, media_type: str, headers: dict[str, str]) -> bytes:
        lines = {"Content-Type": media_type, "X-Index": str(index), **headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"--{self._boundary}\r\n{text}\r\n".encode()
