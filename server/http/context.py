"""What one HTTP exchange leaves behind: a log line, its metrics, its request id; for every route alike."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.errors import PidError
from server.http.problem import PROBLEM_MEDIA_TYPE, problem
from server.metrics import Metrics
from server.stream import Span

log = logging.getLogger("server.requests")

CLIENT_LEFT = 499  # nginx's number for it; never sent
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class RequestContext:
    """Handlers add to `fields` what the log line should say."""

    request_id: str
    began: float = field(default_factory=time.perf_counter)
    status: int = CLIENT_LEFT  # until a response starts
    bytes_out: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    spans: list[tuple[int, Span]] | None = None  # image and stage; a list if the request is traced


def refusal(error: Exception, exchange: RequestContext, metrics: Metrics) -> Response:
    """The problem document for `error`, counted and noted in the log line."""
    status, headers, document = problem(error, exchange.request_id)
    if isinstance(error, PidError):
        exchange.fields["errors"] = [error.code]
        metrics.refusals.labels(error.code).inc()
    return JSONResponse(document, status, headers, PROBLEM_MEDIA_TYPE)


class RequestContextMiddleware:
    """Names each request, counts it, and logs one line when it is over, however it ends."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        exchange = RequestContext(given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["context"] = exchange

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = exchange.request_id
            elif message["type"] == "http.response.body":
                exchange.bytes_out += len(message.get("body", b""))
            await send(message)

        decode = scope["path"] == "/decode"
        self._metrics.in_flight.inc(decode)
        try:
            await self._app(scope, receive, observed_send)
        finally:
            self._metrics.in_flight.dec(decode)
            self._over(scope, exchange, decode)

    def _over(self, scope: Scope, exchange: RequestContext, decode: bool) -> None:
        seconds = time.perf_counter() - exchange.began
        if decode:
            self._metrics.requests.labels(str(exchange.status)).inc()
            self._metrics.request_seconds.observe(seconds)
            self._metrics.bytes_out.inc(exchange.bytes_out)
        level = logging.INFO if decode else logging.DEBUG  # probes and scrapes would drown the rest
        fields = {
            "request_id": exchange.request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": exchange.status,
            "bytes": exchange.bytes_out,
            "ms": round(1000 * seconds, 1),
            **exchange.fields,
        }
        log.log(level, "%s %s %s", scope["method"], scope["path"], exchange.status, extra={"fields": fields})
