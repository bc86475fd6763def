"""How the dashboard's panels are drawn without Grafana, from series that a test chooses."""

from __future__ import annotations

import io
import math
import re

import pytest
from matplotlib.figure import Figure

from docker.grafana.panels import ROWS
from docker.grafana.query import PrometheusClient, Series
from docker.grafana.render import draw
from docker.grafana.units import scale, text

START = 1_800_000_000.0  # seconds since the epoch
TIMES = tuple(START + 30 * i for i in range(21))  # ten minutes


class Recorded(PrometheusClient):
    """Returns the given series, by the title of the panel."""

    def __init__(self, **series: list[Series]) -> None:
        super().__init__("http://127.0.0.1", TIMES[-1] - TIMES[0])
        self.start, self.end, self._series = TIMES[0], TIMES[-1], series

    def fetch(self, panel) -> list[Series]:
        return self._series.get(panel.title.replace(" ", "_"), [])


def curve(label: str, *values: float) -> Series:
    return Series(label, {}, TIMES[: len(values)], values)


def legend(figure: Figure, panel: int = 0) -> list[str]:
    return [entry.get_text() for entry in figure.axes[panel].get_legend().get_texts()]


def tick_labels(figure: Figure) -> tuple[set[str], set[str]]:
    """Return the labels of both axes of the first panel."""
    figure.savefig(io.BytesIO())
    axes = figure.axes[0]
    return tuple({label.get_text() for label in axis.get_ticklabels()} for axis in (axes.xaxis, axes.yaxis))


@pytest.mark.parametrize("panel", [panel for row in ROWS.values() for panel in row], ids=lambda panel: panel.title)
def test_the_unit_of_every_panel_is_known(panel):
    assert scale(panel.unit, 1.0)


def test_an_unknown_unit_is_rejected():
    with pytest.raises(ValueError, match="'reqps' is not a unit of the dashboard"):
        scale("reqps", 1.0)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.0203, "s", "20.3 ms"),
        (1.5, "s", "1.5 s"),
        (120, "s", "2 min"),
        (0.985, "percentunit", "98.5 %"),
        (3 * 2**29, "bytes", "1.5 GiB"),
        (2**20, "binBps", "1 MiB/s"),
        (4.4, "suffix:requests/s", "4.4 requests/s"),
        (1024, "none", "1,024"),
        (0, "s", "0 ms"),
    ],
)
def test_values_are_written_with_readable_units(value: float, unit: str, expected: str):
    assert text(value, unit) == expected


def test_panels_without_data_are_left_out_and_named():
    figure, empty = draw(Recorded(Batch_size=[curve("mean", 1, 2)]), rows=["Queue"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Batch size"]
    assert set(empty) == {panel.title for panel in ROWS["Queue"]} - {"Batch size"}


def test_ticks_have_units_and_times_of_day():
    figure, _ = draw(
        Recorded(Predicted_wait_by_server=[curve("server", *(0.01 * i for i in range(21)))]), rows=["Queue"]
    )
    times, values = tick_labels(figure)
    assert {"0 ms", "100 ms"} <= values
    assert len(times) >= 4
    assert all(re.fullmatch(r"\d\d:\d\d", time) for time in times)


def test_a_curve_at_zero_is_visible_and_in_the_legend():
    burn = [curve(window, *[0.0] * 21) for window in ("5m", "1h")]
    figure, _ = draw(Recorded(Burn_rate_of_the_deadline_objective=burn), rows=["Traffic"])
    assert legend(figure)[0] == "0: 5m, 1h"
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 0 < top


def test_a_high_limit_is_in_the_legend_but_does_not_flatten_the_curves():
    series = [curve("waiting", 1, 5, 3), curve("queue limit", 64, 64, 64)]
    figure, _ = draw(Recorded(Images_waiting_and_running=series), rows=["Queue"])
    assert legend(figure) == ["waiting", "queue limit: 64 images"]
    assert figure.axes[0].get_ylim()[1] < 10


def test_thresholds_are_dotted_and_in_the_legend_but_do_not_flatten_the_curves():
    figure, _ = draw(Recorded(Burn_rate_of_the_deadline_objective=[curve("1h", 0.5, 2, 3)]), rows=["Traffic"])
    assert legend(figure) == ["1h", "thresholds: 1 ×, 6 ×, 14.4 ×"]
    (lines,) = figure.axes[0].collections
    assert [segment[0][1] for segment in lines.get_segments()] == [1, 6, 14.4]
    assert figure.axes[0].get_ylim()[1] < 6


@pytest.mark.parametrize(("rate", "colour"), [(0.5, "black"), (1, "blue"), (7, "orange"), (20, "red")])
def test_a_single_value_has_the_colour_of_the_threshold_that_it_reaches(rate: float, colour: str):
    figure, _ = draw(Recorded(**{"Burn_rate,_last_hour": [curve("", rate)]}), rows=["Overview"])
    (value,) = figure.axes[0].texts
    assert value.get_color() == colour


def test_a_series_has_the_same_colour_in_every_panel():
    first, second = [curve("queue", 1, 2), curve("denoise", 2, 1)], [curve("denoise", 2, 1), curve("queue", 1, 2)]
    figure, _ = draw(Recorded(**{"Stage_latency,_p99": first, "Stage_latency,_mean": second}), rows=["Latency"])
    colours = [{line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes]
    assert colours[0] == colours[1]
    assert len(set(colours[0].values())) == 2


def test_a_heat_map_shows_the_used_buckets_with_their_bounds():
    counts = {"0.1": 0, "0.2": 3, "0.5": 9, "1.0": 9, "+Inf": 9}  # cumulative
    buckets = [Series(edge, {"le": edge}, TIMES, (float(count),) * len(TIMES)) for edge, count in counts.items()]
    figure, _ = draw(Recorded(**{"Request_latency,_heat_map": buckets}), rows=["Latency"])
    _, bounds = tick_labels(figure)
    assert bounds == {"100 ms", "200 ms", "500 ms"}
    assert legend(figure) == ["up to 6 in 1m"]


def test_legends_and_charts_do_not_overlap():
    codes = [curve(f"a-long-error-code-{number}", number, 1) for number in range(9)]
    series = {panel.title.replace(" ", "_"): codes for panel in ROWS["Traffic"]}
    figure, _ = draw(Recorded(**series), title="Load", rows=["Traffic"])
    figure.canvas.draw()
    charts = [axes.get_window_extent() for axes in figure.axes]
    boxes = charts + [axes.get_legend().get_window_extent() for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert not [other for other in boxes[i + 1 :] if box.overlaps(other)]
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_gaps_in_a_curve_remain_gaps():
    figure, _ = draw(Recorded(Batch_size=[curve("mean", 1, math.nan, 2)]), rows=["Queue"])
    assert [math.isnan(value) for value in figure.axes[0].lines[0].get_ydata()] == [False, True, False]
