"""Gauges of a decode service: queue, encoder, memory, state, costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry

from engines import __version__
from server import logs
from server.captions.cache import CaptionCache
from server.gauges import Values, add_counter, add_gauge, add_gauges, add_memory
from server.lifecycle import State
from server.scheduling.costs import CostKey
from server.scheduling.scheduler import Scheduler
from server.service import DecodeService


def add_service_gauges(service: DecodeService) -> None:
    """Add the gauges of `service` to the registry of its metrics; they are read when they are scraped."""
    _add_images(service)
    _add_queue(service)
    _add_state(service)
    _add_captions(service.metrics.registry, service.captions)
    gpus = {name: (gpu, partial(_peak_memory, service, name)) for name, gpu in service.gpus.items()}
    add_memory(service.metrics.registry, gpus)


def _peak_memory(service: DecodeService, device: str) -> int | None:
    """Return the peak memory of a device; each of its runtimes counts what the whole process has in use."""
    loaded = [decoder for decoder in service.decoders.values() if device in decoder.runtimes]
    peaks = [decoder.runtimes[device].peak_memory() for decoder in loaded]
    return max((peak for peak in peaks if peak is not None), default=None)


def _add_images(service: DecodeService) -> None:
    gauges: tuple[tuple[str, str, Callable[..., int]], ...] = (
        ("pid_queue_images", "Images waiting for a device.", Scheduler.queued),
        ("pid_running_images", "Images on a device.", Scheduler.running),
        ("pid_encoding_images", "Images in the encoder.", Scheduler.encoding_images),
    )
    for name, text, count in gauges:
        add_gauges(service.metrics.registry, name, text, ("decoder",), partial(_images, service, count))


def _images(service: DecodeService, count: Callable[..., int]) -> Values:
    decoders = service.decoders
    return service.dispatcher.query(lambda scheduler: {(name,): count(scheduler, decoder=name) for name in decoders})


def _add_queue(service: DecodeService) -> None:
    limits, query, registry = service.settings, service.dispatcher.query, service.metrics.registry
    gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
        (
            "pid_encoder_backlog_seconds",
            "Predicted seconds until the images in the encoder are encoded.",
            service.dispatcher.encoder_backlog,
        ),
        ("pid_backlog_seconds", "Predicted seconds of work, per device.", partial(query, Scheduler.backlog)),
        (
            "pid_pending_bytes",
            "Bytes of admitted images that are not delivered yet: pixels until they are encoded.",
            lambda: service.undelivered.bytes,
        ),
        ("pid_body_bytes", "Bytes of bodies that are arriving or being parsed.", lambda: service.body_memory.bytes),
        ("pid_body_limit_bytes", "Maximum of pid_body_bytes.", lambda: limits.body_memory_bytes),
        ("pid_waiting_prompts", "Prompts that wait for the text encoder.", partial(query, Scheduler.waiting_prompts)),
        ("pid_queue_limit_images", "Maximum number of queued images.", lambda: limits.queue_images),
        ("pid_backlog_limit_seconds", "Maximum of pid_backlog_seconds.", lambda: limits.queue_seconds),
        ("pid_pending_limit_bytes", "Maximum of pid_pending_bytes.", lambda: limits.pending_bytes),
    )
    for name, text, read in gauges:
        add_gauge(registry, name, text, read)
    text = "Log lines dropped because stdout was not read or could not be written."
    add_counter(registry, "pid_log_lines_dropped_total", text, logs.dropped_lines)


def _add_captions(registry: CollectorRegistry, captions: CaptionCache | None) -> None:
    """Add the gauges and counters of the caption cache; they are 0 without one."""
    memory, disk = (None, None) if captions is None else (captions.memory, captions.disk)
    text = "Bytes of encoded prompts in memory."
    add_gauge(registry, "pid_caption_cache_bytes", text, lambda: 0 if memory is None else memory.bytes)
    text = "Bytes of the files in --caption-cache, as far as this server knows."
    add_gauge(registry, "pid_caption_disk_bytes", text, lambda: 0 if disk is None else disk.bytes)
    text = "Files in --caption-cache that were damaged and deleted."
    add_counter(registry, "pid_caption_files_damaged_total", text, lambda: 0 if disk is None else disk.damaged)
    text = "Failed operations on --caption-cache, such as writes to a full disk."
    add_counter(registry, "pid_caption_disk_failures_total", text, lambda: 0 if disk is None else disk.failures)


def _add_state(service: DecodeService) -> None:
    decoders = service.decoders
    gauges: tuple[tuple[str, str, tuple[str, ...], Callable[[], Values]], ...] = (
        (
            "pid_state",
            "1 for the current state of the server, 0 for the others.",
            ("state",),
            lambda: {(state,): state is service.lifecycle.state for state in State},
        ),
        (
            "pid_step_overdue_seconds",
            "Time by which a device's step exceeds its prediction; the watchdog ends the process if it is stuck.",
            ("device",),
            partial(_overdue, service),
        ),
        (
            "pid_cost_seconds",
            "Running estimate of the cost of a stage.",
            ("stage", "decoder", "size", "tile", "batch", "encoding"),
            lambda: {_cost_labels(key): x for key, x in service.current_costs().items()},
        ),
        (
            "pid_info",
            "Always 1; a decoder, its model, the runtime and device that serve it, and the version of the server.",
            ("decoder", "model", "runtime", "precision", "device", "version"),
            lambda: {
                (name, x.decoder, x.kind, x.precision, x.device, __version__): 1.0
                for name, x in ((name, decoder.info) for name, decoder in decoders.items())
            },
        ),
    )
    for name, text, labels, read in gauges:
        add_gauges(service.metrics.registry, name, text, labels, read)


def _cost_labels(key: CostKey) -> tuple[str, ...]:
    output = key.output
    decoder, size = key.loaded and key.loaded.decoder, output and output.size
    tile = output and output.tiling and output.tiling.tile
    return key.stage, decoder or "", str(size or ""), str(tile or ""), str(key.batch), key.encoding


def _overdue(service: DecodeService) -> Values:
    progress = service.dispatcher.progress()
    overdue = {name: max(0.0, x.elapsed - x.predicted) for name, x in progress.items()}
    return {(name,): overdue.get(name, 0.0) for name in service.devices}
