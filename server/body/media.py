"""Media types and content negotiation: what a Content-Type names, what an Accept header asks for (RFC 9110)."""

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


def header_value(value: str) -> tuple[str, dict[str, str]]:
    """Split `type/subtype; name=value; …` into its first item, in lower case, and its parameters.

    Reads Content-Disposition as well. A header beyond repair reads as empty.
    """
    message = Message()
    message["Content-Type"] = value
    try:
        (first, _), *params = message.get_params(failobj=[("", "")])
    except ValueError:  # an RFC 2231 section number of thousands of digits
        return "", {}
    # RFC 2231 values, as in filename*=UTF-8''a.npy, come as (charset, language, text).
    return first.strip().lower(), {name.lower(): text if isinstance(text, str) else text[2] for name, text in params}


def unsupported(complaint: str) -> UnsupportedMediaTypeError:
    """The error for a body of another kind, naming the kinds that are taken."""
    return UnsupportedMediaTypeError(f"{complaint}; send {one_of((SAFETENSORS, NPY, RAW, JSON, FORM))}.")


def negotiate(option: ImageFormat | None, accept: str | None) -> ImageFormat:
    """The image format to answer with: the request's option if it names one, else the best that Accept allows.

    Among equal q-values the server's order decides: PNG, WebP, JPEG. Ranges that cannot be read are passed over.

    Raises:
        NotAcceptableError: Accept allows none of them.
    """
    if option is not None:
        return option
    if accept is None or not accept.strip():
        return IMAGE_FORMATS[0]
    ranges = dict(filter(None, map(_media_range, parse_http_list(accept[:1024]))))  # longer ones only cost time

    def quality(image: ImageFormat) -> float:  # the most specific range that matches counts, not the best
        return next((ranges[name] for name in (f"image/{image}", "image/*", "*/*") if name in ranges), 0.0)

    best = max(IMAGE_FORMATS, key=quality)
    if quality(best) == 0:
        offered = one_of(f"image/{image}" for image in IMAGE_FORMATS)
        raise NotAcceptableError(f"The Accept header allows no image format there is; accept {offered}.")
    return best


def _media_range(text: str) -> tuple[str, float] | None:
    name, params = header_value(text)
    try:
        weight = float(params.get("q", "1"))
    except ValueError:
        return None
    return (name, weight) if 0 <= weight <= 1 else None
