"""Media types of request bodies, and the syntax of headers with parameters (RFC 9110)."""

from __future__ import annotations

from collections.abc import Iterable
from email.message import Message

from server.body.quoting import one_of
from server.errors import UnsupportedMediaTypeError

SAFETENSORS = "application/x-safetensors"
NPY = "application/x-npy"
RAW = "application/octet-stream"
JSON = "application/json"
FORM = "multipart/form-data"
PROBLEM = "application/problem+json"  # of errors, RFC 9457
BODY_TYPES = (SAFETENSORS, NPY, RAW, JSON, FORM)


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


def unsupported(complaint: str, supported: Iterable[str] = BODY_TYPES) -> UnsupportedMediaTypeError:
    """Return the error for a body of an unsupported kind; the message lists the supported ones."""
    return UnsupportedMediaTypeError(f"{complaint}; send {one_of(supported)}.")
