"""Headers of a request with a body, as far as they have the same meaning in every protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from server.body.media import header_value, unsupported
from server.body.options import DEADLINE_HEADER
from server.errors import BodyTooLargeError, MalformedBodyError, UnsupportedMediaTypeError, count_of
from server.request import ServerLimits

_MAX_DIGITS = 20

Fields: TypeAlias = Sequence[tuple[str, str]]  # names and values of options, not validated yet


@dataclass(frozen=True)
class Headers:
    """The validated headers of a request with a body."""

    media_type: str  # of the body, in lower case, whether supported or not; empty if it is missing
    params: Mapping[str, str]  # of the media type, such as the boundary of a form
    content_length: int | None  # at most the limit
    accept: str | None
    deadline: Fields  # the option deadline_ms, from each X-Deadline-Ms, limited to the server's maximum


def read_headers(headers: Iterable[tuple[str, str]], limits: ServerLimits) -> Headers:
    """Validate headers, whose names are in lower case.

    Raises:
        UnsupportedMediaTypeError: the body is encoded, or has more than one Content-Type.
        BodyTooLargeError, MalformedBodyError: its Content-Length is over the limit or invalid.
    """
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value)
    if any(coding.strip().lower() != "identity" for coding in values.get("content-encoding", ())):
        raise UnsupportedMediaTypeError("Content-Encoding is not supported; send the body uncompressed.")
    media_type, params = _media_type(values.get("content-type", []))
    return Headers(
        media_type,
        params,
        content_length=_content_length(values.get("content-length", []), limits.max_body_bytes),
        accept=", ".join(values["accept"]) if "accept" in values else None,
        deadline=[
            ("deadline_ms", _at_most(value, limits.max_deadline_ms))
            for value in values.get(DEADLINE_HEADER.lower(), ())
        ],
    )


def too_large(limit: int) -> BodyTooLargeError:
    """Return the error for a body of more than `limit` bytes."""
    return BodyTooLargeError(
        f"The body exceeds the limit of {count_of(limit, 'byte')}; send fewer or smaller latents per request."
    )


def _at_most(value: str, limit: int) -> str:
    """Return a deadline, or `limit` if it is longer: clients report how long they wait, whatever the server allows."""
    is_number = value.isascii() and value.isdecimal() and len(value) <= _MAX_DIGITS
    return str(limit) if is_number and int(value) > limit else value


def _media_type(values: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the media type of the body, or an empty text, and its parameters."""
    if len(values) > 1:
        raise unsupported("The request has more than one Content-Type")
    return header_value(values[0] if values else "")


def _content_length(values: Sequence[str], limit: int) -> int | None:
    if not values:
        return None
    text = values[0]
    if len(values) > 1 or not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise MalformedBodyError("The Content-Length header is invalid; let your HTTP client write it.")
    if int(text) > limit:
        raise too_large(limit)
    return int(text)
