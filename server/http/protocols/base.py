"""What a protocol of decode requests consists of.

A protocol only translates: bytes to a `DecodeRequest`, and the streams of the images to bytes. Limits, deadlines, API
keys, fair shares, metrics and traces are the same for all protocols; see server/http/decoding.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastapi import APIRouter, Request, Response

from server.body.headers import Fields
from server.http.layouts import Layout
from server.http.openapi import name_decoder
from server.http.problem import PROBLEM_MEDIA_TYPE
from server.images.formats import OutputFormat
from server.metrics import ProtocolName
from server.request import DecodeOptions, DecodeRequest, ServerLimits

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]
Document: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class ParsedRequest:
    """A request whose body has been read: what to decode, and what to send back."""

    decode: DecodeRequest
    format: OutputFormat  # in which each image is encoded
    layout: Layout  # of the images in the response


@dataclass(frozen=True)
class Head:
    """The validated head of a request, and how to read its body."""

    options: DecodeOptions  # those known before the body has arrived
    is_final: bool  # the body cannot add options
    content_length: int | None
    parse: Callable[[bytes | bytearray], ParsedRequest]  # validates the body; raises PidError; called on any thread


class DecodeProtocol(ABC):
    """A protocol of decode requests.

    Attributes:
        name: Name in metrics and logs.
        has_previews: Whether responses can have previews.
        decoder_parameter: Name of the parameter of the path that names the decoder, if a path has one.
    """

    name: ProtocolName
    has_previews = False
    decoder_parameter = "decoder"

    @abstractmethod
    def owns(self, path: str) -> bool:
        """Return whether responses to requests for `path` follow this protocol, errors included."""

    @abstractmethod
    def route_of(self, path: str) -> str | None:
        """Return the route of a decode at `path`, for traces, or None if requests for `path` decode nothing."""

    @abstractmethod
    def router(self, decode: Endpoint) -> APIRouter:
        """Return the routes of the protocol; those for decode requests call `decode`."""

    @abstractmethod
    def read_head(self, headers: Iterable[tuple[str, str]], query: Fields, limits: ServerLimits) -> Head:
        """Validate the headers, whose names are in lower case, and the query of a decode request.

        Raises:
            PidError: the request is rejected before its body is read.
        """

    def error_body(self, document: Document) -> tuple[str, Document]:
        """Return media type and body of the response to an error, which `document` describes as a problem."""
        return PROBLEM_MEDIA_TYPE, document


class OnePathProtocol(DecodeProtocol):
    """A protocol whose only routes are `POST` to one path, and to the name of a decoder below it.

    Attributes:
        path: The path.
    """

    path: str

    def owns(self, path: str) -> bool:
        """Return whether this is the path of the protocol, or one directly below it."""
        return self.route_of(path) is not None

    def route_of(self, path: str) -> str | None:
        """Return the route that serves this path, if the protocol has one."""
        if path == self.path:
            return self.path
        below = path.removeprefix(f"{self.path}/")
        return self._named_path if below != path and below and "/" not in below else None

    def router(self, decode: Endpoint) -> APIRouter:
        """Return the routes."""
        router, documentation = APIRouter(), self.documentation()
        router.add_api_route(self.path, decode, methods=["POST"], name=self.name, **documentation)
        named = name_decoder(documentation)
        router.add_api_route(self._named_path, decode, methods=["POST"], name=f"{self.name}-with", **named)
        return router

    @property
    def _named_path(self) -> str:
        return f"{self.path}/{{{self.decoder_parameter}}}"

    @abstractmethod
    def documentation(self) -> Document:
        """Return the arguments that describe the route in the OpenAPI document."""


def protocol_of(path: str, protocols: Sequence[DecodeProtocol]) -> DecodeProtocol | None:
    """Return the protocol that owns `path`."""
    return next((protocol for protocol in protocols if protocol.owns(path)), None)
