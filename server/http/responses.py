"""The response to a decode request: it streams the images of an admission in a layout, and releases it at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engines.errors import PidError
from server.delivery import Admission
from server.http.context import RequestContext, error_response
from server.http.layouts import Extra, Layout
from server.metrics import Metrics


class DecodeResponse(Response):
    """Response that streams the images of an admission and releases it at the end.

    It ends early if the client disconnects; the connection disconnects a client that reads too slowly. If an image
    fails before the response has begun, the response reports the error.
    """

    def __init__(self, admission: Admission, layout: Layout, context: RequestContext, metrics: Metrics) -> None:
        """Take over `admission`, whose images are sent in `layout`."""
        super().__init__()
        self._admission, self._layout, self._context, self._metrics = admission, layout, context, metrics

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
        try:
            headers, body = await self._layout.begin(self._admission.streams, self._context.request_id)
        except PidError as error:
            await error_response(error, self._context, self._metrics)(scope, receive, send)
            return
        await self._send_chunks(send, headers, body)

    async def _send_chunks(self, send: Send, headers: dict[str, str], body: AsyncIterator[bytes]) -> None:
        """Send a complete response with status 200, and report the bytes of images that have left the server."""
        raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
        buffered = 0  # bytes of images that the connection has not sent yet
        async for chunk in body:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})  # waits for the chunk before
            self._admission.delivered(round(buffered / self._layout.expansion))
            buffered = 0 if isinstance(chunk, Extra) else len(chunk)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected; the body has been read, so no other message can arrive."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _record(context: RequestContext, admission: Admission) -> None:
    """Add a decode to the log line and the trace; the stage times are those of the slowest image."""
    job, streams = admission.jobs[0], admission.streams
    slowest = max(streams, key=lambda stream: sum(asdict(stream.timings).values()))
    context.fields |= {
        "size": str(job.output.size),
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
