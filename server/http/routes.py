"""HTTP routes: they parse requests, call the service and return its responses."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from server.body.media import negotiate
from server.body.options import DEADLINE_HEADER
from server.body.parse import parse_request, read_body
from server.errors import BodyTimeoutError, UnsupportedMediaTypeError
from server.http.auth import fair_share_client
from server.http.context import RequestContext
from server.http.info import describe
from server.http.openapi import decode_documentation
from server.http.responses import StreamingImageResponse
from server.lifecycle import State
from server.request import DecodeRequest
from server.service import DecodeService

SMALL_BODY = 512 * 1024  # bytes; larger bodies are parsed on a thread, so that they do not block other requests

router = APIRouter()


@router.post("/decode", **decode_documentation())
async def decode(request: Request) -> Response:
    """Decode one latent into an image four times the size, or a batch of them into a multipart response."""
    service: DecodeService = request.app.state.service
    context: RequestContext = request.state.context
    decode_request = await _receive(request, service)
    accept = request.headers.get("accept")
    if accept is not None and len(decode_request.latents) > 1:
        accept = accept.replace("multipart/mixed", "image/*")  # each part is an image
    client = fair_share_client(request.scope, service.settings.fair_by)
    admission = service.submit(decode_request, negotiate(decode_request.options.format, accept), client)
    return StreamingImageResponse(admission, context, service.metrics, timeout=service.settings.response_timeout)


async def _receive(request: Request, service: DecodeService) -> DecodeRequest:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaTypeError("Content-Encoding is not supported; send the body uncompressed.")
    limit, seconds = service.settings.max_body_bytes, service.settings.body_timeout
    try:
        async with asyncio.timeout(seconds):
            body = await read_body(request.stream(), request.headers.get("content-length"), limit)
    except TimeoutError:
        raise BodyTimeoutError(f"The body took longer than {seconds:g} s to arrive; send it faster.") from None
    options = request.query_params.multi_items()
    options += [("deadline_ms", value) for value in request.headers.getlist(DEADLINE_HEADER)]
    arguments = (request.headers.get("content-type"), body, options, service.decoder_limits)
    if len(body) <= SMALL_BODY:
        return parse_request(*arguments)
    return await asyncio.to_thread(parse_request, *arguments)


@router.get("/health/live", tags=["health"])
async def live(request: Request) -> JSONResponse:
    """Return 200 while the server works, and 503 once it has to be restarted."""
    service: DecodeService = request.app.state.service
    lifecycle = service.lifecycle
    if lifecycle.state is State.FAILED:
        return JSONResponse({"state": lifecycle.state, "reason": lifecycle.reason}, 503)
    return JSONResponse({"state": lifecycle.state})


@router.get("/health/ready", tags=["health"])
async def ready(request: Request) -> JSONResponse:
    """Return 200 from the end of the warm-up until the server drains, 503 otherwise."""
    service: DecodeService = request.app.state.service
    state = service.lifecycle.state
    return JSONResponse({"state": state}, 200 if state is State.READY else 503)


@router.get("/metrics", tags=["operation"])
async def metrics(request: Request) -> Response:
    """Return the Prometheus metrics."""
    service: DecodeService = request.app.state.service
    exposition = await asyncio.to_thread(service.metrics.exposition)
    return Response(exposition, media_type=CONTENT_TYPE_LATEST)


@router.get("/info", tags=["operation"])
async def info(request: Request) -> dict[str, Any]:
    """Return the decoder, its sizes, the limits of the server and the measured cost of each stage."""
    return describe(request.app.state.service)
