"""Words for error sentences: what a client sent, quoted with care, and lists of what it might send."""

from __future__ import annotations

from collections.abc import Iterable

MAX_SHOWN = 80  # characters


def quote(value: object) -> str:
    """`value` in one line of printable characters, at most `MAX_SHOWN` of them however long it is."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value[:MAX_SHOWN]) if isinstance(value, str) else repr(value)
    whole = len(text) <= MAX_SHOWN and not (isinstance(value, str) and len(value) > MAX_SHOWN)
    return text if whole else f"{text[: MAX_SHOWN - 1]}…"


def one_of(items: Iterable[str]) -> str:
    """`a, b or c`."""
    *rest, last = items
    return f"{', '.join(rest)} or {last}" if rest else last
