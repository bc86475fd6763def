"""Write dashboard.json from the panels: `python -m docker.grafana.dashboard`.

The types of Grafana's SDK decide which fields exist. Panel descriptions come from the help texts of the metrics they
show. A panel that reads an unknown metric, or links to an unknown alert, stops the program with an error message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    DataSourceRef,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DynamicConfigValue,
    GridPos,
    Threshold,
    ThresholdsMode,
    VariableModel,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from docker.grafana.annotations import ANNOTATIONS, STEP_SECONDS
from docker.grafana.model import Annotation, Panel
from docker.grafana.panels import ROWS
from docker.grafana.promql import SERVERS
from engines import __version__
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server.service import DecodeService
from server.service_gauges import add_service_gauges
from server.settings import Settings

OUTPUT = Path(__file__).parent / "dashboard.json"
RULES = Path(__file__).parent.parent / "prometheus/rules.yml"
_SERIES = re.compile(r"\b(?:[a-z_]+:)*(?:pid|process)_[a-z_]+(?::[a-z0-9_]+)?")
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_UID = "pid-decode-server"  # part of the dashboard's address, so do not change it
# Of Grafana 12.0 and 12.1. Later ones convert it; a version above its own is one that Grafana cannot convert.
_SCHEMA_VERSION = 41
_RUNBOOKS = "docs/operations.md"  # to be replaced by a URL; the same text is the default in rules.yml

_LIMIT_STYLE = [
    DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}),
    DynamicConfigValue("custom.fillOpacity", 0),
    DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "red"}),
]
_PanelBuilder = stat.Panel | timeseries.Panel | heatmap.Panel | table.Panel


def metric_help() -> dict[str, str]:
    """Map each series name to its help text: all server metrics, on CPU and GPU, and the recording rules."""
    runtime = SimulatedRuntime({Size(64, 64): SimulatedCost()})
    service = DecodeService(Settings(bundle=Path()), {"simulated": {"cuda:0": runtime}})
    add_service_gauges(service)
    texts: dict[str, str] = {}
    for metric in service.metrics.registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(metric.type, ("",))
        texts |= {metric.name + suffix: metric.documentation for suffix in suffixes}
    return texts | {rule["record"]: "" for rule in _rules() if "record" in rule}


def runbook_anchors() -> dict[str, str]:
    """Map each alert to the section of the runbook that its `runbook_url` names."""
    urls = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in _rules() if "alert" in rule}
    return {alert: url.partition("#")[2] for alert, url in urls.items()}


def _rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def series_names(query: str) -> set[str]:
    """Return the names of the metrics and recorded series that a PromQL query reads."""
    return set(_SERIES.findall(query))


def dashboard() -> Dashboard:
    """Build the dashboard.

    Raises:
        SystemExit: A query reads a series that neither the server nor the rules define, or an alert does not exist.
    """
    texts = metric_help()
    builder = (
        build.Dashboard("PiD decode server")
        .uid(_UID)
        .description(
            f"Requests, images, devices and errors of PiD decode servers of version {__version__}. "
            "Generated from docker/grafana/panels.py."
        )
        .tags(["pid"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .links([_link("Runbooks", "alerts"), _link("About the metrics", "metrics")])
        .annotations([_annotation(each, texts) for each in ANNOTATIONS])
        .variables(_variables())
    )
    for number, item in enumerate(_layout(texts), 1):
        if isinstance(item, build.Row):
            builder.with_row(item.id(number))
        else:
            builder.with_panel(item.id(number))
    built = builder.build()
    built.schema_version = _SCHEMA_VERSION
    return built


def _layout(texts: Mapping[str, str]) -> Iterator[build.Row | _PanelBuilder]:
    """Lay the rows out on Grafana's grid of 24 columns, each row below its heading."""
    runbooks, y = runbook_anchors(), 0
    for title, row in ROWS.items():
        yield build.Row(title).grid_pos(GridPos(x=0, y=y, w=24, h=1))
        x, y = 0, y + 1
        height = 4 if row[0].kind == "stat" else 8
        for panel in row:
            if x + panel.width > 24:
                x, y = 0, y + height
            yield _panel(panel, texts, runbooks).grid_pos(GridPos(x=x, y=y, w=panel.width, h=height))
            x += panel.width
        y += height


