"""The report: gpu_check.json, and gpu_check.md with one table per part. Reports of several runs can be merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.benchmark.gpu_check.config import Part, RunConfig
from engines.benchmark.gpu_check.findings import Failed, Measurement, Note, Origin, Result, Skipped, Value
from engines.errors import ConfigError

JSON_NAME, TEXT_NAME, LOG_NAME = "gpu_check.json", "gpu_check.md", "gpu_check.log"

Results = Mapping[str, Result]  # by name of the part


def header(config: RunConfig) -> dict[str, str]:
    """Return the first lines of the report: the network, and a warning for a toy run."""
    lines = {"network": f"{config.description.name}, random weights"}
    if config.small:
        lines["toy"] = f"toy network and sizes on {config.device}: this only shows that every part runs"
    return lines


def write(out: Path, header: Mapping[str, str], parts: Sequence[Part], results: Results) -> None:
    """Write gpu_check.json and gpu_check.md to the directory `out`. Each file is replaced at once."""
    report = {**header, "parts": {name: result.to_json() for name, result in results.items()}}
    _replace(out / JSON_NAME, json.dumps(report, indent=2) + "\n")
    _replace(out / TEXT_NAME, render(header, parts, results))


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is complete even if this process is killed."""
    partial = path.with_suffix(f"{path.suffix}.partial")
    partial.write_text(text)
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, str], dict[str, Result]]:
    """Read the first lines and the results of a gpu_check.json.

    Raises:
        ConfigError: The file cannot be read, or is not a report of this version.
    """
    try:
        document: Any = json.loads(path.read_text())
        results = {str(name): Result.from_json(part) for name, part in document["parts"].items()}
        return {str(key): str(value) for key, value in document.items() if key != "parts"}, results
    except OSError as error:
        raise ConfigError(f"Cannot read the report {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a report that can be merged: {type(error).__name__}: {error}.") from error


def merge(
    paths: Sequence[Path], header: Mapping[str, str] | None = None
) -> tuple[Mapping[str, str], dict[str, Result]]:
    """Return the first lines and the results of several reports; of two results of a part, the later one counts.

    Args:
        paths: Reports, each a gpu_check.json.
        header: First lines that all reports must have; by default those of the first one.

    Raises:
        ConfigError: A file cannot be read, or is about another network than the others.
    """
    results: dict[str, Result] = {}
    for path in paths:
        found, parts = read(path)
        header = found if header is None else header
        if found != header:
            networks = [" / ".join(lines.values()) for lines in (found, header)]
            raise ConfigError(
                f"{path} cannot be merged: it is about {networks[0]}, and the others about {networks[1]}."
            )
        results |= parts
    return header or {}, results


def summary(result: Result) -> str:
    """Return status, seconds and the reasons of failed and skipped checks on one line."""
    reasons = [finding.text for finding in result.findings if isinstance(finding, Failed | Skipped)]
    return f"{result.status}, {result.seconds:.1f} s" + (f": {'; '.join(reasons)}" if reasons else "")


def render(header: Mapping[str, str], parts: Sequence[Part], results: Results) -> str:
    """Return the report as Markdown. Parts without a result are left out."""
    machines = list(dict.fromkeys(machine for result in results.values() if (machine := _machine(result.origin))))
    lines = ["# GPU check", "", *(f"{key}: {value}  " for key, value in header.items())]
    lines += [f"machine{f' {number}' if len(machines) > 1 else ''}: {m}  " for number, m in enumerate(machines, 1)]
    for part in parts:
        result = results.get(part.name)
        if result is None:
            continue
        lines += ["", f"## {part.title}", "", f"{summary(result)}.", *_provenance(result.origin, machines)]
        lines += _table([finding for finding in result.findings if isinstance(finding, Measurement)])
        notes = [f"- {finding.text}" for finding in result.findings if isinstance(finding, Note)]
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def _machine(origin: Origin) -> str:
    return ", ".join(f"{key} {value}" for key, value in origin.items() if key != "measured")


def _provenance(origin: Origin, machines: Sequence[str]) -> list[str]:
    """Return the line that says when a part ran, and on which machine if the report has several."""
    if "measured" not in origin:
        return []
    machine = f" on machine {machines.index(_machine(origin)) + 1}" if len(machines) > 1 else ""
    return [f"Measured {origin['measured']}{machine}."]


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
