"""The dashboard's panels as plain data: title, PromQL queries by legend, unit and chart type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SERVERS = '{job=~"$job", instance=~"$instance"}'  # the servers selected at the top of the dashboard

Kind = Literal["stat", "timeseries", "heatmap", "table"]


@dataclass(frozen=True)
class Panel:
    """One panel. Its description is built from the help texts of its metrics, followed by `notes`."""

    title: str
    queries: Mapping[str, str]  # PromQL by legend
    unit: str = "none"  # a Grafana unit id that docker.grafana.units knows
    kind: Kind = "timeseries"
    width: int = 8  # columns of 24
    notes: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def _servers(condition: str) -> str:
    return SERVERS.replace("}", f", {condition}}}")


def _rate(metric: str, *labels: str) -> str:
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate({metric}{SERVERS}[$__rate_interval]))"


def _quantile(q: float, metric: str, *labels: str) -> str:
    return f"histogram_quantile({q}, {_rate(f'{metric}_bucket', 'le', *labels)})"


# Rejections take milliseconds, so with them the latency would fall during an overload.
_SUCCEEDED = "pid_request_seconds_bucket" + _servers('code="200"') + "[$__rate_interval]"
_BURN_RATE_THRESHOLDS = {"green": None, "orange": 1, "red": 6}

ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel("Servers ready", {"": "sum(pid_state" + _servers('state="ready"') + ")"}, kind="stat", width=4),
        Panel("Request rate", {"": _rate("pid_requests_total")}, "suffix:requests/s", "stat", 4),
        Panel(
            "Within deadline, last hour",
            {"": '1 - max(job:pid_images_missed:ratio_rate1h{job=~"$job"})'},
            "percentunit",
            "stat",
            4,
            "Share of the admitted images that met their deadline, not counting abandoned or invalid ones. Goal: 99 %.",
        ),
        Panel(
            "Burn rate, last hour",
            {"": 'max(job:pid_deadline_burn:rate1h{job=~"$job"})'},
            "suffix:×",
            "stat",
            4,
            "A rate of 1 uses up the 1 % error budget in exactly 30 days; 14.4 pages.",
            {"thresholds": _BURN_RATE_THRESHOLDS},
        ),
        Panel("Predicted wait", {"": f"max(pid_backlog_seconds{SERVERS})"}, "s", "stat", 4),
        Panel("Devices busy", {"": 'avg(job:pid_device_busy:ratio_rate5m{job=~"$job"})'}, "percentunit", "stat", 4),
    ),
    "Traffic": (
        Panel("Requests by status", {"{{code}}": _rate("pid_requests_total", "code")}, "suffix:requests/s"),
        Panel(
            "Images by outcome",
            {"{{outcome}}": _rate("pid_image_outcomes_total", "outcome")},
            "suffix:images/s",
            notes="The in-time rate is the goodput. Abandoned images were cancelled because the client disconnected; "
            "invalid ones had extreme values.",
        ),
        Panel("Rejections by reason", {"{{code}}": _rate("pid_refusals_total", "code")}, "suffix:requests/s"),
        Panel(
            "Rejected and failed requests",
            {
                "rejected": 'max(job:pid_requests_refused:ratio_rate5m{job=~"$job"})',
                "failed": 'max(job:pid_requests_failed:ratio_rate5m{job=~"$job"})',
            },
            "percentunit",
            notes="Share of all requests that get status 429 and status 500, over 5 minutes.",
        ),
        Panel(
            "Burn rate of the deadline objective",
            {window: f'max(job:pid_deadline_burn:rate{window}{{job=~"$job"}})' for window in ("5m", "30m", "1h", "6h")},
            "suffix:×",
            notes="Pages if the 1 h and 5 min rates exceed 14.4; opens a ticket if the 6 h and 30 min rates exceed 6.",
        ),
        Panel("Images by format", {"{{format}}": _rate("pid_images_total", "format")}, "suffix:images/s"),
    ),
    "Latency": (
        Panel(
            "Request latency, heat map",
            {"{{le}}": f"sum by (le) (increase({_SUCCEEDED}))"},
            "s",
            "heatmap",
            notes="Successful requests.",
        ),
        Panel(
            "Request latency, percentiles",
            {f"p{100 * q:g}": f"histogram_quantile({q}, sum by (le) (rate({_SUCCEEDED})))" for q in (0.5, 0.9, 0.99)},
            "s",
            notes="Successful requests.",
        ),
        Panel("Stage latency, p99", {"{{stage}}": _quantile(0.99, "pid_stage_seconds", "stage")}, "s"),
        Panel(
            "Stage $stage, heat map",
            {
                "{{le}}": "sum by (le) (increase(pid_stage_seconds_bucket"
                + _servers('stage=~"$stage"')
                + "[$__rate_interval]))"
            },
            "s",
            "heatmap",
        ),
        Panel("Stage latency, median", {"{{stage}}": _quantile(0.5, "pid_stage_seconds", "stage")}, "s"),
        Panel(
            "Stage latency, mean",
            {"{{stage}}": f"{_rate('pid_stage_seconds_sum', 'stage')} / {_rate('pid_stage_seconds_count', 'stage')}"},
            "s",
        ),
    ),
    "Queue": (
        Panel(
            "Images waiting and running",
            {
                "waiting": f"sum(pid_queue_images{SERVERS})",
                "running": f"sum(pid_running_images{SERVERS})",
                "encoding": f"sum(pid_encoding_images{SERVERS})",
                "queue limit": f"sum(pid_queue_limit_images{SERVERS})",
            },
            "suffix:images",
        ),
        Panel(
            "Predicted wait by server",
            {"{{instance}}": f"pid_backlog_seconds{SERVERS}", "limit": f"min(pid_backlog_limit_seconds{SERVERS})"},
            "s",
        ),
        Panel(
            "Queue fill by server",
            {"{{instance}}": f"instance:pid_queue_fill:ratio{SERVERS}"},
            "percentunit",
            notes="The highest of waiting images, predicted wait and undelivered pixels, each divided by its limit.",
        ),
        Panel(
            "Batch size",
            {
                "mean": f"{_rate('pid_batch_size_sum')} / {_rate('pid_batch_size_count')}",
                "p90": f"ceil({_quantile(0.9, 'pid_batch_size')})",
            },
            "suffix:images",
        ),
        Panel(
            "Cancelled images by stage",
            {"{{stage}}: {{reason}}": _rate("pid_cancelled_total", "stage", "reason")},
            "suffix:images/s",
        ),
        Panel(
            "Undelivered pixels",
            {"{{instance}}": f"pid_pending_bytes{SERVERS}", "{{instance}} limit": f"pid_pending_limit_bytes{SERVERS}"},
            "bytes",
        ),
    ),
    "HTTP": (
        Panel("Requests by protocol", {"{{protocol}}": _rate("pid_requests_total", "protocol")}, "suffix:requests/s"),
        Panel("Requests in flight", {"in flight": f"sum(pid_requests_in_flight{SERVERS})"}, "suffix:requests"),
        Panel(
            "Request bodies",
            {
                "{{instance}}": f"pid_body_bytes{SERVERS}",
                "{{instance}} limit": f"pid_body_limit_bytes{SERVERS}",
            },
            "bytes",
        ),
        Panel("Response bytes", {"{{instance}}": _rate("pid_response_bytes_total", "instance")}, "binBps"),
        Panel(
            "Connections accepted and aborted",
            {
                "accepted": _rate("pid_accepted_connections_total"),
                "{{reason}}": _rate("pid_aborted_connections_total", "reason"),
            },
            "suffix:connections/s",
        ),
        Panel(
            "Connections and descriptors",
            {
                "{{instance}} {{state}}": f"pid_connections{SERVERS}",
                "{{instance}} limit": f"pid_connection_limit{SERVERS}",
                "{{instance}} descriptors": f"process_open_fds{SERVERS}",
                "{{instance}} descriptor limit": f"process_max_fds{SERVERS}",
            },
        ),
    ),
    "Devices": (
        Panel(
            "Device busy time",
            {"{{instance}} {{device}}": f"instance_device:pid_device_busy:ratio_rate5m{SERVERS}"},
            "percentunit",
            notes="Share of the time spent on images, measured by the server.",
        ),
        Panel(
            "GPU utilisation",
            {"{{instance}} {{device}}": f"pid_gpu_utilisation_ratio{SERVERS}"},
            "percentunit",
            notes="Reported by NVML; empty on a CPU.",
        ),
        Panel(
            "Memory",
            {
                "{{instance}} {{device}} used": "pid_memory_bytes" + _servers('kind="used"'),
                "{{instance}} {{device}} peak": "pid_memory_bytes" + _servers('kind="peak"'),
                "{{instance}} {{device}} free": "pid_memory_bytes" + _servers('kind="free"'),
            },
            "bytes",
            notes="GPU memory, or the memory of the process on a CPU.",
        ),
        Panel("Denoising steps", {"steps": _rate("pid_steps_total")}, "suffix:steps/s"),
        Panel("Step overdue", {"{{instance}} {{device}}": f"pid_step_overdue_seconds{SERVERS}"}, "s"),
        Panel(
            "Encoder busy threads",
            {"{{instance}}": _rate("pid_encoder_busy_seconds_total", "instance")},
            "suffix:threads",
        ),
        Panel("Encoder backlog", {"{{instance}}": f"pid_encoder_backlog_seconds{SERVERS}"}, "s"),
        Panel(
            "Dropped log lines", {"{{instance}}": _rate("pid_log_lines_dropped_total", "instance")}, "suffix:lines/s"
        ),
        Panel(
            "Process CPU",
            {"{{instance}}": f"rate(process_cpu_seconds_total{SERVERS}[$__rate_interval])"},
            "suffix:cores",
        ),
        Panel("Process memory", {"{{instance}}": f"process_resident_memory_bytes{SERVERS}"}, "bytes"),
        Panel("Cost table", {"": f"avg by (stage, size, batch, encoding) (pid_cost_seconds{SERVERS})"}, "s", "table"),
        Panel(
            "Decoders and devices",
            {"": f"sum by (instance, decoder, runtime, precision, device) (pid_info{SERVERS})"},
            kind="table",
        ),
    ),
    "Captions": (
        Panel("Images with a prompt", {"{{source}}": _rate("pid_prompts_total", "source")}, "suffix:images/s"),
        Panel("Prompts waiting", {"{{instance}}": f"pid_waiting_prompts{SERVERS}"}, "suffix:prompts"),
        Panel(
            "Text encoder, share of the time",
            {"{{instance}}": _rate("pid_caption_busy_seconds_total", "instance")},
            "percentunit",
        ),
        Panel(
            "Prompts per batch",
            {
                "mean": f"{_rate('pid_caption_batch_size_sum')} / {_rate('pid_caption_batch_size_count')}",
                "p90": f"ceil({_quantile(0.9, 'pid_caption_batch_size')})",
            },
            "suffix:prompts",
        ),
        Panel(
            "Caption cache",
            {
                "{{instance}} memory": f"pid_caption_cache_bytes{SERVERS}",
                "{{instance}} disk": f"pid_caption_disk_bytes{SERVERS}",
            },
            "bytes",
        ),
        Panel(
            "Problems of the caption cache",
            {
                "damaged files": _rate("pid_caption_files_damaged_total"),
                "failed operations": _rate("pid_caption_disk_failures_total"),
            },
            "suffix:problems/s",
        ),
    ),
}