def _panel(panel: Panel, texts: Mapping[str, str], runbooks: Mapping[str, str]) -> _PanelBuilder:
    if unknown := [name for name in panel.alerts if name not in runbooks]:
        raise SystemExit(f"dashboard.py: panel '{panel.title}' links to {unknown[0]}, which is not an alert.")
    return (
        _chart(panel)
        .title(panel.title)
        .description(_description(panel, texts))
        .datasource(_SOURCE)
        .thresholds(_thresholds(panel))
        .targets([_target(panel, number, *query) for number, query in enumerate(panel.queries.items())])
        .links([_link(f"Runbook: {alert}", runbooks[alert]) for alert in panel.alerts])
    )


def _chart(panel: Panel) -> _PanelBuilder:
    """Return a panel with what only its kind of chart has."""
    if panel.kind == "stat":
        return stat.Panel().unit(panel.unit).reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if panel.kind == "table":
        return table.Panel().unit(panel.unit)
    if panel.kind == "heatmap":
        axis = heatmap.YAxisConfig().unit(panel.unit)
        return heatmap.Panel().unit("none").calculate(False).y_axis(axis).cell_gap(0)  # the cells contain counts
    curves = (
        timeseries.Panel()
        .unit(panel.unit)
        .min(0)
        .fill_opacity(10)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .override_by_regexp("/limit$/", _LIMIT_STYLE)
    )
    if panel.thresholds:
        curves.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    return curves


def _thresholds(panel: Panel) -> build.ThresholdsConfig:
    steps = [Threshold(color="green"), *(Threshold(value, colour) for value, colour in panel.thresholds.items())]
    return build.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _description(panel: Panel, texts: Mapping[str, str]) -> str:
    names = _known_names(f"panel '{panel.title}'", panel.queries.values(), texts)
    return " ".join(filter(None, dict.fromkeys([*(texts[name] for name in names), panel.notes])))


def _known_names(reader: str, queries: Iterable[str], texts: Mapping[str, str]) -> list[str]:
    """Return the names of the series that queries read."""
    names = sorted(name for query in queries for name in series_names(query))
    if unknown := [name for name in names if name not in texts]:
        raise SystemExit(
            f"dashboard.py: {reader} reads {unknown[0]}, which is neither a server metric nor a recording rule."
        )
    return names


def _target(panel: Panel, number: int, legend: str, query: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(chr(ord("A") + number)).expr(query).legend_format(legend)
    if panel.kind == "table":
        return target.instant().format(PromQueryFormat.TABLE)
    return target.range().format(PromQueryFormat.HEATMAP if panel.kind == "heatmap" else PromQueryFormat.TIME_SERIES)


def _link(title: str, anchor: str) -> build.DashboardLink:
    """Return a link to a section of the runbooks."""
    return build.DashboardLink(title).url(f"${{runbooks:raw}}#{anchor}").icon("doc").target_blank(True)


def _annotation(annotation: Annotation, texts: Mapping[str, str]) -> build.AnnotationQuery:
    _known_names(f"annotation '{annotation.name}'", [annotation.query], texts)
    return (
        build.AnnotationQuery()
        .name(annotation.name)
        .datasource(_SOURCE)
        .enable(True)
        .icon_color(annotation.colour)
        .expr(annotation.query)
        .step(f"{STEP_SECONDS}s")
        .title_format(annotation.title)
        .text_format(annotation.text)
        .use_value_for_time(annotation.values_are_times)
    )


def _variables() -> list[Builder[VariableModel]]:
    return [
        build.DatasourceVariable("datasource").type("prometheus"),
        _label_variable("job", "label_values(pid_state, job)").multi(True),
        _label_variable("instance", 'label_values(pid_state{job=~"$job"}, instance)').multi(True),
        # A request that was rejected before its decoder was known has an empty label.
        _label_variable("decoder", f"label_values(pid_info{SERVERS}, decoder)", every=".*").multi(True),
        _label_variable("stage", 'label_values(pid_stage_seconds_bucket{job=~"$job"}, stage)'),
        build.ConstantVariable("runbooks").value(_RUNBOOKS),
    ]


def _label_variable(name: str, query: str, every: str = ".+") -> build.QueryVariable:
    """Return a variable with the values of a label; `every` is the regular expression of all of them together."""
    return (
        build.QueryVariable(name)
        .datasource(_SOURCE)
        .query({"query": query, "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(every)
        .current(VariableOption(text="All", value="$__all"))
    )


def as_text() -> str:
    """Return dashboard.json as text."""
    return JSONEncoder(indent=1).encode(dashboard()) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(as_text())
