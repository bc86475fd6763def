"""Events that the dashboard marks in its charts."""

from __future__ import annotations

from docker.grafana.model import Annotation
from docker.grafana.promql import DECODERS, SERVERS, where

STEP_SECONDS = 60  # resolution of the queries
_SINCE = "5m"  # how long a mark lasts, which must exceed the resolution

ANNOTATIONS = (
    Annotation(
        "Deployments",
        f"count by (job, version) (pid_info{SERVERS})"
        f" unless count by (job, version) (pid_info{SERVERS} offset {_SINCE})",
        "blue",
        "First server with version {{version}}",
        "{{job}}",
    ),
    Annotation(
        "Starts of servers",
        f"process_start_time_seconds{SERVERS} * 1000",
        "purple",
        "{{instance}} started",
        "{{job}}",
        values_are_times=True,
    ),
    Annotation(
        "Replaced bundles",
        f"sum by (job, instance, decoder, result) (increase(pid_bundle_swaps_total{DECODERS}[{_SINCE}])) > 0",
        "green",
        "Bundle of {{decoder}}: {{result}}",
        "{{instance}} {{job}}",
    ),
    Annotation(
        "Alerts",
        "ALERTS" + where('{job=~"$job"}', 'alertname=~"Pid.+", alertstate="firing"'),
        "red",
        "{{alertname}}",
        "{{instance}} {{device}} {{decoder}} {{job}}",
    ),
)
