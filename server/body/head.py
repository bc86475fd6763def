"""Head of a decode request: everything that can be rejected before the body is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from server.body import media
from server.body.forms import check_boundary
from server.body.media import header_value, unsupported
from server.body.negotiation import negotiate
from server.body.options import DEADLINE_HEADER, merge_options
from server.body.prompts import check_prompts
from server.body.quoting import quote
from server.body.shapes import check_latent
from server.body.tensors import check_size, plain_dtype
from server.errors import BodyTooLargeError, InvalidOptionError, MalformedBodyError, UnsupportedMediaTypeError
from server.request import DecodeOptions, DecoderLimits

Fields: TypeAlias = Sequence[tuple[str, str]]  # names and values of options, not validated yet


@dataclass(frozen=True)
class DecodeHead:
    """The validated head of a decode request."""

    media_type: str  # of the body; supported
    boundary: str  # of a form
    content_length: int | None
    options: DecodeOptions  # from the query and headers
    layout: Fields  # shape and dtype of raw elements
    accept: str | None

    @property
    def is_final(self) -> bool:
        """True if the body cannot add options."""
        return self.media_type not in (media.JSON, media.FORM)


def read_head(headers: Iterable[tuple[str, str]], query: Fields, limits: DecoderLimits) -> DecodeHead:
    """Validate the headers, whose names are in lower case, and the query of a decode request.

    Raises:
        UnsupportedMediaTypeError, BodyTooLargeError, MalformedBodyError: the body cannot be read.
        InvalidOptionError: an option in the query or a header is invalid.
        InvalidLatentError: the query gives raw elements a shape or dtype that this decoder does not support.
        NotAcceptableError: no format is acceptable, and the body cannot choose another one.
    """
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value)
    if any(coding.strip().lower() != "identity" for coding in values.get("content-encoding", ())):
        raise UnsupportedMediaTypeError("Content-Encoding is not supported; send the body uncompressed.")
    media_type, boundary = _media_type(values.get("content-type", []))
    content_length = _content_length(values.get("content-length", []), limits.max_body_bytes)
    layout, fields = split_layout(media_type, query)
    fields += [("deadline_ms", value) for value in values.get(DEADLINE_HEADER.lower(), ())]
    options = merge_options(DecodeOptions(), fields)
    check_prompts(options, limits)
    if media_type == media.RAW:
        shape, dtype = read_layout(layout)
        check_latent(shape, limits)
        if content_length is not None:
            check_size("latent", shape, dtype, content_length)
    accept = ", ".join(values["accept"]) if "accept" in values else None
    head = DecodeHead(media_type, boundary, content_length, options, layout, accept)
    if head.is_final:
        negotiate(options.format, accept, batch=True)  # the body may have a batch
    return head


def split_layout(media_type: str, fields: Fields) -> tuple[Fields, list[tuple[str, str]]]:
    """Return the fields that describe raw elements, if the body may have them, and the other fields."""
    names = ("shape", "dtype") if media_type in (media.RAW, media.FORM) else ()
    return [field for field in fields if field[0] in names], [field for field in fields if field[0] not in names]


def read_layout(fields: Fields) -> tuple[tuple[int, ...], str]:
    """Return the shape and dtype of raw elements.

    Raises:
        InvalidOptionError: one of them is missing, invalid or set to different values.
        InvalidLatentError: the dtype is not supported.
    """
    layout: dict[str, str] = {}
    for name in ("shape", "dtype"):
        values = {value for key, value in fields if key == name}
        if len(values) != 1:
            raise InvalidOptionError(
                f"Raw elements need exactly one option {name}; send, for example, shape=16,64,64 and dtype=float32."
            )
        layout[name] = values.pop()
    try:
        shape = tuple(int(size) for size in layout["shape"].split(",", 8))
    except ValueError:
        raise InvalidOptionError(
            f"The option shape must be integers such as 16,64,64, not {quote(layout['shape'])}."
        ) from None
    return shape, plain_dtype("latent", layout["dtype"])


def too_large(limit: int) -> BodyTooLargeError:
    """Return the error for a body of more than `limit` bytes."""
    return BodyTooLargeError(f"The body exceeds the limit of {limit} bytes; send fewer or smaller latents per request.")


def _media_type(values: Sequence[str]) -> tuple[str, str]:
    """Return the media type of the body and the boundary of a form."""
    if len(values) > 1:
        raise unsupported("The request has more than one Content-Type")
    media_type, params = header_value(values[0] if values else "")
    if not media_type:
        raise unsupported("The request has no Content-Type")
    if media_type not in media.BODY_TYPES:
        raise unsupported(f"Content-Type {quote(media_type)} is not supported")
    boundary = params.get("boundary", "")
    if media_type == media.FORM:
        check_boundary(boundary)
    return media_type, boundary


def _content_length(values: Sequence[str], limit: int) -> int | None:
    if not values:
        return None
    text = values[0]
    if len(values) > 1 or not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise MalformedBodyError("The Content-Length header is invalid; let your HTTP client write it.")
    if int(text) > limit:
        raise too_large(limit)
    return int(text)
