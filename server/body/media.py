"""Media types and content negotiation: the Content-Type and Accept headers (RFC 9110)."""

from __future__ import annotations

from email.message import Message
from urllib.request import parse_http_list

from server.body.quoting import one_of
from server.errors import NotAcceptableError, UnsupportedMediaTypeError
from server.images.formats import IMAGE_FORMATS, ImageFormat

SAFETENSORS = "application/x-safetensors"
NPY = "application/x-npy"
RAW = "application/octet-stream"
JSON = "application/json"
FORM = "multipart/form-data"
BODY_TYPES = (SAFETENSORS, NPY, RAW, JSON, FORM)

_MAX_ACCEPT = 1024  # characters of an Accept header that are read


def header_value(value: str) -> tuple[str, dict[str, str]]:
    """Split a header `value; name=value; …`, such as Content-Type, into its value in lower case and its parameters.

    A header that cannot be parsed is treated as empty.
    """
    message = Message()
    message["Content-Type"] = value
    try:
        (first, _), *params = message.get_params(failobj=[("", "")])
    except ValueError:  # an RFC 2231 section number of thousands of digits
        return "", {}
    # RFC 2231 values, as in filename*=UTF-8''a.npy, are (charset, language, text).
    return first.strip().lower(), {name.lower(): text if isinstance(text, str) else text[2] for name, text in params}


def unsupported(complaint: str) -> UnsupportedMediaTypeError:
    """Return the error for a body of an unsupported kind; the message lists the supported ones."""
    return UnsupportedMediaTypeError(f"{complaint}; send {one_of(BODY_TYPES)}.")


def negotiate(option: ImageFormat | None, accept: str | None, batch: bool) -> ImageFormat:
    """Choose the image format of a response: the request's option if it is set, otherwise the best that Accept allows.

    The response to a batch is multipart/mixed, so a client that accepts this accepts any image in it. Formats
    with equal q-values are preferred in the order PNG, WebP, JPEG. Media ranges that cannot be parsed are ignored.

    Raises:
        NotAcceptableError: the Accept header allows none of the formats.
    """
    if option is not None:
        return option
    if accept is None or not accept.strip():
        return IMAGE_FORMATS[0]
    if batch:
        accept = accept.replace("multipart/mixed", "image/*")
    ranges = dict(filter(None, map(_media_range, parse_http_list(accept[:_MAX_ACCEPT]))))

    def quality(image: ImageFormat) -> float:  # that of the most specific matching range, even if another is higher
        return next((ranges[name] for name in (f"image/{image}", "image/*", "*/*") if name in ranges), 0.0)

    best = max(IMAGE_FORMATS, key=quality)
    if quality(best) == 0:
        formats = one_of(f"image/{image}" for image in IMAGE_FORMATS)
        raise NotAcceptableError(f"None of the formats in the Accept header is supported; accept {formats}.")
    return best


def _media_range(text: str) -> tuple[str, float] | None:
    """Return a media range and its q-value, or None if the q-value is invalid."""
    name, params = header_value(text)
    try:
        weight = float(params.get("q", "1"))
    except ValueError:
        return None
    return (name, weight) if 0 <= weight <= 1 else None
