"""Results of one part of the check, and their JSON form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Value = str | int | float | None
Status = Literal["done", "failed", "skipped", "out of time", "unfinished"]
Origin = Mapping[str, str]  # where and when a part ran: device, driver, versions, commit, date


@dataclass(frozen=True)
class Measurement:
    """One row of the part's table: values by column name."""

    values: Mapping[str, Value]


@dataclass(frozen=True)
class Note:
    """A remark shown below the table."""

    text: str


@dataclass(frozen=True)
class Skipped:
    """The part does not apply here; `text` gives the reason."""

    text: str


@dataclass(frozen=True)
class Failed:
    """A check or a measurement that failed; `text` gives the reason."""

    text: str


Finding = Measurement | Note | Skipped | Failed
_KINDS: Mapping[str, type[Note] | type[Skipped] | type[Failed]] = {"note": Note, "skipped": Skipped, "failed": Failed}


def to_row(finding: Finding) -> dict[str, Value]:
    """Return the finding as an object of the JSON report."""
    if isinstance(finding, Measurement):
        return dict(finding.values)
    return {next(key for key, kind in _KINDS.items() if isinstance(finding, kind)): finding.text}


def from_row(row: Mapping[str, Any]) -> Finding:
    """Inverse of `to_row`. A measurement does not consist of a single column called note, skipped or failed."""
    for key, kind in _KINDS.items():
        if list(row) == [key]:
            return kind(row[key])
    return Measurement(row)


@dataclass(frozen=True)
class Result:
    """Outcome of one part."""

    status: Status
    seconds: float
    findings: Sequence[Finding] = field(default_factory=tuple)
    origin: Origin = field(default_factory=dict)

    @classmethod
    def of(cls, findings: Sequence[Finding], seconds: float, origin: Origin | None = None) -> Result:
        """Build the result of a part that ran to completion; its status follows from its findings."""
        status: Status = "done"
        if any(isinstance(finding, Failed) for finding in findings):
            status = "failed"
        elif any(isinstance(finding, Skipped) for finding in findings):
            status = "skipped"
        return cls(status, seconds, tuple(findings), origin or {})

    def to_json(self) -> dict[str, Any]:
        """Return the part's object of the JSON report."""
        rows = [to_row(finding) for finding in self.findings]
        return {"status": self.status, "seconds": round(self.seconds, 1), "origin": dict(self.origin), "rows": rows}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Result:
        """Inverse of `to_json`."""
        findings = tuple(from_row(row) for row in document["rows"])
        return cls(document["status"], document["seconds"], findings, document["origin"])
