"""Text for error messages: values that a client sent, quoted safely, and lists of alternatives."""

from __future__ import annotations

from collections.abc import Iterable

from server.body.json_numbers import NumberList

MAX_QUOTED = 80  # characters


def quote(value: object) -> str:
    """Return `value` as one line of printable text of at most `MAX_QUOTED` characters."""
    if isinstance(value, (dict, list, NumberList)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, memoryview):
        return "a long text"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value[:MAX_QUOTED]) if isinstance(value, str) else repr(value)
    complete = len(text) <= MAX_QUOTED and not (isinstance(value, str) and len(value) > MAX_QUOTED)
    return text if complete else f"{text[: MAX_QUOTED - 1]}…"


def one_of(items: Iterable[str]) -> str:
    """Join `items` as `a, b or c`."""
    *rest, last = items
    return f"{', '.join(rest)} or {last}" if rest else last
