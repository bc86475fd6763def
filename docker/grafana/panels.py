"""The dashboard's panels as plain data: title, PromQL queries by legend, unit and chart type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from docker.grafana.promql import DECODERS, JOBS, SERVERS, mean, quantile, rate, where

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


# Rejections take milliseconds, so with them the latency would fall during an overload.
_SUCCEEDED = where(DECODERS, 'code="200"')
_DECODED = where(_SUCCEEDED, 'decoder!=""')
_BURN_RATE_THRESHOLDS = {"green": None, "orange": 1, "red": 6}

ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel("Servers ready", {"": "sum(pid_state" + where(SERVERS, 'state="ready"') + ")"}, kind="stat", width=4),
        Panel("Request rate", {"": rate("pid_requests_total", of=DECODERS)}, "suffix:requests/s", "stat", 4),
        Panel(
            "Within deadline, last hour",
            {"": f"1 - max(job_decoder:pid_images_missed:ratio_rate1h{JOBS})"},
            "percentunit",
            "stat",
            4,
            "Share of the admitted images that met their deadline, not counting abandoned or invalid ones, of the "
            "selected decoder with the lowest one. Goal: 99 %.",
        ),
        Panel(
            "Burn rate, last hour",
            {"": f"max(job_decoder:pid_deadline_burn:rate1h{JOBS})"},
            "suffix:×",
            "stat",
            4,
            "Of the selected decoder with the highest one. A rate of 1 uses up the 1 % error budget in exactly 30 "
            "days; 14.4 pages.",
            {"thresholds": _BURN_RATE_THRESHOLDS},
        ),
        Panel("Predicted wait", {"": f"max(pid_backlog_seconds{SERVERS})"}, "s", "stat", 4),
        Panel("Devices busy", {"": 'avg(job:pid_device_busy:ratio_rate5m{job=~"$job"})'}, "percentunit", "stat", 4),
    ),
    "Traffic": (
        Panel("Requests by status", {"{{code}}": rate("pid_requests_total", "code", of=DECODERS)}, "suffix:requests/s"),
        Panel(
            "Images by outcome",
            {"{{outcome}}": rate("pid_image_outcomes_total", "outcome", of=DECODERS)},
            "suffix:images/s",
            notes="The in-time rate is the goodput. Abandoned images were cancelled because the client disconnected; "
            "invalid ones had extreme values.",
        ),
        Panel("Rejections by reason", {"{{code}}": rate("pid_refusals_total", "code")}, "suffix:requests/s"),
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
            {window: f"max(job_decoder:pid_deadline_burn:rate{window}{JOBS})" for window in ("5m", "30m", "1h", "6h")},
            "suffix:×",
            notes="Of the selected decoder with the highest one. Pages if the 1 h and 5 min rates exceed 14.4; opens a "
            "ticket if the 6 h and 30 min rates exceed 6.",
        ),
        Panel("Images by format", {"{{format}}": rate("pid_images_total", "format", of=DECODERS)}, "suffix:images/s"),
    ),
    "Latency": (
        Panel(
            "Request latency, heat map",
            {"{{le}}": f"sum by (le) (increase(pid_request_seconds_bucket{_SUCCEEDED}[$__rate_interval]))"},
            "s",
            "heatmap",
            notes="Successful requests.",
        ),
        Panel(
            "Request latency, percentiles",
            {f"p{100 * q:g}": quantile(q, "pid_request_seconds", of=_SUCCEEDED) for q in (0.5, 0.9, 0.99)},
            "s",
            notes="Successful requests.",
        ),
        Panel("Stage latency, p99", {"{{stage}}": quantile(0.99, "pid_stage_seconds", "stage", of=DECODERS)}, "s"),
        Panel(
            "Stage $stage, heat map",
            {
                "{{le}}": "sum by (le) (increase(pid_stage_seconds_bucket"
                + where(DECODERS, 'stage=~"$stage"')
                + "[$__rate_interval]))"
            },
            "s",
            "heatmap",
        ),
        Panel("Stage latency, median", {"{{stage}}": quantile(0.5, "pid_stage_seconds", "stage", of=DECODERS)}, "s"),
        Panel(
            "Stage latency, mean",
            {"{{stage}}": mean("pid_stage_seconds", "stage", of=DECODERS)},
            "s",
        ),
    ),
    "Queue": (
        Panel(
            "Images waiting and running",
            {
                "waiting": f"sum(pid_queue_images{DECODERS})",
                "running": f"sum(pid_running_images{DECODERS})",
                "encoding": f"sum(pid_encoding_images{DECODERS})",
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
                "mean": mean("pid_batch_size", of=DECODERS),
                "p90": f"ceil({quantile(0.9, 'pid_batch_size', of=DECODERS)})",
            },
            "suffix:images",
        ),
        Panel(
            "Cancelled images by stage",
            {"{{stage}}: {{reason}}": rate("pid_cancelled_total", "stage", "reason", of=DECODERS)},
            "suffix:images/s",
        ),
        Panel(
            "Undelivered pixels",
            {"{{instance}}": f"pid_pending_bytes{SERVERS}", "{{instance}} limit": f"pid_pending_limit_bytes{SERVERS}"},
            "bytes",
        ),
    ),
    "Decoders": (
        Panel(
            "Images by decoder", {"{{decoder}}": rate("pid_images_total", "decoder", of=DECODERS)}, "suffix:images/s"
        ),
        Panel(
            "Request latency by decoder",
            {
                f"{{{{decoder}}}} p{100 * q:g}": quantile(q, "pid_request_seconds", "decoder", of=_DECODED)
                for q in (0.5, 0.99)
            },
            "s",
            notes="Successful requests.",
        ),
        Panel(
            "Waiting and running images by decoder",
            {
                "{{decoder}} waiting": f"sum by (decoder) (pid_queue_images{DECODERS})",
                "{{decoder}} running": f"sum by (decoder) (pid_running_images{DECODERS})",
            },
            "suffix:images",
        ),
        Panel(
            "Device time by decoder",
            {"{{decoder}}": rate("pid_device_busy_seconds_total", "decoder", of=DECODERS)},
            "suffix:devices",
            notes="Average number of devices that were busy with a decoder.",
        ),
        Panel(
            "Missed deadlines by decoder",
            {"{{decoder}}": f"max by (decoder) (job_decoder:pid_images_missed:ratio_rate5m{JOBS})"},
            "percentunit",
            notes="Share of the admitted images that were late or failed, over 5 minutes.",
        ),
        Panel(
            "Weights moved to devices",
            {"{{decoder}}": rate("pid_weight_restores_total", "decoder", of=DECODERS)},
            "suffix:times/s",
            notes="From host memory, if --resident keeps the weights of some decoders there.",
        ),
        Panel(
            "Replaced bundles",
            {"{{decoder}} {{result}}": f"sum by (decoder, result) (increase(pid_bundle_swaps_total{DECODERS}[5m]))"},
            "suffix:bundles",
            notes="Replacements of bundles within 5 minutes, by result.",
        ),
        Panel(
            "Current replacement of a bundle",
            {"{{decoder}}": f"max by (decoder) (pid_bundle_swap_seconds{DECODERS})"},
            "s",
            notes="Maximum over the selected servers.",
        ),
        Panel(
            "Failed requests by decoder",
            {"{{decoder}}": f"max by (decoder) (job_decoder:pid_requests_failed:ratio_rate5m{JOBS})"},
            "percentunit",
            notes="Share of the requests for a decoder that get status 500, over 5 minutes.",
        ),
    ),
    "HTTP": (
        Panel(
            "Requests by protocol",
            {"{{protocol}}": rate("pid_requests_total", "protocol", of=DECODERS)},
            "suffix:requests/s",
        ),
        Panel("Requests in flight", {"in flight": f"sum(pid_requests_in_flight{SERVERS})"}, "suffix:requests"),
        Panel(
            "Request bodies",
            {
                "{{instance}}": f"pid_body_bytes{SERVERS}",
                "{{instance}} limit": f"pid_body_limit_bytes{SERVERS}",
            },
            "bytes",
        ),
        Panel("Response bytes", {"{{instance}}": rate("pid_response_bytes_total", "instance")}, "binBps"),
        Panel(
            "Connections accepted and aborted",
            {
                "accepted": rate("pid_accepted_connections_total"),
                "{{reason}}": rate("pid_aborted_connections_total", "reason"),
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
                "{{instance}} {{device}} used": "pid_memory_bytes" + where(SERVERS, 'kind="used"'),
                "{{instance}} {{device}} peak": "pid_memory_bytes" + where(SERVERS, 'kind="peak"'),
                "{{instance}} {{device}} free": "pid_memory_bytes" + where(SERVERS, 'kind="free"'),
            },
            "bytes",
            notes="GPU memory, or the memory of the process on a CPU.",
        ),
        Panel("Denoising steps", {"steps": rate("pid_steps_total", of=DECODERS)}, "suffix:steps/s"),
        Panel("Step overdue", {"{{instance}} {{device}}": f"pid_step_overdue_seconds{SERVERS}"}, "s"),
        Panel(
            "Encoder busy threads",
            {"{{instance}}": rate("pid_encoder_busy_seconds_total", "instance")},
            "suffix:threads",
        ),
        Panel("Encoder backlog", {"{{instance}}": f"pid_encoder_backlog_seconds{SERVERS}"}, "s"),
        Panel("Dropped log lines", {"{{instance}}": rate("pid_log_lines_dropped_total", "instance")}, "suffix:lines/s"),
        Panel(
            "Process CPU",
            {"{{instance}}": f"rate(process_cpu_seconds_total{SERVERS}[$__rate_interval])"},
            "suffix:cores",
        ),
        Panel("Process memory", {"{{instance}}": f"process_resident_memory_bytes{SERVERS}"}, "bytes"),
        Panel(
            "Cost table",
            {"": f"avg by (stage, decoder, size, tile, batch, encoding) (pid_cost_seconds{DECODERS})"},
            "s",
            "table",
        ),
        Panel(
            "Decoders and devices",
            {"": f"sum by (instance, decoder, model, runtime, precision, device) (pid_info{DECODERS})"},
            kind="table",
        ),
    ),
    "Captions": (
        Panel("Images with a prompt", {"{{source}}": rate("pid_prompts_total", "source")}, "suffix:images/s"),
        Panel("Prompts waiting", {"{{instance}}": f"pid_waiting_prompts{SERVERS}"}, "suffix:prompts"),
        Panel(
            "Text encoder, share of the time",
            {"{{instance}}": rate("pid_caption_busy_seconds_total", "instance")},
            "percentunit",
        ),
        Panel(
            "Prompts per batch",
            {
                "mean": mean("pid_caption_batch_size"),
                "p90": f"ceil({quantile(0.9, 'pid_caption_batch_size')})",
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
                "damaged files": rate("pid_caption_files_damaged_total"),
                "failed operations": rate("pid_caption_disk_failures_total"),
            },
            "suffix:problems/s",
        ),
    ),
}
