"""Readers of flags with a syntax of their own. They raise ValueError with a message for users."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from engines.size import Size

ANY_ORIGIN = "*"
_DEFAULT_PORTS = {"http": 80, "https": 443}


def read_sizes(value: object) -> object:
    """Read comma-separated sizes; values that are not text are left to pydantic."""
    return tuple(map(Size.parse, value.split(","))) if isinstance(value, str) else value


def read_origins(value: object) -> object:
    """Read comma-separated origins of web pages (RFC 6454), or `*`, as browsers send them in the header Origin.

    Values that are not text are left to pydantic.
    """
    if not isinstance(value, str):
        return value
    origins = tuple(_read_origin(item.strip()) for item in value.split(","))
    if ANY_ORIGIN in origins and len(origins) > 1:
        raise ValueError("should be either * or a list of origins")
    return origins


def _read_origin(text: str) -> str:
    if text == ANY_ORIGIN:
        return text
    error = ValueError("should be origins such as https://example.com or http://localhost:3000, without a path, or *")
    try:
        url, port = urlsplit(text), urlsplit(text).port
    except ValueError:
        raise error from None
    expected = SplitResult(url.scheme, url.netloc, "", "", "").geturl()
    if not url.scheme or not url.hostname or "@" in url.netloc or "*" in url.netloc or text.lower() != expected.lower():
        raise error
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return f"{url.scheme}://{host}" + ("" if port in (None, _DEFAULT_PORTS.get(url.scheme)) else f":{port}")
