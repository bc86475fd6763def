"""The results for people: a table a part, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engines.benchmark.gpu_check.setting import Part, Row

Status = Literal["done", "failed", "skipped", "out of time"]
SENTENCES = ("note", "skipped", "failed")


@dataclass
class Result:
    """What came of a part."""

    status: Status
    seconds: float
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Row], seconds: float) -> Result:
        """Of a part that came to its end."""
        status: Status = "done"
        for row in rows:
            if "failed" in row:
                status = "failed"
            elif "skipped" in row and status == "done":
                status = "skipped"
        return cls(status, seconds, list(rows))


def summary(result: Result) -> str:
    """In one line."""
    sentences = [str(row[key]) for row in result.rows for key in ("failed", "skipped") if key in row]
    return f"{result.status}, {result.seconds:.1f} s" + (f": {'; '.join(sentences)}" if sentences else "")


def render(header: dict[str, Any], parts: Sequence[Part], results: dict[str, Result]) -> str:
    lines = ["# GPU check", ""]
    lines += [f"{key}: {value}  " for key, value in header.items()]
    for part in parts:
        result = results.get(part.name)
        if result is not None:
            lines += ["", f"## {part.title}", "", f"{summary(result)}.", *_table(result.rows)]
            notes = [f"- {row['note']}" for row in result.rows if "note" in row]
            lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in SENTENCES))
    if not columns:
        return []
    body = [[_cell(row.get(column)) for column in columns] for row in rows if set(row) - set(SENTENCES)]
    return ["", _line(columns), _line(["---"] * len(columns)), *map(_line, body)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value).replace("|", "\\|")
