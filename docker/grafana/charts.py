"""Charts of single panels, drawn with matplotlib: curves, heat maps, single values and tables."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.dates as mdates
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from docker.grafana.model import Panel
from docker.grafana.query import Series
from docker.grafana.units import scale, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # by Okabe and Ito, for colour blindness
_OUTCOMES = (("200", "in-time"), ("429", "rejected"), ("499", "abandoned"), ("500", "failed"), ("504", "late"))
_GREY = "#777777"
_SMALL, _LARGE = 7.5, 13  # font sizes in points
_LEGEND_LETTERS = 46  # that fit below a chart
_SECONDS_PER_DAY = 86400.0  # matplotlib's unit of time


class Colours:
    """Gives a series the same colour in every panel, and the series of a panel different ones as far as possible."""

    def __init__(self) -> None:
        """Begin with the outcomes of requests and images, which have several names."""
        self._known = {name: colour for names, colour in zip(_OUTCOMES, _COLOURS, strict=False) for name in names}

    def of(self, labels: Sequence[str]) -> list[str]:
        """Return the colours of one panel's series, given by their labels in the legend."""
        taken = {self._known.get(label) for label in labels}
        free = itertools.cycle([colour for colour in _COLOURS if colour not in taken] or _COLOURS)
        self._known |= {label: next(free) for label in labels if label not in self._known}
        return [self._known[label] for label in labels]


def draw_curves(axes: Axes, panel: Panel, series: Sequence[Series], colours: Colours) -> None:
    """Draw curves over time. Those that are always zero share one entry of the legend.

    Limits are dashed and thresholds dotted. They do not determine the range of the axis, because they may be far above
    the curves.
    """
    limits = [each for each in series if each.label.endswith("limit")]
    zeros = [each for each in series if each not in limits and not any(each.values)]
    others = [each for each in series if each not in limits and each not in zeros]
    highest = max((value for each in others for value in each.values if not math.isnan(value)), default=0.0)
    size, _ = scale(panel.unit, highest)
    for each, colour in zip(others, colours.of([each.label for each in others]), strict=True):
        _draw_curve(axes, each, size, each.label, colour)
    if zeros:
        names = ", ".join(each.label for each in zeros) if len(zeros) <= 4 else f"{len(zeros)} others"
        _draw_curve(axes, zeros[0], size, f"0: {names}", _GREY)
    for each in limits:
        label = f"{each.label}: {text(each.values[-1], panel.unit)}"
        _draw_curve(axes, each, size, label, _GREY, "dashed")
    if panel.thresholds:
        values, across = [value / size for value in panel.thresholds], axes.get_yaxis_transform()
        plural = "s" if len(values) > 1 else ""
        label = f"threshold{plural}: {', '.join(text(value, panel.unit) for value in panel.thresholds)}"
        lines = axes.hlines(values, 0, 1, colors=list(panel.thresholds.values()), label=label, transform=across)
        lines.set(linestyle="dotted", linewidth=1.2)
    top = highest / size or 1.0
    axes.set_ylim(-0.04 * top, 1.08 * top)  # a curve at zero is above the frame
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value * size, panel.unit, highest)))


def _draw_curve(axes: Axes, series: Series, size: float, label: str, colour: str, style: str = "solid") -> None:
    days = [at / _SECONDS_PER_DAY for at in series.times]
    values = [value / size for value in series.values]
    axes.plot(days, values, color=colour, linestyle=style, linewidth=1.2, label=label)


