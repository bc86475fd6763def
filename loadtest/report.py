"""What a run leaves behind: a table for the terminal, JSON, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.errors import ConfigError
from loadtest import plots
from loadtest.faults import FaultResult
from loadtest.generator import Run
from loadtest.scenario import Scenario, Threshold
from loadtest.schedule import Capacity
from loadtest.scrape import Sample
from loadtest.summary import PERCENTILES, ClassSummary, Summary

_LATE_GENERATOR_MS = 20.0  # lag of the slowest percent from which the generator itself is in doubt

_COLUMNS = ("class", "sent", "in time", "late", "refused", "left", "errors", "goodput/s")


@dataclass(frozen=True)
class Report:
    scenario: Scenario
    capacity: Capacity
    run: Run
    samples: Sequence[Sample]
    summary: Summary
    against: str  # what was tested, in words
    faults: Sequence[FaultResult] = ()

    def table(self) -> str:
        """The whole result as text."""
        rows = [_header(), *map(_row, [*self.summary.classes, self.summary.total])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:{'<' if column == 0 else '>'}{widths[column]}}" for column, cell in enumerate(row))
            for row in rows
        ]
        return "\n".join([*self._preface(), "", *lines, "", *self._notes(), *self._verdict()])

    def document(self) -> dict[str, Any]:
        """The whole result as plain data: times in seconds, unless the name says ms."""
        return _finite(
            {
                "scenario": self.scenario.model_dump(mode="json"),
                "against": self.against,
                "load_average": os.getloadavg(),
                "summary": asdict(self.summary),
                "passed": self.summary.passed,
                "faults": [asdict(result) for result in self.faults],
                "outcomes": [asdict(outcome) for outcome in self.run.outcomes],
                "samples": [asdict(sample) for sample in self.samples],
            }
        )

    def write(self, folder: Path) -> list[Path]:
        """report.json, report.html and, with matplotlib, report.png; the paths written."""
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "report.json", folder / "report.html"]
        written[0].write_text(json.dumps(self.document()))
        try:
            picture: bytes | None = plots.figure(self.scenario, self.run, self.samples)
        except ImportError:
            picture = None
        if picture is not None:
            written.append(folder / "report.png")
            written[-1].write_bytes(picture)
        written[1].write_text(self.html(picture))
        return written

    def html(self, picture: bytes | None) -> str:
        """A page on its own, with `picture` (PNG) in it."""
        rows = [_header(), *map(_row, [*self.summary.classes, self.summary.total])]
        cells = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False)
        ]
        verdicts = [
            f'<li class="{css}">{html.escape(str(check.threshold))}: {check.value:.4g}</li>'
            for check in self.summary.checks
            for css in ["pass" if check.passed else "fail"]
        ]
        figure = "Plots need matplotlib."
        if picture is not None:
            figure = f'<img alt="Plots" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        return _PAGE.format(
            title=html.escape(self.scenario.title),
            preface="<br>".join(map(html.escape, self._preface()[1:])),
            rows="".join(f"<tr>{row}</tr>" for row in cells),
            verdicts="".join(verdicts),
            notes="<br>".join(map(html.escape, self._notes())),
            figure=figure,
        )

    def _preface(self) -> list[str]:
        scenario, measures = self.scenario, self.summary.measures
        rates = f"{measures['rate']:.2f} requests a second for {scenario.duration:g} s"
        try:
            rates += f"; the devices can do {self.capacity.rate(scenario.mix):.2f}"
        except ConfigError:  # a device that takes no time has no capacity
            rates += "; the devices take no time"
        return [scenario.title, *([scenario.about] if scenario.about else []), f"{self.against}: {rates}"]

    def _notes(self) -> list[str]:
        m = self.summary.measures
        load, cores = os.getloadavg()[0], os.cpu_count()
        notes = [
            f"refusals answered within {self.summary.total.refusal_p99_ms:.1f} ms (p99)" if self._refused else "",
            f"goodput is {100 * m['goodput_of_capacity']:.1f} % of device time; {m['mean_batch']:.2f} images a step; "
            f"memory {m['memory_growth_mb']:+.0f} MB from the second quarter to the last",
            f"generator: {100 * m['generator_cpu']:.0f} % of a core, sends late by {m['lag_p99_ms']:.1f} ms (p99), "
            f"{m['lag_max_ms']:.1f} ms at most; server: {100 * m['server_cpu']:.0f} % of a core; "
            f"load average {load:.1f} on {cores} cores",
        ]
        if m["lag_p99_ms"] > _LATE_GENERATOR_MS:
            notes.append("The generator was late itself: its lag is part of every latency above.")
        notes += map(str, self.faults)
        notes += [f"{count} x {reason}" for reason, count in self.summary.errors.items()]
        return [note for note in notes if note]

    @property
    def _refused(self) -> bool:
        return self.summary.total.refused > 0

    def _verdict(self) -> list[str]:
        return [
            f"{'pass' if check.passed else 'FAIL'}  {check.threshold}: {check.value:.4g}"
            for check in self.summary.checks
        ]


def _header() -> tuple[str, ...]:
    return (*_COLUMNS, *(f"p{q:g} ms" for q in PERCENTILES), "refusal p99")


def _row(summary: ClassSummary) -> tuple[str, ...]:
    counts = (summary.sent, summary.in_time, summary.late, summary.refused, summary.left, summary.errors)
    times = (*summary.latency_ms.values(), summary.refusal_p99_ms)
    return (
        summary.name,
        *map(str, counts),
        f"{summary.goodput:.2f}",
        *("-" if math.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in times),
    )


def _finite(value: Any) -> Any:
    """Plain data for JSON, which has no NaN: None instead."""
    if isinstance(value, Threshold):
        return value.model_dump()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
.pass::marker {{ content: "\\2713  "; color: #090; }}
.fail::marker {{ content: "\\2717  "; color: #c00; }}
.fail {{ color: #c00; }}
</style></head><body>
<h1>{title}</h1><p>{preface}</p>
<table>{rows}</table>
<ul>{verdicts}</ul><p>{notes}</p>
{figure}
</body></html>
"""
