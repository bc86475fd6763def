"""HTTP routes apart from those of decode requests."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from server.http.info import describe
from server.http.models import Info
from server.http.openapi import ANY_REQUEST, TEXT, describe_get, describe_probe
from server.lifecycle import State
from server.service import DecodeService
from server.swaps import Swaps

router = APIRouter()


@router.get("/health/live", **describe_probe("Is the process healthy?"))
async def live(request: Request) -> JSONResponse:
    """Return 200 while the server works, and 503 once it has to be restarted."""
    service: DecodeService = request.app.state.service
    lifecycle = service.lifecycle
    if lifecycle.state is State.FAILED:
        return JSONResponse({"state": lifecycle.state, "reason": lifecycle.reason}, 503)
    return JSONResponse({"state": lifecycle.state})


@router.get("/health/ready", **describe_probe("Does the server accept requests?"))
async def ready(request: Request) -> JSONResponse:
    """Return 200 while the server accepts requests: not before the warm-up has ended, nor while it drains or stalls."""
    service: DecodeService = request.app.state.service
    lifecycle = service.lifecycle
    state = lifecycle.state
    if state in (State.STALLED, State.LOADING):
        return JSONResponse({"state": state, "reason": lifecycle.reason}, 503)
    return JSONResponse({"state": state}, 200 if state is State.READY else 503)


@router.get("/metrics", **describe_get("operation", "Prometheus metrics", TEXT, ANY_REQUEST))
async def metrics(request: Request) -> Response:
    """Return the Prometheus metrics."""
    service: DecodeService = request.app.state.service
    exposition = await service.in_thread(service.metrics.exposition)
    return Response(exposition, media_type=CONTENT_TYPE_LATEST)


@router.get("/info", **describe_get("operation", "Decoders, sizes, limits and costs"))
async def info(request: Request) -> Info:
    """Return the decoders, their sizes and memory, the limits of the server and the measured cost of each stage."""
    swaps: Swaps | None = request.app.state.swaps
    return describe(request.app.state.service, [] if swaps is None else swaps.memory())
