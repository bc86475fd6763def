"""Queries of the dashboard's panels to a Prometheus server."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from docker.grafana.model import Panel

CURVE_POINTS = 120
STAGE = "encode"  # value of the dashboard's $stage variable


@dataclass(frozen=True)
class Series:
    """A series that a panel shows."""

    label: str  # in the legend
    labels: Mapping[str, str]
    times: tuple[float, ...]  # seconds since the epoch
    values: tuple[float, ...]  # may contain NaN, but also at least one number


class PrometheusClient:
    """Queries a Prometheus server about a window of `seconds` that ends now."""

    def __init__(self, url: str, seconds: float, rate_interval: str = "1m") -> None:
        """Connect to the server at `url`; rates are averaged over `rate_interval`, a PromQL duration."""
        self._client = httpx.Client(base_url=url, timeout=30)
        self.rate_interval = rate_interval
        self.end = time.time()
        self.start = self.end - seconds

    def fetch(self, panel: Panel) -> list[Series]:
        """Return the series of a panel that have at least one number: over the window, or now for stats and tables.

        Heat maps without any count have no series either.
        """
        query = self._instant if panel.kind in ("stat", "table") else self._range
        series = [
            Series(_label(legend, found["metric"]), found["metric"], *_columns(found.get("values") or [found["value"]]))
            for legend, promql in panel.queries.items()
            for found in query(promql)
        ]
        if panel.kind == "heatmap" and not any(value > 0 for each in series for value in each.values):
            return []
        return [each for each in series if not all(map(math.isnan, each.values))]

    def expand(self, query: str) -> str:
        """Replace the dashboard's variables by their initial values: all jobs, instances and decoders."""
        query = query.replace("$__rate_interval", self.rate_interval).replace("$stage", STAGE)
        return re.sub(r"\$(job|instance)\b", ".+", query).replace("$decoder", ".*")

    def _range(self, query: str) -> list[dict[str, Any]]:
        step = (self.end - self.start) / CURVE_POINTS
        window = {"start": str(self.start), "end": str(self.end), "step": f"{step:.3f}"}
        return self._result("/api/v1/query_range", {"query": self.expand(query), **window})

    def _instant(self, query: str) -> list[dict[str, Any]]:
        return self._result("/api/v1/query", {"query": self.expand(query), "time": str(self.end)})

    def _result(self, path: str, parameters: dict[str, str]) -> list[dict[str, Any]]:
        response = self._client.get(path, params=parameters).json()
        if response["status"] != "success":
            raise ValueError(f"Prometheus rejected the query {parameters['query']}: {response['error']}")
        result: list[dict[str, Any]] = response["data"]["result"]
        return result


def _label(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)


def _columns(points: list[tuple[float, str]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Convert Prometheus' pairs of time and text to times and values."""
    return tuple(at for at, _ in points), tuple(float(value) for _, value in points)
