"""The report: gpu_check.json, and gpu_check.md with one table per part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from engines.benchmark.gpu_check.config import Part, RunConfig
from engines.benchmark.gpu_check.findings import Failed, Measurement, Note, Result, Skipped, Value


def header(config: RunConfig) -> dict[str, str]:
    """Return the first lines of the report: date, network, and a warning for a toy run."""
    lines = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "network": f"{config.description.name}, random weights",
    }
    if config.small:
        lines["toy"] = f"toy network and sizes on {config.device}: this only shows that every part runs"
    return lines


def write(out: Path, header: Mapping[str, str], parts: Sequence[Part], results: Mapping[str, Result]) -> None:
    """Write gpu_check.json and gpu_check.md to the directory `out`."""
    report = {**header, "parts": {name: result.to_json() for name, result in results.items()}}
    (out / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "gpu_check.md").write_text(render(header, parts, results))


def summary(result: Result) -> str:
    """Return status, seconds and the reasons of failed and skipped checks on one line."""
    reasons = [finding.text for finding in result.findings if isinstance(finding, Failed | Skipped)]
    return f"{result.status}, {result.seconds:.1f} s" + (f": {'; '.join(reasons)}" if reasons else "")


def render(header: Mapping[str, str], parts: Sequence[Part], results: Mapping[str, Result]) -> str:
    """Return the report as Markdown. Parts without a result are left out."""
    lines = ["# GPU check", "", *(f"{key}: {value}  " for key, value in header.items())]
    for part in parts:
        result = results.get(part.name)
        if result is None:
            continue
        lines += ["", f"## {part.title}", "", f"{summary(result)}."]
        lines += _table([finding for finding in result.findings if isinstance(finding, Measurement)])
        notes = [f"- {finding.text}" for finding in result.findings if isinstance(finding, Note)]
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def _table(measurements: Sequence[Measurement]) -> list[str]:
    columns = list(dict.fromkeys(column for measurement in measurements for column in measurement.values))
    if not columns:
        return []
    body = [[_cell(measurement.values.get(column)) for column in columns] for measurement in measurements]
    return ["", _line(columns), _line(["---"] * len(columns)), *map(_line, body)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value).replace("|", "\\|")
