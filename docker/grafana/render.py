"""Draw the dashboard's panels with matplotlib: `python -m docker.grafana.render --prometheus http://127.0.0.1:9090`.

For machines without Grafana; `docker.grafana.example` draws docs/dashboard.png with it. Needs the `dev` extra.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from matplotlib.figure import Figure

from docker.grafana import charts
from docker.grafana.model import Panel
from docker.grafana.panels import ROWS
from docker.grafana.query import STAGE, PrometheusClient, Series
from engines.cli import ArgumentParser

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 130
_COLUMNS = 24  # as in Grafana
# Lengths in inches: the figure, the heights of its lines, and the space that a panel needs around its chart.
_WIDTH, _HEADING, _STAT, _CHART, _TABLE = 11.0, 0.34, 0.42, 1.08, 1.5
_LEFT, _RIGHT, _ABOVE, _BELOW, _LEGEND_ROW = 0.9, 0.2, 0.26, 0.3, 0.14


@dataclass(frozen=True)
class _Line:
    """Panels next to each other, or a heading."""

    height: float
    axes: Sequence[tuple[Axes, Panel]] = ()
    heading: str = ""
    font_size: float = 10.0  # of the heading, in points


def draw(prometheus: PrometheusClient, title: str = "", rows: Sequence[str] = tuple(ROWS)) -> tuple[Figure, list[str]]:
    """Draw the panels of `rows`.

    Returns:
        The figure, and the titles of the panels that have no data. These are left out.
    """
    figure, colours = Figure(), charts.Colours()
    lines = [_Line(_HEADING, heading=title, font_size=12.0)] if title else []
    empty: list[str] = []
    for row in rows:
        series = {panel.title: prometheus.fetch(panel) for panel in ROWS[row]}
        empty += [title for title, found in series.items() if not found]
        lines.append(_Line(_HEADING, heading=row))
        for panels in _divide(panel for panel in ROWS[row] if series[panel.title]):
            line = [(figure.add_axes((0, 0, 1, 1), label=panel.title), panel) for panel in panels]
            heights = [_draw_panel(axes, panel, series[panel.title], prometheus, colours) for axes, panel in line]
            lines.append(_Line(_ABOVE + max(heights), line))
    _arrange(figure, lines)
    return figure, empty


def _divide(panels: Iterable[Panel]) -> Iterator[list[Panel]]:
    """Divide panels into lines that fit into the grid."""
    line: list[Panel] = []
    for panel in panels:
        if sum(each.width for each in line) + panel.width > _COLUMNS:
            yield line
            line = []
        line.append(panel)
    if line:
        yield line


def _draw_panel(
    axes: Axes, panel: Panel, series: Sequence[Series], prometheus: PrometheusClient, colours: charts.Colours
) -> float:
    """Draw a panel and return its height without the title."""
    axes.set_title(panel.title.replace("$stage", STAGE), fontsize=8.5, loc="left")
    if panel.kind == "stat":
        charts.draw_stat(axes, panel, series)
        return _STAT
    if panel.kind == "table":
        charts.draw_table(axes, panel, series)
        return _TABLE
    if panel.kind == "heatmap":
        charts.draw_heat_map(axes, panel, series, prometheus.rate_interval)
    else:
        charts.draw_curves(axes, panel, series, colours)
    charts.add_times(axes, prometheus.start, prometheus.end)
    return _CHART + _BELOW + _LEGEND_ROW * charts.add_legend(axes)


def _arrange(figure: Figure, lines: Sequence[_Line]) -> None:
    """Set the height of the figure and the positions of everything in it, so that charts are aligned."""
    full = sum(line.height for line in lines) + _ABOVE
    figure.set_size_inches(_WIDTH, full)
    top = full
    for line in lines:
        if line.heading:
            figure.text(
                _RIGHT / _WIDTH, (top - 0.6 * _HEADING) / full, line.heading, fontsize=line.font_size, weight="bold"
            )
        column = 0
        for axes, panel in line.axes:
            chart = panel.kind in ("timeseries", "heatmap")
            left = column / _COLUMNS * _WIDTH + (_LEFT if chart else _RIGHT)
            column += panel.width
            right = column / _COLUMNS * _WIDTH - _RIGHT
            height = _CHART if chart else line.height - _ABOVE
            axes.set_position((left / _WIDTH, (top - _ABOVE - height) / full, (right - left) / _WIDTH, height / full))
        top -= line.height


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
    add("--title", default="", metavar="TEXT", help="heading, such as the load that is shown (default: none)")
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
        figure, empty = draw(prometheus, options.title, options.rows)
    except (httpx.HTTPError, ValueError) as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    figure.savefig(options.output, dpi=DPI)
    if empty:
        print(f"left out, because they have no data: {', '.join(empty)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
