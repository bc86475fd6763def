"""Panels and annotations of the dashboard as plain data, which Grafana's JSON and the drawn image are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["stat", "timeseries", "heatmap", "table"]
Colour = Literal["green", "blue", "orange", "red", "purple"]  # names that Grafana and matplotlib have in common


@dataclass(frozen=True)
class Panel:
    """One panel. Its description is built from the help texts of its metrics, followed by `notes`."""

    title: str
    queries: Mapping[str, str]  # PromQL by legend; curves whose legend ends in "limit" are dashed
    unit: str = "none"  # a Grafana unit id that docker.grafana.units knows
    kind: Kind = "timeseries"
    width: int = 8  # columns of 24
    notes: str = ""
    thresholds: dict[float, Colour] = field(default_factory=dict)  # colour of values from this one, ascending
    alerts: tuple[str, ...] = ()  # whose runbooks the panel links to


@dataclass(frozen=True)
class Annotation:
    """Events that are marked in every chart: while the series of `query` exist, or at the times in their values."""

    name: str  # of the switch that hides these events
    query: str  # PromQL whose values are positive
    colour: Colour
    title: str  # may contain labels: {{instance}}
    text: str = ""  # shown below the title
    values_are_times: bool = False  # in milliseconds since the epoch
