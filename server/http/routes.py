"""HTTP routes: they parse requests, call the service and return its responses."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from server.body.head import read_head
from server.body.media import negotiate
from server.http.auth import fair_share_client
from server.http.context import RequestContext
from server.http.info import describe
from server.http.openapi import decode_documentation
from server.http.responses import StreamingImageResponse
from server.lifecycle import State
from server.service import DecodeService

router = APIRouter()


@router.post("/decode", **decode_documentation())
async def decode(request: Request) -> Response:
    """Decode one latent into an image four times the size, or a batch of them into a multipart response."""
    service: DecodeService = request.app.state.service
    context: RequestContext = request.state.context
    head = read_head(request.headers.items(), request.query_params.multi_items(), service.decoder_limits)
    client = fair_share_client(request.scope, service.settings.fair_by)
    service.check(head.options, head.is_final, client)
    decode_request = await service.bodies.read(head, request.stream())
    image_format = negotiate(decode_request.options.format, head.accept, batch=len(decode_request.latents) > 1)
    captions = await service.find_captions(decode_request)
    admission = service.submit(decode_request, image_format, client, captions)
    return StreamingImageResponse(admission, context, service.metrics)


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
    """Return 200 from the end of the warm-up until the server drains, unless a device is stalled; 503 otherwise."""
    service: DecodeService = request.app.state.service
    lifecycle = service.lifecycle
    if lifecycle.state is State.STALLED:
        return JSONResponse({"state": lifecycle.state, "reason": lifecycle.reason}, 503)
    return JSONResponse({"state": lifecycle.state}, 200 if lifecycle.state is State.READY else 503)


@router.get("/metrics", tags=["operation"])
async def metrics(request: Request) -> Response:
    """Return the Prometheus metrics."""
    service: DecodeService = request.app.state.service
    exposition = await service.in_thread(service.metrics.exposition)
    return Response(exposition, media_type=CONTENT_TYPE_LATEST)


@router.get("/info", tags=["operation"])
async def info(request: Request) -> dict[str, Any]:
    """Return the decoder, its sizes, the limits of the server and the measured cost of each stage."""
    return describe(request.app.state.service)