def draw_heat_map(axes: Axes, panel: Panel, series: Sequence[Series], rate_interval: str) -> None:
    """Draw the counts of a histogram's buckets over time, from the lowest bucket with a count to the highest."""
    edges, times, counts = _buckets(series)
    used = [row for row, cells in enumerate(counts) if any(cells)]
    first, last = used[0], used[-1] + 1
    step = times[1] - times[0]
    days = [at / _SECONDS_PER_DAY for at in (times[0] - step, *times)]
    cells = [[count or math.nan for count in row] for row in counts[first:last]]
    bounds = {row + 1: text(edge, panel.unit) for row, edge in enumerate(edges) if math.isfinite(edge)}
    labelled = [row for row in bounds if first <= row <= last][:: 1 + (last - first) // 8]
    axes.set_yticks(labelled, [bounds[row] for row in labelled])
    mesh = axes.pcolormesh(days, range(first, last + 1), cells, cmap="Blues", vmin=0)
    highest = max(map(max, counts))
    axes.plot([], [], "s", color=mesh.cmap(1.0), label=f"up to {text(highest, 'none')} in {rate_interval}")


def _buckets(series: Sequence[Series]) -> tuple[list[float], list[float], list[list[float]]]:
    """Return the upper edges of the buckets, the times, and the counts by bucket and time."""
    by_edge = sorted((float(each.labels["le"]), dict(zip(each.times, each.values, strict=True))) for each in series)
    times = sorted({at for _, values in by_edge for at in values})
    cumulative = [[0.0] * len(times), *([values.get(at, 0.0) for at in times] for _, values in by_edge)]
    counts = [
        [max(0.0, upper - lower) for lower, upper in zip(*pair, strict=True)] for pair in itertools.pairwise(cumulative)
    ]
    return [edge for edge, _ in by_edge], times, counts


def draw_stat(axes: Axes, panel: Panel, series: Sequence[Series]) -> None:
    """Write a single value, in the colour of the highest threshold that it reaches."""
    value = series[0].values[-1]
    colour = next((name for limit, name in reversed(panel.thresholds.items()) if value >= limit), "black")
    axes.text(0, 0.4, text(value, panel.unit), ha="left", va="center", fontsize=_LARGE, color=colour)
    axes.set_axis_off()


def draw_table(axes: Axes, panel: Panel, series: Sequence[Series]) -> None:
    """Write the values and labels of up to twelve series."""
    rows = sorted((tuple(each.labels.values()), text(each.values[-1], panel.unit)) for each in series)
    lines = [f"{value:<9} {'  '.join(labels)}" for labels, value in rows]
    axes.text(0, 1, "\n".join(lines[:12]), ha="left", va="top", fontsize=_SMALL, family="monospace")
    axes.set_axis_off()


def add_times(axes: Axes, start: float, end: float) -> None:
    """Label the x axis with the times of day between `start` and `end`, in seconds since the epoch."""
    zone = datetime.datetime.now().astimezone().tzinfo
    locator = mdates.AutoDateLocator(minticks=4, maxticks=7, tz=zone)
    locator.intervald[mdates.MINUTELY] = [1, 2, 5, 10, 15, 30]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(mdates.DateFormatter("%H:%M" if end - start >= 300 else "%H:%M:%S", tz=zone))
    axes.set_xlim(start / _SECONDS_PER_DAY, end / _SECONDS_PER_DAY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_SMALL, length=2)
    axes.grid(alpha=0.25)


def add_legend(axes: Axes) -> int:
    """Add the legend below the chart, in as few rows as possible, and return their number."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return 0
    columns = next((n for n in range(len(labels), 1, -1) if _legend_width(labels, n) <= _LEGEND_LETTERS), 1)
    axes.legend(
        handles,
        labels,
        ncols=columns,
        loc="upper left",
        bbox_to_anchor=(0, -0.17),
        frameon=False,
        fontsize=_SMALL,
        handlelength=1,
        handletextpad=0.5,
        columnspacing=1,
        labelspacing=0.3,
        borderpad=0,
        borderaxespad=0,
    )
    return math.ceil(len(labels) / columns)


def _legend_width(labels: Sequence[str], columns: int) -> int:
    """Return the width of a legend in letters; matplotlib fills the columns from left to right."""
    return sum(max(map(len, column)) + 4 for column in np.array_split(labels, columns))
