"""Draw the dashboard's panels with matplotlib: `python -m docker.grafana.render --prometheus http://127.0.0.1:9090`.

Used for docs/dashboard.png and on machines without Grafana. Needs the `dev` extra.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import matplotlib

from docker.grafana.panels import ROWS, Panel
from engines.cli import ArgumentParser

matplotlib.use("agg")
import matplotlib.pyplot as plt

CURVE_POINTS = 120
STAGE = "encode"  # value of the dashboard's $stage variable


class PrometheusClient:
    """Queries a Prometheus server about a window of `seconds` that ends now."""

    def __init__(self, url: str, seconds: float, rate_interval: str = "1m") -> None:
        self._client = httpx.Client(base_url=url, timeout=30)
        self._seconds, self._rate_interval = seconds, rate_interval
        self.end = time.time()

    def expand(self, query: str) -> str:
        """Replace the dashboard's variables by their initial values: all jobs and all instances."""
        query = query.replace("$__rate_interval", self._rate_interval).replace("$stage", STAGE)
        return re.sub(r"\$(job|instance)\b", ".+", query)

    def range(self, query: str) -> list[dict[str, Any]]:
        """Evaluate over the window; each series has its labels as `metric` and [time, text] pairs as `values`."""
        step = self._seconds / CURVE_POINTS
        window = {"start": str(self.end - self._seconds), "end": str(self.end), "step": f"{step:.3f}"}
        return self._result("/api/v1/query_range", {"query": self.expand(query), **window})

    def instant(self, query: str) -> list[dict[str, Any]]:
        """Evaluate now; each series has its labels as `metric` and one [time, text] pair as `value`."""
        return self._result("/api/v1/query", {"query": self.expand(query)})

    def _result(self, path: str, parameters: dict[str, str]) -> list[dict[str, Any]]:
        response = self._client.get(path, params=parameters).json()
        if response["status"] != "success":
            raise ValueError(f"Prometheus rejected the query {parameters['query']}: {response['error']}")
        result: list[dict[str, Any]] = response["data"]["result"]
        return result


def draw(prometheus: PrometheusClient, output: Path, rows: Sequence[str] = tuple(ROWS)) -> None:
    """Draw the panels of `rows` into the PNG file `output`."""
    heights = [1 if ROWS[row][0].kind == "stat" else 2 for row in rows for _ in range(_lines(row))]
    figure = plt.figure(figsize=(15, 1.6 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 12, height_ratios=heights)
    starts = {row: sum(_lines(before) for before in rows[:number]) for number, row in enumerate(rows)}
    for row in rows:
        for panel in ROWS[row]:
            line, column, width = _place(row, panel)
            axes = figure.add_subplot(grid[starts[row] + line, column : column + width])
            axes.set_title(panel.title.replace("$stage", STAGE), fontsize=9, loc="left")
            _DRAW[panel.kind](axes, panel, prometheus)
            axes.tick_params(labelsize=7)
    figure.savefig(output, dpi=80)
    plt.close(figure)


def _lines(row: str) -> int:
    return math.ceil(sum(panel.width for panel in ROWS[row]) / 24)


def _place(row: str, panel: Panel) -> tuple[int, int, int]:
    """Return the line within the row, the first column and the width, on a grid of twelve columns."""
    before = ROWS[row][: ROWS[row].index(panel)]
    line, x = divmod(sum(earlier.width for earlier in before), 24)
    return line, x // 2, panel.width // 2


def _draw_curves(axes: Any, panel: Panel, prometheus: PrometheusClient) -> None:
    for legend, query in panel.queries.items():
        for series in prometheus.range(query):
            points = [(float(at) - prometheus.end, float(value)) for at, value in series["values"]]
            label = _label(legend, series["metric"])
            if any(not math.isnan(value) for _, value in points):
                flat = all(value == 0 for _, value in points)  # constant zero: drawn, but not in the legend
                axes.plot(*zip(*points, strict=True), label=None if flat else label, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(panel.unit, fontsize=7)
    labelled, _ = axes.get_legend_handles_labels()
    if labelled:
        axes.legend(fontsize=6, loc="upper left", ncols=2 if len(labelled) > 4 else 1)


def _label(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)


def _draw_heat_map(axes: Any, panel: Panel, prometheus: PrometheusClient) -> None:
    (query,) = panel.queries.values()
    buckets = {float(series["metric"]["le"]): dict(series["values"]) for series in prometheus.range(query)}
    edges = sorted(edge for edge in buckets if math.isfinite(edge))
    times = sorted({at for values in buckets.values() for at in values})
    if not times:
        return
    counts = [[float(buckets[edge].get(at, 0)) for at in times] for edge in edges]  # cumulative over the edges
    cells = [
        counts[0],
        *([b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(counts)),
    ]
    axes.pcolormesh([at - prometheus.end for at in times], range(len(edges)), cells, cmap="magma", shading="nearest")
    axes.set_yticks(range(0, len(edges), 2), [f"{edge:g}" for edge in edges[::2]])
    axes.set_ylabel(panel.unit, fontsize=7)


def _draw_stat(axes: Any, panel: Panel, prometheus: PrometheusClient) -> None:
    (query,) = panel.queries.values()
    values = [float(series["value"][1]) for series in prometheus.instant(query)]
    text = "–" if not values else f"{100 * values[0]:.1f} %" if panel.unit == "percentunit" else f"{values[0]:.3g}"
    unit = {"s": " s", "reqps": "/s"}.get(panel.unit, "")
    axes.text(0.5, 0.5, text + unit, ha="center", va="center", fontsize=20)
    axes.set_axis_off()


def _draw_table(axes: Any, panel: Panel, prometheus: PrometheusClient) -> None:
    (query,) = panel.queries.values()
    lines = sorted(
        f"{float(series['value'][1]):<9.4g} {'  '.join(series['metric'].values())}"
        for series in prometheus.instant(query)
    )
    axes.text(0, 1, "\n".join(lines[:12]), ha="left", va="top", fontsize=7, family="monospace")
    axes.set_axis_off()


_DRAW = {"timeseries": _draw_curves, "heatmap": _draw_heat_map, "stat": _draw_stat, "table": _draw_table}


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status, 2 if Prometheus cannot be queried."""
    parser = ArgumentParser(
        prog="python -m docker.grafana.render", usage="%(prog)s [options]", description="Draw the dashboard's panels."
    )
    add = parser.add_argument
    add("--prometheus", default="http://127.0.0.1:9090", metavar="URL", help="server to query (default: %(default)s)")
    add("--seconds", type=float, default=300, help="length of the time window (default: %(default)g)")
    add(
        "--rate-interval",
        default="1m",
        metavar="DURATION",
        help="window of rate() in the queries (default: %(default)s)",
    )
    add(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="ROW",
        help=f"rows of the dashboard to draw: {', '.join(ROWS)} (default: all)",
    )
    add(
        "--output",
        type=Path,
        default=Path("dashboard.png"),
        metavar="FILE",
        help="PNG file to write (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        prometheus = PrometheusClient(options.prometheus, options.seconds, options.rate_interval)
        draw(prometheus, options.output, options.rows)
    except (httpx.HTTPError, ValueError) as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
