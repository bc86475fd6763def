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
    decoders: list[str] = Field(description="names of the decoders")
    links: dict[str, str] = Field(description="paths of the other endpoints, by purpose")


class DecoderVersion(BaseModel):
    """A decoder and what executes it."""

    name: str = Field(description="name of the decoder")
    model: str = Field(description="model in the bundle")
    runtime: str = Field(description="torch, tensorrt or simulated")


class Version(BaseModel):
    """Versions of the software that serves."""

    version: str = Field(description="version of the server")
    decoders: list[DecoderVersion] = Field(description="the decoders by name")
    torch: str = Field(description="version of PyTorch")
    python: str = Field(description="version of Python")


@router.get("/", **describe_get("operation", "Name and links", errors=ANY_REQUEST), response_model=About)
async def about(request: Request, response: Response) -> About | Response:
    """Return the name of the server and of its decoders, and where its endpoints are; in a browser, the playground."""
    page: Response | None = request.app.state.playground
    if page is not None:
        if prefers_html(request.headers.get("accept", "")):
            return page
        response.headers["Vary"] = page.headers["Vary"]
    service: DecodeService = request.app.state.service
    return About(name=NAME, version=__version__, decoders=list(service.decoders), links=LINKS)


@router.get("/version", **describe_get("operation", "Versions of the software"))
async def version(request: Request) -> Version:
    """Return the versions of the server and of what it runs on."""
    service: DecodeService = request.app.state.service
    decoders = {name: decoder.info for name, decoder in service.decoders.items()}
    return Version(
        version=__version__,
        decoders=[DecoderVersion(name=name, model=x.decoder, runtime=x.kind) for name, x in decoders.items()],
        torch=torch.__version__,
        python=platform.python_version(),
    )
