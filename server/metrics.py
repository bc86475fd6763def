"""Counters and histograms for Prometheus. Gauges are in gauges.py.

Metric names end in their unit. The buckets of durations are fractions of the default deadline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from engines.errors import DecodeError, DeviceLostError, DeviceMemoryError, PidError
from server import errors
from server.images.formats import OUTPUT_FORMATS, OutputFormat
from server.stream import ImageStream, Stage, Timings

# abandoned: the client disconnected; invalid: values of the request led to NaN or infinity
Outcome = Literal["in-time", "late", "failed", "abandoned", "invalid"]
AbortReason = Literal[
    "refused",  # far over the connection limit
    "evicted",  # idle while a new connection arrived at the limit
    "header-timeout",
    "body-timeout",
    "response-timeout",
    "read-rate",  # the client read its response too slowly
    "keep-alive-timeout",
    "linger-timeout",  # the client did not close its side after the last response
    "incomplete",  # a response to an HTTP/1.0 client failed after its start
]

CaptionSource = Literal["memory", "disk", "encoder"]
ProtocolName = Literal["decode", "remote-decode", "kserve"]

# fmt: off
_BUCKETS = (
    0.0002, 0.0005, 0.001, 0.002, 0.0035, 0.005, 0.007, 0.01, 0.014, 0.02, 0.035, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85,
    1.0, 1.5, 3.0,
)
# fmt: on


class Metrics:
    """Counters and histograms of one server, in a separate registry. Methods may be called from any thread."""

    def __init__(self, deadline: float, decoders: Iterable[str]) -> None:
        """Create the metrics; `deadline` is the default deadline in seconds, and `decoders` are names."""
        disable_created_metrics()  # a series `…_created` per counter and histogram, with the time of the start
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        buckets = tuple(float(f"{deadline * share:.3g}") for share in _BUCKETS)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        self.requests = counter(
            "pid_requests_total",
            "Decode requests by HTTP status and protocol; those rejected before their decoder was known have none.",
            *("code", "protocol", "decoder"),
        )
        self.rejections = counter("pid_refusals_total", "Requests rejected, by error code.", "code")
        self._cancelled = counter(
            "pid_cancelled_total", "Images cancelled, by stage and reason.", "decoder", "stage", "reason"
        )
        self.images = counter("pid_images_total", "Images encoded in full, by format.", "decoder", "format")
        self.steps = counter(
            "pid_steps_total", "Denoising steps, counted per image, and per tile of an image in tiles.", "decoder"
        )
        self._previews = counter("pid_previews_total", "Previews encoded.", "decoder")
        self.bytes_out = counter("pid_response_bytes_total", "Bytes of encoded images sent.")
        self.swaps = counter("pid_bundle_swaps_total", "Replacements of bundles, by result.", "decoder", "result")
        text = "Times that weights were moved from host memory to a device."
        self._restores = counter("pid_weight_restores_total", text, "decoder")
        self.swap_seconds = gauge(
            "pid_bundle_swap_seconds",
            "Time since the server began to check or replace the bundle of a decoder, 0 while idle.",
            "decoder",
        )
        self.in_flight = gauge("pid_requests_in_flight", "Decode requests being served.")
        self.batch = Histogram(
            "pid_batch_size", "Images per step.", ("decoder",), buckets=(1, 2, 3, 4, 6, 8, 12, 16), registry=registry
        )
        self._outcomes = counter("pid_image_outcomes_total", "Admitted images by outcome.", "decoder", "outcome")
        self._busy = counter("pid_device_busy_seconds_total", "Time a device spent on images.", "device", "decoder")
        self._encoder_busy = counter(
            "pid_encoder_busy_seconds_total", "Time that encoder threads spent on images, added up over all threads."
        )
        self.request_seconds = seconds(
            "pid_request_seconds", "Time from a request's first byte to its response's last.", "code", "decoder"
        )
        self.connections = counter("pid_accepted_connections_total", "Connections accepted.")
        self.open_connections = gauge(
            "pid_connections", "Open connections: idle, or active with a request in progress.", "state"
        )
        self.connection_limit = gauge("pid_connection_limit", "Maximum number of open connections.")
        self.aborted_connections = counter(
            "pid_aborted_connections_total", "Connections that the server closed before their end, by reason.", "reason"
        )
        self._prompts = counter(
            "pid_prompts_total", "Admitted images with a prompt, by where the caption came from.", "source"
        )
        self._caption_batch = Histogram(
            "pid_caption_batch_size",
            "Prompts per batch of the text encoder.",
            buckets=(1, 2, 3, 4, 6, 8),
            registry=registry,
        )
        self._caption_busy = counter("pid_caption_busy_seconds_total", "Time the text encoder spent on prompts.")
        self._stage_seconds = seconds("pid_stage_seconds", "Time an image spends in each stage.", "decoder", "stage")
        self._begin_at_zero()
        for decoder in decoders:
            self._begin_decoder_at_zero(decoder)

    def _begin_at_zero(self) -> None:
        """Create all series at zero, because rate() misses the first increment of a series that appears late."""
        self._begin_requests_at_zero("")
        for code in _rejection_codes():
            self.rejections.labels(code)
        for reason in get_args(AbortReason):
            self.aborted_connections.labels(reason)
        for source in get_args(CaptionSource):
            self._prompts.labels(source)

    def _begin_decoder_at_zero(self, decoder: str) -> None:
        """Create all series of a decoder at zero."""
        self._begin_requests_at_zero(decoder)
        self.steps.labels(decoder)
        self.batch.labels(decoder)
        self._restores.labels(decoder)
        self._previews.labels(decoder)
        for result in ("done", "failed"):
            self.swaps.labels(decoder, result)
        self.swap_seconds.labels(decoder)
        for stage in get_args(Stage):
            for error in (errors.CancelledError, errors.DeadlineError):
                self._cancelled.labels(decoder, stage, error.code)
        for image_format in OUTPUT_FORMATS:
            self.images.labels(decoder, image_format)
        for outcome in get_args(Outcome):
            self._outcomes.labels(decoder, outcome)
        for timing in fields(Timings):
            self._stage_seconds.labels(decoder, timing.name)

    def _begin_requests_at_zero(self, decoder: str) -> None:
        for code in ("200", "400", "422", "429", "499", "500", "503", "504"):
            self.request_seconds.labels(code, decoder)
            for protocol in get_args(ProtocolName):
                self.requests.labels(code, protocol, decoder)

    def stepped(self, decoder: str, batch: int) -> None:
        """Count one step of a batch."""
        self.batch.labels(decoder).observe(batch)
        self.steps.labels(decoder).inc(batch)

    def busy(self, device: str, decoder: str, seconds: float) -> None:
        """Add to the time that a device was busy with a decoder."""
        self._busy.labels(device, decoder).inc(seconds)

    def restored(self, decoder: str) -> None:
        """Count one move of the weights of a decoder from host memory to a device."""
        self._restores.labels(decoder).inc()

    def previewed(self, decoder: str) -> None:
        """Count one preview that was encoded."""
        self._previews.labels(decoder).inc()

    def encoder_busy(self, seconds: float) -> None:
        """Add to the busy time of the encoder threads."""
        self._encoder_busy.inc(seconds)

    def admitted_prompt(self, source: CaptionSource) -> None:
        """Count an admitted image with a prompt."""
        self._prompts.labels(source).inc()

    def encoded_prompts(self, count: int, seconds: float) -> None:
        """Count one batch of prompts that the text encoder has encoded."""
        self._caption_batch.observe(count)
        self._caption_busy.inc(seconds)

    def ended(self, decoder: str, stream: ImageStream, image_format: OutputFormat, late: bool) -> None:
        """Count an admitted image that has ended, and its format and stage timings if it succeeded."""
        outcome: Outcome = "late" if late else "in-time"
        if isinstance(stream.error, errors.CancelledError):
            outcome = "abandoned"
        elif isinstance(stream.error, errors.ExtremeValuesError):
            outcome = "invalid"
        elif stream.error is not None:
            outcome = "late" if isinstance(stream.error, errors.DeadlineError) else "failed"
        if isinstance(stream.error, errors.CancelledError | errors.DeadlineError):
            self._cancelled.labels(decoder, stream.stage, stream.error.code).inc()
        self._outcomes.labels(decoder, outcome).inc()
        if stream.error is None:
            self._image_done(decoder, stream, image_format)

    def _image_done(self, decoder: str, stream: ImageStream, image_format: OutputFormat) -> None:
        self.images.labels(decoder, image_format).inc()
        for stage, seconds in asdict(stream.timings).items():
            if stage == "caption" and not seconds:
                continue  # the image did not wait for a caption
            self._stage_seconds.labels(decoder, stage).observe(seconds)

    def exposition(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)


def _rejection_codes() -> Iterator[str]:
    """Yield the codes of all errors that a response can have."""
    known = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, PidError)]
    ours: list[type[PidError]] = [*known, DecodeError, DeviceMemoryError, DeviceLostError]
    return (error.code for error in ours if error not in (PidError, errors.CancelledError))
