"""What a protocol of decode requests consists of.

A protocol only translates: bytes to a `DecodeRequest`, and the streams of the images to bytes. Limits, deadlines, API
keys, fair shares, metrics and traces are the same for all protocols; see server/http/decoding.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from fastapi import APIRouter, Request, Response

from server.body.headers import Fields
from server.http.layouts import Layout
from server.http.problem import PROBLEM_MEDIA_TYPE
from server.images.formats import OutputFormat
from server.metrics import ProtocolName
from server.request import DecodeOptions, DecodeRequest, DecoderLimits

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


class DecodeProtocol(Protocol):
    """A protocol of decode requests.

    Attributes:
        name: Name in metrics and logs.
    """

    name: ProtocolName

    def owns(self, path: str) -> bool:
        """Return whether responses to requests for `path` follow this protocol, errors included."""
        ...

    def route_of(self, path: str) -> str | None:
        """Return the route of a decode at `path`, for traces, or None if requests for `path` decode nothing."""
        ...

    def router(self, decode: Endpoint) -> APIRouter:
        """Return the routes of the protocol; those for decode requests call `decode`."""
        ...

    def read_head(self, headers: Iterable[tuple[str, str]], query: Fields, limits: DecoderLimits) -> Head:
        """Validate the headers, whose names are in lower case, and the query of a decode request.

        Raises:
            PidError: the request is rejected before its body is read.
        """
        ...

    def error_body(self, document: Document) -> tuple[str, Document]:
        """Return media type and body of the response to an error, which `document` describes as a problem."""
        ...


def error_body(protocol: DecodeProtocol | None, document: Document) -> tuple[str, Document]:
    """Return media type and body of an error's response; outside protocols, this is the problem document itself."""
    return (PROBLEM_MEDIA_TYPE, document) if protocol is None else protocol.error_body(document)


def protocol_of(path: str, protocols: Sequence[DecodeProtocol]) -> DecodeProtocol | None:
    """Return the protocol that owns `path`."""
    return next((protocol for protocol in protocols if protocol.owns(path)), None)
