"""Rows of the dashboard about what the servers use: connections, devices, the encoder and the text encoder."""

from __future__ import annotations

from docker.grafana.model import Panel
from docker.grafana.promql import DECODERS, SERVERS, mean, quantile, rate, where

_CACHED = where(SERVERS, 'source!="encoder"')
_PREVIEW = where(DECODERS, 'stage="preview"')
_PREVIEW_ENCODING = where(DECODERS, 'encoding="preview"')
_CAPTIONED = where(DECODERS, 'stage="caption"')

RESOURCES: dict[str, tuple[Panel, ...]] = {
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
            notes="Share of the time spent on images, measured by the server. The autoscaling examples add replicas "
            "above 70 %.",
            thresholds={0.7: "blue"},
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
        Panel(
            "Share of memory in use",
            {"{{instance}} {{device}}": f"instance_device:pid_memory_used:ratio{SERVERS}"},
            "percentunit",
            notes="GPU memory across all processes, or the machine's memory on a CPU.",
            thresholds={0.95: "red"},
            alerts=("PidMemoryNearLimit",),
        ),
        Panel("Denoising steps", {"steps": rate("pid_steps_total", of=DECODERS)}, "suffix:steps/s"),
        Panel(
            "Step overdue",
            {"{{instance}} {{device}}": f"pid_step_overdue_seconds{SERVERS}"},
            "s",
            thresholds={10: "red"},
            alerts=("PidStepStuck",),
        ),
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
            {"": f"sum by (instance, decoder, model, runtime, precision, device, version) (pid_info{DECODERS})"},
            kind="table",
            width=16,
        ),
    ),
    "Previews": (
        Panel(
            "Previews by decoder",
            {"{{decoder}}": rate("pid_previews_total", "decoder", of=DECODERS)},
            "suffix:images/s",
        ),
        Panel(
            "Cost of a preview on the device",
            {"{{decoder}} {{size}}": f"max by (decoder, size) (pid_cost_seconds{_PREVIEW})"},
            "s",
        ),
        Panel(
            "Cost of encoding a preview",
            {"{{decoder}} {{size}}": f"max by (decoder, size) (pid_cost_seconds{_PREVIEW_ENCODING})"},
            "s",
        ),
    ),
    "Captions": (
        Panel("Images with a prompt", {"{{source}}": rate("pid_prompts_total", "source")}, "suffix:images/s"),
        Panel(
            "Prompts found in the cache",
            {
                "{{instance}}": f"{rate('pid_prompts_total', 'instance', of=_CACHED)} "
                f"/ {rate('pid_prompts_total', 'instance')}"
            },
            "percentunit",
            notes="Share of the images with a prompt whose caption was in memory or on disk.",
        ),
        Panel(
            "Wait for captions by decoder",
            {
                f"{{{{decoder}}}} p{100 * q:g}": quantile(q, "pid_stage_seconds", "decoder", of=_CAPTIONED)
                for q in (0.5, 0.99)
            },
            "s",
            notes="Images whose caption was not in the cache.",
        ),
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
