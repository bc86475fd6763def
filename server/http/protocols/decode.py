"""The server's own protocol, `POST /decode`; docs/http-api.md is its reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from server.body.head import DecodeHead, read_head
from server.body.headers import Fields
from server.body.negotiation import Container, negotiate
from server.body.parse import parse_body
from server.http.containers import JsonDocument, Multipart, ZipArchive
from server.http.layouts import Layout, SingleImage
from server.http.openapi import decode_documentation
from server.http.previews import EventStream, MixedReplace
from server.http.protocols.base import Document, Head, OnePathProtocol, ParsedRequest
from server.metrics import ProtocolName
from server.request import ServerLimits

_LAYOUTS: Mapping[Container, type[Layout]] = {
    "none": SingleImage,
    "multipart": Multipart,
    "json": JsonDocument,
    "zip": ZipArchive,
    "events": EventStream,
    "replace": MixedReplace,
}


class Decode(OnePathProtocol):
    """Tensors in several formats in, images or containers of images out."""

    name: ProtocolName = "decode"
    path = "/decode"
    has_previews = True

    def documentation(self) -> Document:
        """Return the arguments that describe the route."""
        description = "Decode one latent into an image larger than the VAE's, or a batch of them into several."
        return decode_documentation() | {"description": description}

    def read_head(self, headers: Iterable[tuple[str, str]], query: Fields, limits: ServerLimits) -> Head:
        """Validate headers and query; see `server.body.head.read_head` for the errors."""
        head = read_head(headers, query, limits)
        return Head(head.options, head.is_final, head.content_length, partial(_parse, head, limits))


def _parse(head: DecodeHead, limits: ServerLimits, body: bytes | bytearray) -> ParsedRequest:
    request = parse_body(head, body, limits)
    options, batch = request.options, len(request.latents) > 1
    image_format, container = negotiate(options.format, head.accept, batch, previews=options.preview == "steps")
    return ParsedRequest(request, image_format, _LAYOUTS[container]())
