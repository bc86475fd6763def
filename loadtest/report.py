"""Reports of a run: a table for the terminal, JSON, and a self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import ConfigError
from loadtest import plots
from loadtest.documents import to_document
from loadtest.faults import FaultResult
from loadtest.generator import Run
from loadtest.scenario import Scenario
from loadtest.schedule import Capacity
from loadtest.scrape import Sample
from loadtest.summary import PERCENTILES, ClassSummary, Summary

_MAX_LAG_MS = 20.0  # 99th percentile of the generator's lag above which latencies are doubtful
_COLUMNS = ("class", "sent", "in time", "late", "rejected", "disconnected", "errors", "goodput/s")

# Published keys of report.json that differ from the names of the fields.
_KEYS = {
    "rejected": "refused",
    "disconnected": "left",
    "rejection_p99_ms": "refusal_p99_ms",
    "expected": "promised",
    "affected": "met",
    "recovered": "served",
    "as_expected": "as_promised",
}


@dataclass(frozen=True)
class Report:
    """Everything that is known about a finished run."""

    scenario: Scenario
    capacity: Capacity
    run: Run
    samples: Sequence[Sample]
    summary: Summary
    target: str  # name of the server under test
    faults: Sequence[FaultResult] = ()

    def table(self) -> str:
        """Return the results as text."""
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:{'<' if column == 0 else '>'}{widths[column]}}" for column, cell in enumerate(row))
            for row in rows
        ]
        return "\n".join([*self._preface(), "", *lines, "", *self._notes(), *self._verdict()])

    def document(self) -> dict[str, Any]:
        """Return the results as plain data. Times are seconds unless the key ends in `_ms`."""
        return {
            "scenario": self.scenario.model_dump(mode="json"),
            "against": self.target,
            "load_average": list(os.getloadavg()),
            "summary": to_document(self.summary, _KEYS),
            "passed": self.summary.passed,
            "faults": to_document(self.faults, _KEYS),
            "outcomes": to_document(self.run.outcomes, _KEYS),
            "samples": to_document(self.samples, _KEYS),
        }

    def write(self, folder: Path) -> list[Path]:
        """Write report.json, report.html and, if matplotlib is installed, report.png; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        document, page, image = (folder / f"report.{suffix}" for suffix in ("json", "html", "png"))
        document.write_text(json.dumps(self.document()))
        try:
            figure: bytes | None = plots.figure(self.scenario, self.run, self.samples)
        except ImportError:
            figure = None
        page.write_text(self.html(figure))
        if figure is None:
            return [document, page]
        image.write_bytes(figure)
        return [document, page, image]

    def html(self, figure: bytes | None) -> str:
        """Return the results as an HTML page without external resources, with `figure` (PNG) embedded."""
        rows = self._rows()
        cells = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False)
        ]
        verdicts = [
            f'<li class="{css}">{html.escape(str(check.threshold))}: {check.value:.4g}</li>'
            for check in self.summary.checks
            for css in ["pass" if check.passed else "fail"]
        ]
        plot = "Plots need matplotlib."
        if figure is not None:
            plot = f'<img alt="Plots" src="data:image/png;base64,{base64.b64encode(figure).decode()}">'
        return _PAGE.format(
            title=html.escape(self.scenario.title),
            preface="<br>".join(map(html.escape, self._preface()[1:])),
            rows="".join(f"<tr>{row}</tr>" for row in cells),
            verdicts="".join(verdicts),
            notes="<br>".join(map(html.escape, self._notes())),
            plot=plot,
        )

    def _rows(self) -> list[tuple[str, ...]]:
        header = (*_COLUMNS, *(f"p{q:g} ms" for q in PERCENTILES), "rejection p99")
        return [header, *map(_row, [*self.summary.classes, self.summary.total])]

    def _preface(self) -> list[str]:
        scenario, measures = self.scenario, self.summary.measures
        rates = f"{measures['rate']:.2f} requests per second for {scenario.duration:g} s"
        try:
            rates += f"; capacity {self.capacity.rate(scenario.open_mix):.2f}"
        except ConfigError:  # decoding costs no time
            rates += "; unlimited capacity"
        return [scenario.title, *([scenario.about] if scenario.about else []), f"{self.target}: {rates}"]

    def _notes(self) -> list[str]:
        notes = []
        if self.summary.total.rejected:
            notes.append(f"requests rejected within {self.summary.total.rejection_p99_ms:.1f} ms (p99)")
        notes += self._measure_notes()
        notes += map(str, self.faults)
        notes += [f"{count} x {reason}" for reason, count in self.summary.errors.items()]
        return notes

    def _measure_notes(self) -> list[str]:
        m = self.summary.measures
        load, cores = os.getloadavg()[0], os.cpu_count()
        notes = [
            f"goodput {100 * m['goodput_of_capacity']:.1f} % of device time; {m['mean_batch']:.2f} images per step; "
            f"memory {m['memory_growth_mb']:+.0f} MB from the second quarter to the last",
            f"generator: {100 * m['generator_cpu']:.0f} % of a core, lag {m['lag_p99_ms']:.1f} ms (p99), "
            f"{m['lag_max_ms']:.1f} ms (max); server: {100 * m['server_cpu']:.0f} % of a core; "
            f"load average {load:.1f} on {cores} cores",
        ]
        if m["lag_p99_ms"] > _MAX_LAG_MS:
            notes.append(
                "The generator could not keep up; its lag is part of all latencies. Lower the rate or free cores."
            )
        return notes

    def _verdict(self) -> list[str]:
        return [
            f"{'pass' if check.passed else 'FAIL'}  {check.threshold}: {check.value:.4g}"
            for check in self.summary.checks
        ]


def _row(summary: ClassSummary) -> tuple[str, ...]:
    counts = (
        summary.sent,
        summary.in_time,
        summary.late,
        summary.rejected,
        summary.disconnected,
        summary.errors,
    )
    times = (*summary.latency_ms.values(), summary.rejection_p99_ms)
    return (
        summary.name,
        *map(str, counts),
        f"{summary.goodput:.2f}",
        *("-" if math.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in times),
    )


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
{plot}
</body></html>
"""
