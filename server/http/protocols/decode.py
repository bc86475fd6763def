"""The server's own protocol, `POST /decode`; docs/http-api.md is its reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from fastapi import APIRouter, Request, Response

from server.body.head import DecodeHead, read_head
from server.body.headers import Fields
from server.body.negotiation import Container, negotiate
from server.body.parse import parse_body
from server.http.containers import JsonDocument, Multipart, ZipArchive
from server.http.layouts import Layout, SingleImage
from server.http.openapi import decode_documentation
from server.http.problem import PROBLEM_MEDIA_TYPE
from server.http.protocols.base import Document, Endpoint, Head, ParsedRequest
from server.metrics import ProtocolName
from server.request import DecoderLimits

PATH = "/decode"
_LAYOUTS: Mapping[Container, type[Layout]] = {
    "none": SingleImage,
    "multipart": Multipart,
    "json": JsonDocument,
    "zip": ZipArchive,
}


class Decode:
    """Tensors in several formats in, images or containers of images out."""

    name: ProtocolName = "decode"

    def owns(self, path: str) -> bool:
        """Return whether this is the path of the protocol."""
        return path == PATH

    def route_of(self, path: str) -> str | None:
        """Return the path of the protocol, if it is this path."""
        return PATH if path == PATH else None

    def router(self, decode: Endpoint) -> APIRouter:
        """Return the route."""
        router = APIRouter()

        @router.post(PATH, **decode_documentation())
        async def decode_latents(request: Request) -> Response:
            """Decode one latent into an image four times the size, or a batch of them into a multipart response."""
            return await decode(request)

        return router

    def read_head(self, headers: Iterable[tuple[str, str]], query: Fields, limits: DecoderLimits) -> Head:
        """Validate headers and query; see `server.body.head.read_head` for the errors."""
        head = read_head(headers, query, limits)
        return Head(head.options, head.is_final, head.content_length, partial(_parse, head, limits))

    def error_body(self, document: Document) -> tuple[str, Document]:
        """Return the problem document."""
        return PROBLEM_MEDIA_TYPE, document


def _parse(head: DecodeHead, limits: DecoderLimits, body: bytes | bytearray) -> ParsedRequest:
    request = parse_body(head, body, limits)
    image_format, container = negotiate(request.options.format, head.accept, batch=len(request.latents) > 1)
    return ParsedRequest(request, image_format, _LAYOUTS[container]())
