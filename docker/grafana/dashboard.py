"""Write dashboard.json from the panels: `python -m docker.grafana.dashboard`.

Panel descriptions come from the help texts of the metrics they show. A panel that reads an unknown metric stops the
program with an error message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from docker.grafana.panels import ROWS, Panel
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server.service import DecodeService
from server.service_gauges import add_service_gauges
from server.settings import Settings

OUTPUT = Path(__file__).parent / "dashboard.json"
RULES = Path(__file__).parent.parent / "prometheus/rules.yml"
_SERIES = re.compile(r"\b(?:[a-z_]+:)*(?:pid|process)_[a-z_]+(?::[a-z0-9_]+)?")
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def metric_help() -> dict[str, str]:
    """Map each series name to its help text: all server metrics, on CPU and GPU, and the recording rules."""
    runtime = SimulatedRuntime({Size(64, 64): SimulatedCost()})
    service = DecodeService(Settings(bundle=Path()), {"simulated": {"cuda:0": runtime}})
    add_service_gauges(service)
    texts: dict[str, str] = {}
    for metric in service.metrics.registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(metric.type, ("",))
        texts |= {metric.name + suffix: metric.documentation for suffix in suffixes}
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return texts | {rule["record"]: "" for group in groups for rule in group["rules"] if "record" in rule}


def series_names(query: str) -> set[str]:
    """Return the names of the metrics and recorded series that a PromQL query reads."""
    return set(_SERIES.findall(query))


def dashboard() -> dict[str, Any]:
    """Build the Grafana dashboard model (schema version 39).

    Raises:
        SystemExit: A panel reads a series that neither the server nor the rules define.
    """
    return {
        "uid": "pid",
        "title": "PiD decode server",
        "tags": ["pid"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "panels": [panel | {"id": number} for number, panel in enumerate(_panels(), 1)],
    }


def _panels() -> list[dict[str, Any]]:
    """Lay the rows out on Grafana's grid of 24 columns, each row below its heading."""
    texts = metric_help()
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _at(0, y, 24, 1)})
        x, y = 0, y + 1
        height = 4 if row[0].kind == "stat" else 8
        for panel in row:
            if x + panel.width > 24:
                x, y = 0, y + height
            panels.append(_panel(panel, texts) | {"gridPos": _at(x, y, panel.width, height)})
            x += panel.width
        y += height
    return panels


def _panel(panel: Panel, texts: Mapping[str, str]) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": _description(panel, texts),
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
        "targets": _targets(panel),
    }


def _description(panel: Panel, texts: Mapping[str, str]) -> str:
    names = sorted(name for query in panel.queries.values() for name in series_names(query))
    if unknown := [name for name in names if name not in texts]:
        raise SystemExit(
            f"dashboard.py: panel '{panel.title}' reads {unknown[0]}, "
            "which is neither a server metric nor a recording rule."
        )
    return " ".join(filter(None, dict.fromkeys([*(texts[name] for name in names), panel.notes])))


def _defaults(panel: Panel) -> dict[str, Any]:
    steps = panel.options.get("thresholds", {"green": None})
    defaults: dict[str, Any] = {
        "unit": "none" if panel.kind == "heatmap" else panel.unit,  # of a heat map's cells, which are counts
        "thresholds": {"mode": "absolute", "steps": [{"color": c, "value": v} for c, v in steps.items()]},
    }
    if panel.kind == "timeseries":
        defaults["custom"] = {"fillOpacity": 10, "showPoints": "never"}
        defaults["min"] = 0
    return defaults


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "timeseries":
        return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": panel.unit}, "cellGap": 0}
    return {}


def _targets(panel: Panel) -> list[dict[str, Any]]:
    instant = panel.kind == "table"
    return [
        {
            "refId": chr(ord("A") + number),
            "expr": query,
            "legendFormat": legend,
            "instant": instant,
            "range": not instant,
            "format": {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series"),
        }
        for number, (legend, query) in enumerate(panel.queries.items())
    ]


def _label_variable(name: str, query: str, every: str = ".+") -> dict[str, Any]:
    """Return a variable with the values of a label; `every` is the regular expression of all of them together."""
    return {
        "type": "query",
        "name": name,
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": every,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {"type": "datasource", "name": "datasource", "query": "prometheus", "current": {}},
        _label_variable("job", "label_values(pid_state, job)"),
        _label_variable("instance", 'label_values(pid_state{job=~"$job"}, instance)'),
        # A request that was rejected before its decoder was known has an empty label.
        _label_variable("decoder", 'label_values(pid_info{job=~"$job", instance=~"$instance"}, decoder)', every=".*"),
        _label_variable("stage", 'label_values(pid_stage_seconds_bucket{job=~"$job"}, stage)') | {"multi": False},
    ]


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def as_text() -> str:
    """Return dashboard.json as text."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(as_text())
