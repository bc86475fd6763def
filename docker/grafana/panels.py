"""The rows of the dashboard, and its panels about requests, images, the queue and decoders."""

from __future__ import annotations

from docker.grafana.model import Colour, Panel
from docker.grafana.promql import DECODERS, JOBS, SERVERS, mean, quantile, rate, where
from docker.grafana.resource_panels import RESOURCES

# Rejections take milliseconds, so with them the latency would fall during an overload.
_SUCCEEDED = where(DECODERS, 'code="200"')
_DECODED = where(_SUCCEEDED, 'decoder!=""')
_BUDGET = 0.01  # the share of images that may miss their deadline
_BURN_RATES: dict[float, Colour] = {
    1: "blue",
    6: "orange",
    14.4: "red",
}  # spends the budget in 30 days; opens a ticket; pages
_BURN_ALERTS = ("PidDeadlineBurnFast", "PidDeadlineBurnSlow")
_SCALE_UP_SECONDS = 4  # of predicted work per server

ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel(
            "Servers ready",
            {"": "sum(pid_state" + where(SERVERS, 'state="ready"') + ")"},
            kind="stat",
            width=4,
            thresholds={0: "red", 1: "green"},
            alerts=("PidDown", "PidNothingReady", "PidNotReady", "PidRestarting"),
        ),
        Panel("Request rate", {"": rate("pid_requests_total", of=DECODERS)}, "suffix:requests/s", "stat", 4),
        Panel(
            "Within deadline, last hour",
            {"": f"1 - max(job_decoder:pid_images_missed:ratio_rate1h{JOBS})"},
            "percentunit",
            "stat",
            4,
            "Share of the admitted images that met their deadline, not counting abandoned or invalid ones, of the "
            "selected decoder with the lowest one. Goal: 99 %.",
            {0: "red", 1 - 6 * _BUDGET: "orange", 1 - _BUDGET: "green"},
            _BURN_ALERTS,
        ),
        Panel(
            "Burn rate, last hour",
            {"": f"max(job_decoder:pid_deadline_burn:rate1h{JOBS})"},
            "suffix:×",
            "stat",
            4,
            "Of the selected decoder with the highest one. A rate of 1 uses up the 1 % error budget in exactly 30 "
            "days; 14.4 pages.",
            _BURN_RATES,
            _BURN_ALERTS,
        ),
        Panel(
            "Predicted wait",
            {"": f"max(pid_backlog_seconds{SERVERS})"},
            "s",
            "stat",
            4,
            "The autoscaling examples add replicas above 4 s.",
            {_SCALE_UP_SECONDS: "blue"},
        ),
        Panel(
            "Devices busy",
            {"": 'avg(job:pid_device_busy:ratio_rate5m{job=~"$job"})'},
            "percentunit",
            "stat",
            4,
            "The autoscaling examples add replicas above 70 %.",
            {0.7: "blue"},
        ),
    ),
    "Traffic": (
        Panel(
            "Requests by status",
            {"{{code}}": rate("pid_requests_total", "code", of=DECODERS)},
            "suffix:requests/s",
            alerts=("PidNoTraffic",),
        ),
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
            notes="Share of all requests that get status 429 and status 500, over 5 minutes. Alerts fire above 5 % "
            "rejected and above 1 % failed.",
            thresholds={0.01: "red", 0.05: "orange"},
            alerts=("PidRefusing", "PidErrors"),
        ),
        Panel(
            "Burn rate of the deadline objective",
            {window: f"max(job_decoder:pid_deadline_burn:rate{window}{JOBS})" for window in ("5m", "30m", "1h", "6h")},
            "suffix:×",
            notes="Of the selected decoder with the highest one. Pages if the 1 h and 5 min rates exceed 14.4; opens a "
            "ticket if the 6 h and 30 min rates exceed 6.",
            thresholds=_BURN_RATES,
            alerts=_BURN_ALERTS,
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
            notes="The autoscaling examples add replicas above 4 s.",
            thresholds={_SCALE_UP_SECONDS: "blue"},
        ),
        Panel(
            "Queue fill by server",
            {"{{instance}}": f"instance:pid_queue_fill:ratio{SERVERS}"},
            "percentunit",
            notes="The highest of waiting images, predicted wait and undelivered pixels, each divided by its limit.",
            thresholds={0.8: "orange"},
            alerts=("PidQueueNearLimit",),
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
            "Steps per image by decoder",
            {
                "{{decoder}}": f"sum by (decoder) (rate(pid_steps_total{DECODERS}[5m]))"
                f" / (sum by (decoder) (rate(pid_images_total{DECODERS}[5m])) > 0)"
            },
            "suffix:steps",
            notes="Over 5 minutes. An image in tiles needs the steps of each tile.",
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
            notes="Share of the admitted images that were late or failed, over 5 minutes. The thresholds are burn "
            "rates of 1, 6 and 14.4.",
            thresholds={rate * _BUDGET: colour for rate, colour in _BURN_RATES.items()},
            alerts=_BURN_ALERTS,
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
            alerts=("PidBundleSwapFailed",),
        ),
        Panel(
            "Current replacement of a bundle",
            {"{{decoder}}": f"max by (decoder) (pid_bundle_swap_seconds{DECODERS})"},
            "s",
            notes="Maximum over the selected servers.",
            thresholds={900: "orange"},
            alerts=("PidBundleSwapStuck",),
        ),
        Panel(
            "Failed requests by decoder",
            {"{{decoder}}": f"max by (decoder) (job_decoder:pid_requests_failed:ratio_rate5m{JOBS})"},
            "percentunit",
            notes="Share of the requests for a decoder that get status 500, over 5 minutes.",
            thresholds={0.01: "red"},
            alerts=("PidErrors",),
        ),
    ),
    **RESOURCES,
}
