"""`python -m docker.grafana.dashboard` writes dashboard.json; each panel is described by the help of its metrics.

A metric that the server does not have, or a recording rule that Prometheus is not given, ends it with a sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from docker.grafana.panels import ROWS, Panel
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server.service import DecodeService
from server.settings import Settings

OUTPUT = Path(__file__).parent / "dashboard.json"
RULES = Path(__file__).parent.parent / "prometheus/rules.yml"
NAME = re.compile(r"\b(?:[a-z_]+:)*(?:pid|process)_[a-z_]+(?::[a-z0-9_]+)?")


def metric_helps() -> dict[str, str]:
    """Help by the name of each series that a server has, on a CPU or a GPU, and of each recording rule."""
    gpu = SimpleNamespace(memory=lambda: (0, 0), utilisation=lambda: 0.0)
    runtime = SimulatedRuntime({Size(64, 64): SimulatedCost()})
    service = DecodeService(Settings(bundle=Path()), {"cuda:0": runtime}, {"cuda:0": gpu})  # type: ignore[dict-item]
    helps: dict[str, str] = {}
    for metric in service.metrics.registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(metric.type, ("",))
        helps |= {metric.name + suffix: metric.documentation for suffix in suffixes}
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return helps | {rule["record"]: "" for group in groups for rule in group["rules"] if "record" in rule}


def names_in(query: str) -> set[str]:
    """The metrics and recorded series that a query reads."""
    return set(NAME.findall(query))


def dashboard() -> dict[str, Any]:
    helps = metric_helps()
    drawn: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        drawn.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _at(0, y, 24, 1)})
        x, y = 0, y + 1
        height = 4 if row[0].kind == "stat" else 8
        for panel in row:
            if x + panel.width > 24:
                x, y = 0, y + height
            drawn.append(_panel(panel, helps) | {"gridPos": _at(x, y, panel.width, height)})
            x += panel.width
        y += height
    for number, one in enumerate(drawn, 1):
        one["id"] = number
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
        "panels": drawn,
    }


def _panel(panel: Panel, helps: Mapping[str, str]) -> dict[str, Any]:
    names = sorted(name for query in panel.queries.values() for name in names_in(query))
    if unknown := [name for name in names if name not in helps]:
        raise SystemExit(f"dashboard.py: the panel {panel.title} reads {unknown[0]}, which no server and no rule has.")
    description = " ".join(filter(None, dict.fromkeys([*(helps[name] for name in names), panel.notes])))
    instant = panel.kind == "table"
    steps = panel.options.get("thresholds", {"green": None})
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": [{"color": c, "value": v} for c, v in steps.items()]},
    }
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["custom"] = {"fillOpacity": 10, "showPoints": "never"}
        defaults["min"] = 0
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    elif panel.kind == "heatmap":
        options = {"calculate": False, "yAxis": {"unit": panel.unit}, "cellGap": 0}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "expr": query,
                "legendFormat": legend,
                "instant": instant,
                "range": not instant,
                "format": {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series"),
            }
            for number, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _variables() -> list[dict[str, Any]]:
    def of_label(name: str, query: str) -> dict[str, Any]:
        source = {"type": "prometheus", "uid": "${datasource}"}
        return {
            "type": "query",
            "name": name,
            "datasource": source,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "includeAll": True,
            "allValue": ".+",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        }

    return [
        {"type": "datasource", "name": "datasource", "query": "prometheus", "current": {}},
        of_label("job", "label_values(pid_state, job)"),
        of_label("instance", 'label_values(pid_state{job=~"$job"}, instance)'),
        of_label("stage", 'label_values(pid_stage_seconds_bucket{job=~"$job"}, stage)') | {"multi": False},
    ]


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def as_text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(as_text())
