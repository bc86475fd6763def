"""Context of a request, for every route: its id, its metrics and its log line."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.errors import PidError
from server.errors import OutOfMemoryError
from server.http.problem import PROBLEM_MEDIA_TYPE, Problem, problem
from server.http.protocols.base import DecodeProtocol, protocol_of
from server.metrics import Metrics
from server.stream import Span

log = logging.getLogger("server.requests")

CLIENT_DISCONNECTED = 499  # nginx's status for a disconnected client; never sent
_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class RequestContext:
    """State of one request, stored in `scope["state"]["context"]`."""

    request_id: str
    protocol: DecodeProtocol | None = None  # that the response follows
    route: str | None = None  # of a decode; None for other requests
    started: float = field(default_factory=time.perf_counter)
    client: str = ""  # name of the API key; empty without authentication
    status: int = CLIENT_DISCONNECTED  # until a response starts
    bytes_out: int = 0  # of the response's body
    fields: dict[str, Any] = field(default_factory=dict)  # members that handlers add to the log line
    spans: list[tuple[int, Span]] | None = None  # image and stage; a list if the request is traced


def error_response(error: Exception, context: RequestContext, metrics: Metrics) -> Response:
    """Return the response that reports `error`; count the error and add its code to the log line."""
    described = problem(error, context.request_id)
    if isinstance(error, PidError):
        context.fields["errors"] = [error.code]
        metrics.rejections.labels(error.code).inc()
    return problem_response(described, context)


def problem_response(problem: Problem, context: RequestContext) -> Response:
    """Return `problem` as a response in the form of the protocol of the request."""
    media_type, body = PROBLEM_MEDIA_TYPE, problem.document
    if context.protocol is not None:
        media_type, body = context.protocol.error_body(problem.document)
    return JSONResponse(body, problem.status, problem.headers, media_type)


class RequestContextMiddleware:
    """ASGI middleware that gives each request a context, counts the request, and logs one line when it ends."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        protocols: Sequence[DecodeProtocol],
        out_of_memory: Callable[[], None],
    ) -> None:
        self._app, self._metrics, self._protocols, self._out_of_memory = app, metrics, protocols, out_of_memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request in a new context; its id is that of the X-Request-Id header if it is valid."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        requested_id = Headers(scope=scope).get("x-request-id", "")
        context = RequestContext(requested_id if _VALID_ID.fullmatch(requested_id) else uuid.uuid4().hex)
        context.protocol = protocol_of(scope["path"], self._protocols)
        if context.protocol is not None and scope["method"] != "OPTIONS":
            context.route = context.protocol.route_of(scope["path"])
        scope.setdefault("state", {})["context"] = context

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = context.request_id
            elif message["type"] == "http.response.body":
                context.bytes_out += len(message.get("body", b""))
            await send(message)

        self._metrics.in_flight.inc(context.route is not None)
        try:
            await self._app(scope, receive, observed_send)
        except Exception as raised:
            error: Exception = raised
            if isinstance(raised, MemoryError):
                self._out_of_memory()
                error = OutOfMemoryError()
            else:
                log.exception("unexpected error", extra={"fields": {"request_id": context.request_id}})
            if context.status == CLIENT_DISCONNECTED:  # no response has started
                await error_response(error, context, self._metrics)(scope, receive, observed_send)
        finally:
            self._metrics.in_flight.dec(context.route is not None)
            self._record(scope, context)

    def _record(self, scope: Scope, context: RequestContext) -> None:
        seconds = time.perf_counter() - context.started
        level = logging.DEBUG  # probes and scrapes would fill the log
        if context.route is not None and context.protocol is not None:
            level = logging.INFO
            status, decoder = str(context.status), str(context.fields.get("decoder", ""))
            self._metrics.requests.labels(status, context.protocol.name, decoder).inc()
            self._metrics.request_seconds.labels(status, decoder).observe(seconds)
            self._metrics.bytes_out.inc(context.bytes_out)
        fields = {
            "request_id": context.request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": context.status,
            "bytes": context.bytes_out,
            "ms": round(1000 * seconds, 1),
            **context.fields,
        }
        log.log(level, "%s %s %s", scope["method"], scope["path"], context.status, extra={"fields": fields})
