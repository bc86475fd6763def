"""Responses of /decode: one image as a chunked body, several as multipart/mixed, sent while they are encoded."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import asdict

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engines.errors import PidError
from server.delivery import Admission
from server.http.context import RequestContext, error_response
from server.http.problem import PROBLEM_MEDIA_TYPE, problem
from server.metrics import Metrics
from server.stream import ImageStream


class StreamingImageResponse(Response):
    """Response that streams the images of an admission and releases it at the end.

    It ends early if the client disconnects; the connection disconnects a client that reads too slowly. If the decode of
    a single image fails, the response is a problem document with the status of the error.
    """

    def __init__(self, admission: Admission, context: RequestContext, metrics: Metrics) -> None:
        """Take over `admission`."""
        super().__init__()
        self._admission, self._context, self._metrics = admission, context, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, as an ASGI application."""
        sending = asyncio.ensure_future(self._respond(scope, receive, send))
        disconnected = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # If the response is incomplete, the connection is closed, which shows it to the client.
            for task in (sending, disconnected):
                task.cancel()
            self._admission.release()  # before the await, which a second cancellation would interrupt
            await asyncio.gather(sending, disconnected, return_exceptions=True)
            _record(self._context, self._admission)
        if not sending.cancelled():
            error = sending.exception()
            if error is not None and not isinstance(error, PidError):
                raise error

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        streams = self._admission.streams
        if len(streams) > 1:
            multipart = Multipart(streams, self._context.request_id)
            seeds = ", ".join(str(stream.seed) for stream in streams)
            headers = {"Content-Type": multipart.media_type, "X-Seed": seeds}
            await _send_chunks(send, headers, multipart.body(), self._admission)
            return
        stream = streams[0]
        try:
            first = await stream.chunk()
        except PidError as error:
            await error_response(error, self._context, self._metrics)(scope, receive, send)
            return
        headers = {
            "Content-Type": stream.media_type,
            "X-Seed": str(stream.seed),
            "Server-Timing": server_timing(stream),
        }
        await _send_chunks(send, headers, _chunks(first, stream), self._admission)


async def _send_chunks(send: Send, headers: dict[str, str], body: AsyncIterator[bytes], admission: Admission) -> None:
    """Send a complete response with status 200, and report its bytes to `admission` as they leave the server."""
    raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
    buffered = 0  # bytes that the connection has not sent yet
    async for chunk in body:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})  # waits for the chunk before
        admission.delivered(buffered)
        buffered = len(chunk)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Multipart:
    """A multipart/mixed body (RFC 2046): one part per image, in order; a failed image becomes a problem document."""

    def __init__(self, streams: tuple[ImageStream, ...], request_id: str) -> None:
        """Choose a boundary for the images of `streams`."""
        self._streams, self._request_id = streams, request_id
        self._boundary = secrets.token_hex(16)
        self.media_type = f"multipart/mixed; boundary={self._boundary}"

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body in chunks."""
        for index, stream in enumerate(self._streams):
            async for chunk in self._part(index, stream):
                yield chunk
        yield f"--{self._boundary}--\r\n".encode()

    async def _part(self, index: int, stream: ImageStream) -> AsyncIterator[bytes]:
        # A truncated part would look complete to the client, so a part is sent only once its image is fully encoded.
        try:
            chunks = [chunk async for chunk in _chunks(await stream.chunk(), stream)]
        except PidError as error:
            status, _, document = problem(error, self._request_id)
            yield self._head(index, PROBLEM_MEDIA_TYPE, {"X-Status": str(status)}) + json.dumps(document).encode()
        else:
            headers = {"X-Seed": str(stream.seed), "Server-Timing": server_timing(stream)}
            yield self._head(index, stream.media_type, headers)
            for chunk in chunks:
                yield chunk
        yield b"\r\n"

    def _head(self, index: int, media_type: str, headers: dict[str, str]) -> bytes:
        lines = {"Content-Type": media_type, "X-Index": str(index), **headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"--{self._boundary}\r\n{text}\r\n".encode()


def server_timing(stream: ImageStream) -> str:
    """Return the Server-Timing header: the stages that have ended so far, in milliseconds."""
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in asdict(stream.timings).items() if seconds)


async def _chunks(first: bytes | None, stream: ImageStream) -> AsyncIterator[bytes]:
    """Yield `first`, which was read from `stream` already, and the rest of it."""
    chunk = first
    while chunk is not None:
        yield chunk
        chunk = await stream.chunk()


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected; the body has been read, so no other message can arrive."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _record(context: RequestContext, admission: Admission) -> None:
    """Add a decode to the log line and the trace; the stage times are those of the slowest image."""
    job, streams = admission.jobs[0], admission.streams
    slowest = max(streams, key=lambda stream: sum(asdict(stream.timings).values()))
    context.fields |= {
        "size": str(job.size),
        "images": len(streams),
        "steps": len(job.steps),
        "seed": streams[0].seed,
        "stages_ms": {name: round(1000 * seconds, 1) for name, seconds in asdict(slowest.timings).items()},
    }
    if context.spans is not None:
        context.spans += [(image, span) for image, stream in enumerate(streams) for span in stream.spans]
    errors = [stream.error.code for stream in streams if stream.error is not None]
    if errors:
        context.fields["errors"] = errors
