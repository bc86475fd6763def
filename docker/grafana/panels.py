"""What the dashboard shows, as plain data: a title, PromQL by legend, a unit, a shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

HERE = '{job=~"$job", instance=~"$instance"}'

Kind = Literal["stat", "timeseries", "heatmap", "table"]


@dataclass(frozen=True)
class Panel:
    title: str
    queries: Mapping[str, str]  # PromQL by legend; HERE stands for the chosen servers
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 8  # of 24
    notes: str = ""  # what the metrics' help leaves open
    options: Mapping[str, Any] = field(default_factory=dict)


def _here(where: str) -> str:
    return HERE.replace("}", f", {where}}}")


def _rate(metric: str, *labels: str) -> str:
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate({metric}{HERE}[$__rate_interval]))"


def _quantile(q: float, metric: str, *labels: str) -> str:
    return f"histogram_quantile({q}, {_rate(f'{metric}_bucket', 'le', *labels)})"


_GRADES = {"green": None, "orange": 1, "red": 6}

ROWS: dict[str, tuple[Panel, ...]] = {
    "How it goes": (
        Panel("Servers ready", {"": "sum(pid_state" + _here('state="ready"') + ")"}, kind="stat", width=4),
        Panel("Requests", {"": _rate("pid_requests_total")}, "reqps", "stat", 4),
        Panel(
            "In time, last hour",
            {"": '1 - max(job:pid_images_missed:ratio_rate1h{job=~"$job"})'},
            "percentunit",
            "stat",
            4,
            "Of the images that were admitted and still wanted. The objective is 99 %.",
        ),
        Panel(
            "Burn rate, last hour",
            {"": 'max(job:pid_deadline_burn:rate1h{job=~"$job"})'},
            "none",
            "stat",
            4,
            "1 spends the 1 % that may be late in 30 days; 14.4 pages.",
            {"thresholds": _GRADES},
        ),
        Panel("Predicted wait", {"": f"max(pid_backlog_seconds{HERE})"}, "s", "stat", 4),
        Panel("Devices busy", {"": 'avg(job:pid_device_busy:ratio_rate5m{job=~"$job"})'}, "percentunit", "stat", 4),
    ),
    "Traffic": (
        Panel("Requests by status", {"{{code}}": _rate("pid_requests_total", "code")}, "reqps"),
        Panel(
            "Goodput against deadline",
            {"{{outcome}}": _rate("pid_image_outcomes_total", "outcome")},
            "img/s",
            notes="in-time is goodput; abandoned images are those whose client left.",
        ),
        Panel("Refusals by reason", {"{{code}}": _rate("pid_refusals_total", "code")}, "reqps"),
        Panel(
            "Burn rate of the deadline objective",
            {window: f'max(job:pid_deadline_burn:rate{window}{{job=~"$job"}})' for window in ("5m", "30m", "1h", "6h")},
            "none",
            notes="1 h and 5 min above 14.4 page, 6 h and 30 min above 6 make a ticket.",
        ),
        Panel(
            "Refused and failed",
            {
                "refused": 'max(job:pid_requests_refused:ratio_rate5m{job=~"$job"})',
                "failed": 'max(job:pid_requests_failed:ratio_rate5m{job=~"$job"})',
            },
            "percentunit",
            notes="Shares of all requests with status 429 and 500.",
        ),
        Panel("Images by format", {"{{format}}": _rate("pid_images_total", "format")}, "img/s"),
    ),
    "Latency": (
        Panel(
            "Request, heat map",
            {"{{le}}": f"sum by (le) (increase(pid_request_seconds_bucket{HERE}[$__rate_interval]))"},
            "s",
            "heatmap",
        ),
        Panel(
            "Request, quantiles", {f"p{100 * q:g}": _quantile(q, "pid_request_seconds") for q in (0.5, 0.9, 0.99)}, "s"
        ),
        Panel("Stages, p99", {"{{stage}}": _quantile(0.99, "pid_stage_seconds", "stage")}, "s"),
        Panel(
            "Stage $stage, heat map",
            {
                "{{le}}": "sum by (le) (increase(pid_stage_seconds_bucket"
                + _here('stage=~"$stage"')
                + "[$__rate_interval]))"
            },
            "s",
            "heatmap",
        ),
        Panel("Stages, median", {"{{stage}}": _quantile(0.5, "pid_stage_seconds", "stage")}, "s"),
        Panel(
            "Stages, mean",
            {"{{stage}}": f"{_rate('pid_stage_seconds_sum', 'stage')} / {_rate('pid_stage_seconds_count', 'stage')}"},
            "s",
        ),
    ),
    "Queue": (
        Panel(
            "Images waiting and running",
            {
                "waiting": f"sum(pid_queue_images{HERE})",
                "running": f"sum(pid_running_images{HERE})",
                "may wait": f"sum(pid_queue_limit_images{HERE})",
            },
        ),
        Panel(
            "Predicted wait by server",
            {"{{instance}}": f"pid_backlog_seconds{HERE}", "limit": f"min(pid_backlog_limit_seconds{HERE})"},
            "s",
        ),
        Panel(
            "Fullest limit by server",
            {"{{instance}}": f"instance:pid_queue_fill:ratio{HERE}"},
            "percentunit",
            notes="The largest of images waiting, predicted wait and undelivered pixels, each of its limit.",
        ),
        Panel(
            "Batch size",
            {
                "mean": f"{_rate('pid_batch_size_sum')} / {_rate('pid_batch_size_count')}",
                "p90": _quantile(0.9, "pid_batch_size"),
            },
        ),
        Panel(
            "Cancelled by stage", {"{{stage}}: {{reason}}": _rate("pid_cancelled_total", "stage", "reason")}, "img/s"
        ),
        Panel(
            "In flight and undelivered",
            {
                "requests in flight": f"sum(pid_requests_in_flight{HERE})",
                "undelivered pixels / limit": f"max(pid_pending_bytes{HERE} / pid_pending_limit_bytes{HERE})",
            },
        ),
    ),
    "Devices": (
        Panel(
            "Busy",
            {"{{instance}} {{device}}": f"instance_device:pid_device_busy:ratio_rate5m{HERE}"},
            "percentunit",
            notes="Share of time at images, by the server's own clock.",
        ),
        Panel(
            "GPU utilisation",
            {"{{instance}} {{device}}": f"pid_gpu_utilisation_ratio{HERE}"},
            "percentunit",
            notes="By NVML; empty on a CPU.",
        ),
        Panel(
            "Memory",
            {
                "{{instance}} {{device}} used": "pid_memory_bytes" + _here('kind="used"'),
                "{{instance}} {{device}} peak": "pid_memory_bytes" + _here('kind="peak"'),
                "{{instance}} {{device}} free": "pid_memory_bytes" + _here('kind="free"'),
            },
            "bytes",
            notes="VRAM, or the process's memory on a CPU.",
        ),
        Panel("Step overdue", {"{{instance}} {{device}}": f"pid_step_overdue_seconds{HERE}"}, "s"),
        Panel("Steps", {"steps": _rate("pid_steps_total")}, "ops"),
        Panel(
            "Process",
            {
                "{{instance}} cores": f"rate(process_cpu_seconds_total{HERE}[$__rate_interval])",
                "{{instance}} GiB": f"process_resident_memory_bytes{HERE} / 2^30",
            },
        ),
        Panel("Bytes sent", {"{{instance}}": _rate("pid_response_bytes_total", "instance")}, "Bps"),
        Panel("Cost table", {"": f"avg by (stage, size, batch) (pid_cost_seconds{HERE})"}, "s", "table"),
        Panel(
            "What is served",
            {"": f"sum by (instance, decoder, runtime, precision, device) (pid_info{HERE})"},
            "none",
            "table",
        ),
    ),
}
