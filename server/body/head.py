"""Head of a decode request: everything that can be rejected before the body is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.body import media
from server.body.detection import UNSPECIFIC_TYPES
from server.body.forms import check_boundary
from server.body.headers import Fields, Headers, read_headers
from server.body.media import unsupported
from server.body.negotiation import negotiate
from server.body.options import merge_options
from server.body.prompts import check_prompts
from server.body.quoting import quote
from server.body.selection import candidates, select_decoder
from server.body.shapes import check_latent, requested_size
from server.body.tensors import check_size, plain_dtype
from server.errors import InvalidOptionError
from server.request import DecodeOptions, ServerLimits

LAYOUT_OPTIONS = ("shape", "dtype")  # of raw elements


@dataclass(frozen=True)
class DecodeHead:
    """The validated head of a decode request."""

    media_type: str | None  # of the body; supported. None if the body shows it: safetensors or .npy
    boundary: str  # of a form
    content_length: int | None
    options: DecodeOptions  # from the query and headers
    layout: Fields  # shape and dtype of raw elements
    accept: str | None

    @property
    def is_final(self) -> bool:
        """True if the body cannot add options."""
        return self.media_type not in (media.JSON, media.FORM)


def read_head(headers: Iterable[tuple[str, str]], query: Fields, limits: ServerLimits) -> DecodeHead:
    """Validate the headers, whose names are in lower case, and the query of a decode request.

    Raises:
        UnsupportedMediaTypeError, BodyTooLargeError, MalformedBodyError: the body cannot be read.
        InvalidOptionError: an option in the query or a header is invalid.
        InvalidLatentError: the query gives raw elements a shape or dtype that no decoder supports.
        AmbiguousDecoderError: several decoders support this shape.
        NotAcceptableError: no format is acceptable, and the body cannot choose another one.
    """
    values = read_headers(headers, limits)
    media_type = _body_type(values, query)
    layout, fields = split_layout(media_type, query)
    options = merge_options(DecodeOptions(), [*fields, *values.deadline])
    decoders = candidates(options, limits)
    check_prompts(options, decoders)
    if media_type == media.RAW:
        shape, dtype = read_layout(layout)
        check_latent(shape, options, select_decoder(shape, options, limits))
        if values.content_length is not None:
            check_size("latent", shape, dtype, values.content_length)
    head = DecodeHead(
        media_type, values.params.get("boundary", ""), values.content_length, options, layout, values.accept
    )
    if head.is_final:
        if len(decoders) == 1:
            requested_size(options, decoders[0])
        # The body may have a batch.
        negotiate(options.format, head.accept, batch=True, previews=options.preview == "steps")
    return head


def split_layout(media_type: str | None, fields: Fields) -> tuple[Fields, list[tuple[str, str]]]:
    """Return the fields that describe raw elements, if the body may have them, and the other fields."""
    names = LAYOUT_OPTIONS if media_type in (None, media.RAW, media.FORM) else ()
    return [field for field in fields if field[0] in names], [field for field in fields if field[0] not in names]


def read_layout(fields: Fields) -> tuple[tuple[int, ...], str]:
    """Return the shape and dtype of raw elements.

    Raises:
        InvalidOptionError: one of them is missing, invalid or set to different values.
        InvalidLatentError: the dtype is not supported.
    """
    layout: dict[str, str] = {}
    for name in LAYOUT_OPTIONS:
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


def _body_type(headers: Headers, query: Fields) -> str | None:
    """Return the media type of the body if it is supported, or None if it is not declared."""
    if headers.media_type in UNSPECIFIC_TYPES:
        return media.RAW if any(name in LAYOUT_OPTIONS for name, _ in query) else None
    if headers.media_type not in media.BODY_TYPES:
        raise unsupported(f"Content-Type {quote(headers.media_type)} is not supported")
    if headers.media_type == media.FORM:
        check_boundary(headers.params.get("boundary", ""))
    return headers.media_type
