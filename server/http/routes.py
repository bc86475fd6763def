"""The routes. None has logic of its own: read, ask the service, stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from server.body.media import negotiate
from server.body.options import DEADLINE_HEADER
from server.body.parse import parse_request, read_body
from server.errors import BodyTimeoutError, UnsupportedMediaTypeError
from server.http.context import RequestContext
from server.http.openapi import decode_documentation
from server.http.responses import Multipart, StreamingImageResponse, chunks, server_timing
from server.request import DecodeRequest
from server.service import Admitted, DecodeService, State

SMALL_BODY = 512 * 1024  # bytes that are parsed on the event loop; larger ones would hold up other requests

router = APIRouter()


@router.post("/decode", **decode_documentation())
async def decode(request: Request) -> Response:
    """Decode one latent into an image four times the size, or a batch of them into a multipart answer."""
    service: DecodeService = request.app.state.service
    exchange: RequestContext = request.state.context
    received = await _receive(request, service)
    accept = request.headers.get("accept")
    if accept is not None and len(received.latents) > 1:
        accept = accept.replace("multipart/mixed", "image/*")  # the parts are images all the same
    admitted = service.submit(received, negotiate(received.options.format, accept))

    def over() -> None:
        service.release(admitted)
        _record(exchange, received, admitted)

    gone = asyncio.ensure_future(_disconnected(request))
    try:
        body, headers = await _answer(admitted, exchange.request_id, gone)
    except BaseException:
        gone.cancel()
        over()
        raise
    return StreamingImageResponse(body, headers, gone, service.settings.delivery_seconds, over)


async def _receive(request: Request, service: DecodeService) -> DecodeRequest:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaTypeError("Bodies are taken as they are; send the request without Content-Encoding.")
    limit, seconds = service.settings.max_body, service.settings.body_seconds
    try:
        async with asyncio.timeout(seconds):
            body = await read_body(request.stream(), request.headers.get("content-length"), limit)
    except TimeoutError:
        raise BodyTimeoutError(f"The body took longer than {seconds:g} s to arrive; send it faster.") from None
    options = request.query_params.multi_items()
    options += [("deadline_ms", value) for value in request.headers.getlist(DEADLINE_HEADER)]
    arguments = (request.headers.get("content-type"), body, options, service.accepts)
    if len(body) <= SMALL_BODY:
        return parse_request(*arguments)
    return await asyncio.to_thread(parse_request, *arguments)


async def _answer(
    admitted: Admitted, request_id: str, gone: asyncio.Future[None]
) -> tuple[AsyncIterator[bytes], dict[str, str]]:
    """The body and headers, once the first bytes are there, so that a failed decode gets a status of its own."""
    if len(admitted.answers) > 1:
        multipart = Multipart(admitted.answers, request_id)
        seeds = ", ".join(str(answer.seed) for answer in admitted.answers)
        return multipart.body(), {"Content-Type": multipart.media_type, "X-Seed": seeds}
    answer = admitted.answers[0]
    first = asyncio.ensure_future(answer.chunk())
    waiting: set[asyncio.Future[Any]] = {first, gone}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if not first.done():
        first.cancel()
        raise ClientDisconnect
    head = first.result() or b""
    return chunks(head, answer), {
        "Content-Type": answer.media_type,
        "X-Seed": str(answer.seed),
        "Server-Timing": server_timing(answer),
    }


async def _disconnected(request: Request) -> None:
    """Return when the client is gone; the body has been read, so nothing else can arrive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _record(exchange: RequestContext, received: DecodeRequest, admitted: Admitted) -> None:
    """What the log line says of a decode; stage times are those of the image that took longest."""
    slowest = max(admitted.answers, key=lambda answer: sum(asdict(answer.timings).values()))
    job = admitted.jobs[0]
    exchange.fields |= {
        "size": f"{job.size}",
        "images": len(admitted.jobs),
        "steps": received.options.steps,
        "seed": admitted.answers[0].seed,
        "stages_ms": {name: round(1000 * seconds, 1) for name, seconds in asdict(slowest.timings).items()},
    }
    if exchange.spans is not None:
        exchange.spans += [(image, *mark) for image, answer in enumerate(admitted.answers) for mark in answer.spans]
    errors = [answer.error.code for answer in admitted.answers if answer.error is not None]
    if errors:
        exchange.fields["errors"] = errors


@router.get("/health/live", tags=["health"])
async def live(request: Request) -> JSONResponse:
    """200 while the process can do work; after a 503 here it should be restarted."""
    service: DecodeService = request.app.state.service
    if service.state is State.FAILED:
        return JSONResponse({"state": service.state, "reason": service.reason}, 503)
    return JSONResponse({"state": service.state})


@router.get("/health/ready", tags=["health"])
async def ready(request: Request) -> JSONResponse:
    """200 once the bundle is checked and a warm-up decode has run, until the server drains."""
    state: State = request.app.state.service.state
    return JSONResponse({"state": state}, 200 if state is State.READY else 503)


@router.get("/metrics", tags=["operation"])
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    exposition = await asyncio.to_thread(request.app.state.service.metrics.exposition)
    return Response(exposition, media_type=CONTENT_TYPE_LATEST)


@router.get("/info", tags=["operation"])
async def info(request: Request) -> dict[str, Any]:
    """The decoder, what it takes, its limits, and the measured cost of each stage."""
    description: dict[str, Any] = request.app.state.service.describe()
    return description
