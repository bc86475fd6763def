"""Tables of the HTML report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Bar(float):
    """Table cell with a bar; the value is its length relative to the longest bar."""


def table(head: Sequence[str] | None, rows: Iterable[Sequence[str | Bar]]) -> str:
    """Format a table that scrolls if the window is too narrow; without a head, its last column wraps instead."""

    def cell(value: str | Bar) -> str:
        if isinstance(value, Bar):
            return f'<td><span class="bar" style="width:{7 * value:.2f}rem"></span></td>'
        return f"<td>{escape(value)}</td>"

    lines = ["".join(map(cell, row)) for row in rows]
    if head is not None:
        lines.insert(0, "".join(f"<th>{escape(name)}</th>" for name in head))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table{" prose" * (head is None)}"><table>{body}</table></div>'
