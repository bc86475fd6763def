"""The documents of GET / and GET /version."""

from __future__ import annotations

import platform

import torch
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from engines import __version__
from server.body.negotiation import prefers_html
from server.http.openapi import ANY_REQUEST, describe_get
from server.service import DecodeService

NAME = "PiD decode server"
LINKS = {
    "documentation": "/docs",
    "openapi": "/openapi.json",
    "decode": "/decode",
    "remote_decode": "/remote-decode",
    "kserve": "/v2",
    "info": "/info",
    "version": "/version",
    "liveness": "/health/live",
    "readiness": "/health/ready",
    "metrics": "/metrics",
}

router = APIRouter()


class About(BaseModel):
    """The server, for clients that only know its address."""

    name: str
    version: str = Field(description="version of the server")
    decoder: str = Field(description="name of the decoder")
    links: dict[str, str] = Field(description="paths of the other endpoints, by purpose")


class Version(BaseModel):
    """Versions of the software that serves."""

    version: str = Field(description="version of the server")
    decoder: str = Field(description="name of the decoder in the bundle")
    runtime: str = Field(description="what executes the decoder: torch, tensorrt or simulated")
    torch: str = Field(description="version of PyTorch")
    python: str = Field(description="version of Python")


@router.get("/", **describe_get("operation", "Name and links", errors=ANY_REQUEST), response_model=About)
async def about(request: Request, response: Response) -> About | Response:
    """Return the name of the server and of its decoder, and where its endpoints are; in a browser, the playground."""
    page: Response | None = request.app.state.playground
    if page is not None:
        if prefers_html(request.headers.get("accept", "")):
            return page
        response.headers["Vary"] = page.headers["Vary"]
    service: DecodeService = request.app.state.service
    return About(name=NAME, version=__version__, decoder=service.info.decoder, links=LINKS)


@router.get("/version", **describe_get("operation", "Versions of the software"))
async def version(request: Request) -> Version:
    """Return the versions of the server and of what it runs on."""
    info = request.app.state.service.info
    return Version(
        version=__version__,
        decoder=info.decoder,
        runtime=info.kind,
        torch=torch.__version__,
        python=platform.python_version(),
    )
