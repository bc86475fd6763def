"""Readers of flags with a syntax of their own. They raise ValueError with a message for users."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from engines.size import Size

# A name has no slash, so that a path that contains "=" begins with ./ or / at the latest.
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_NAMED_BUNDLE = re.compile(rf"({_NAME})=(.*)")
_BETWEEN_BUNDLES = re.compile(rf",\s*(?={_NAME}=)")  # a path may contain commas

ANY_ORIGIN = "*"
_DEFAULT_PORTS = {"http": 80, "https": 443}


def read_sizes(value: object) -> object:
    """Read comma-separated sizes; values that are not text are left to pydantic."""
    return tuple(map(Size.parse, value.split(","))) if isinstance(value, str) else value


def read_bundles(value: object) -> object:
    """Read one `[NAME=]DIR`, or several `NAME=DIR` as a list or separated by commas, as directories by name.

    The name of a single bundle may be missing; it is empty then. Other values are left to pydantic.
    """
    if isinstance(value, Path):
        return {"": value}
    if not isinstance(value, str | list):
        return value
    bundles: dict[str, Path] = {}
    items = [item for text in ([value] if isinstance(value, str) else value) for item in _BETWEEN_BUNDLES.split(text)]
    for item in items:
        match = _NAMED_BUNDLE.fullmatch(item)
        name, path = match.groups() if match else ("", item)
        if not path:
            raise ValueError("should have a directory after the name, as in flux=bundles/flux")
        if not name and len(items) > 1:
            raise ValueError("should name each of several bundles, as in flux=bundles/flux")
        if name in bundles:
            raise ValueError(f"should be bundles with different names; {name} occurs twice")
        bundles[name] = Path(path)
    return bundles


def is_decoder_name(text: str) -> bool:
    """Return whether a text can be the name of a decoder, which is a part of paths."""
    return re.fullmatch(_NAME, text) is not None


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
