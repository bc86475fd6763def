"""The decode service: admission, lifecycle and accounting of decodes, independent of HTTP."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from engines.errors import DeviceLostError
from engines.pid.sampler import step_indices
from engines.runtime.protocol import Runtime, Sample
from engines.size import Size
from server.delivery import Admission, Undelivered
from server.dispatch import Clock, DecodeTask, Dispatcher
from server.errors import InvalidOptionError, UnavailableError
from server.faults import Faults, FaultyRuntime
from server.gauges import Gpu, Values, add_gauge, add_gauges, add_memory
from server.images.encoder import Encoder, Encoding
from server.images.formats import ImageFormat
from server.lifecycle import Lifecycle, State
from server.metrics import Metrics
from server.request import DecodeOptions, DecodeRequest, DecoderLimits
from server.scheduling.costs import CostTable
from server.scheduling.jobs import Job, Limits, Priority
from server.scheduling.scheduler import Scheduler
from server.settings import Settings
from server.stream import ImageStream
from server.watchdog import Watchdog, is_stuck
from server.worker import Worker, WorkerContext

log = logging.getLogger(__name__)

EncoderFactory = Callable[[int, Callable[[], None]], Encoder]  # threads, before_strip

DEVICE_LOST = "A device failed and the server is restarting; retry shortly."
STOP_SECONDS = 5.0  # limit for running steps, and then for running encodings, when the service stops


class DecodeService:
    """Decodes requests on one or more runtimes."""

    def __init__(
        self,
        settings: Settings,
        runtimes: Mapping[str, Runtime],
        gpus: Mapping[str, Gpu] | None = None,
        on_failure: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
        encoder_factory: EncoderFactory = Encoder,
    ) -> None:
        """Build the service around `runtimes`, by device name.

        Args:
            settings: The server's settings.
            runtimes: Runtimes of one bundle, not warmed up yet.
            gpus: GPUs whose memory and utilisation are reported, by device name.
            on_failure: Called once, from any thread, when a device is lost.
            clock: Returns the time in seconds. Must be `time.monotonic`, the clock of the spans, outside tests.
            encoder_factory: Makes the encoder; benchmarks replace it.
        """
        self.settings, self._clock = settings, clock
        self.lifecycle = Lifecycle(len(runtimes), self._accept_requests, on_failure)
        self._faults = Faults(settings.faults)
        if self._faults:
            log.warning("--faults is set, so requests fail on purpose: %s", settings.faults)
            runtimes = {name: FaultyRuntime(runtime, self._faults) for name, runtime in runtimes.items()}
        self.info = info = next(iter(runtimes.values())).info
        self.sizes = tuple(dict.fromkeys(size for runtime in runtimes.values() for size in runtime.info.sizes))
        self.decoder_limits = DecoderLimits(
            channels=info.latent_channels,
            latent_sizes=tuple(map(info.latent_size, self.sizes)),
            pixels_per_cell=info.pixels_per_cell * info.upscale,
            caption_tokens=info.caption_tokens,
            caption_width=info.caption_width,
            max_images=settings.max_images,
            max_body_bytes=settings.max_body_bytes,
        )
        self.metrics = Metrics(settings.deadline)
        self.costs = CostTable()
        self.dispatcher = Dispatcher(_scheduler(settings, runtimes, self.costs), self.metrics, clock)
        self.undelivered = Undelivered(settings.pending_bytes, settings.response_timeout, self.dispatcher, clock)
        self._encoder = encoder_factory(settings.encoder_threads, self._faults.before_strip)
        context = WorkerContext(
            self.dispatcher, self._encoder, self.metrics, self.lifecycle.device_ready, self._device_lost, clock
        )
        self._workers = [Worker(name, runtime, context) for name, runtime in runtimes.items()]
        self._watchdog = Watchdog(self._check_devices, interval=min(1.0, settings.watchdog_seconds / 4))
        self._add_gauges(gpus or {}, runtimes)

    # Lifecycle

    def start(self) -> None:
        """Begin the warm-up; the state becomes READY when every device is warm."""
        for worker in self._workers:
            worker.start()
        self._watchdog.start()

    def stop(self) -> None:
        """Fail the admitted images and end all threads, without waiting for one that hangs."""
        self._watchdog.stop()
        self._faults.release()
        self.dispatcher.stop()
        self._fail_admitted()
        limit = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, limit - time.monotonic()))
        self._encoder.close(STOP_SECONDS)

    async def drain(self) -> None:
        """Turn readiness off, accept requests during the drain delay, then reject new ones and finish the admitted.

        Requests that are not finished within the drain limit are aborted.
        """
        if not self.lifecycle.drain():
            return
        await asyncio.sleep(self.settings.drain_delay)
        self.dispatcher.accept(False)
        try:
            await asyncio.wait_for(self.undelivered.wait_empty(), self.settings.drain_limit)
        except TimeoutError:
            log.warning("aborting requests that did not finish within --drain-limit (%g s)", self.settings.drain_limit)
            self.abort()

    def abort(self) -> None:
        """Reject new requests and fail the admitted images that are not encoding yet."""
        self.dispatcher.accept(False)
        self._fail_admitted()

    def _fail_admitted(self) -> None:
        self.dispatcher.fail_all(UnavailableError("The server shut down before the image was finished; retry."))

    def _accept_requests(self) -> None:
        self._faults.arm()
        self.dispatcher.accept(True)

    def _device_lost(self, reason: str) -> None:
        # Turn liveness off first, so that no client gets 503 while /health/live still reports a live server.
        self.lifecycle.fail(reason)
        self.dispatcher.accept(False)
        self.dispatcher.fail_all(DeviceLostError(DEVICE_LOST))

    def _check_devices(self) -> bool:
        """Expire queued images and detect a stuck device. Return False once a device is lost."""
        self.dispatcher.expire()
        factor, minimum = self.settings.watchdog_factor, self.settings.watchdog_seconds
        for name, progress in self.dispatcher.progress().items():
            if is_stuck(progress.elapsed, progress.predicted, factor, minimum):
                self._device_lost(
                    f"Device {name}: step running for {progress.elapsed:.1f} s, expected {progress.predicted:.1f} s."
                )
                return False
        return True

    # Requests

    def submit(self, request: DecodeRequest, image_format: ImageFormat, client: str = "") -> Admission:
        """Admit all images of `request`, sent by `client`, or none of them. Call it on the event loop.

        Raises:
            InvalidOptionError: the requested deadline exceeds the server's maximum.
            QueueFullError: the request does not fit now, or exceeds the client's share (ClientShareError).
            UnavailableError: the server is starting, draining or failed.
        """
        options = request.options
        size = self.decoder_limits.output_size(request.latents.shape)
        nbytes = 3 * size.area  # per image
        self.undelivered.check(client, nbytes * len(request.latents))
        deadline = self._clock() + self._relative_deadline(size, options.deadline_ms)
        steps, priority = step_indices(options.steps), Priority[options.priority.upper()]
        tasks = [self._task(sample, options, image_format, deadline) for sample in _samples(request, size)]
        jobs = tuple(Job(size, steps, priority, deadline, client, task.encoding.kind, payload=task) for task in tasks)
        self.dispatcher.submit(jobs)
        return self.undelivered.admit(jobs, nbytes)

    def _task(self, sample: Sample, options: DecodeOptions, image_format: ImageFormat, deadline: float) -> DecodeTask:
        encoding = Encoding(image_format, options.compression, options.quality, self._png_text(options, sample.seed))
        on_end = partial(self._ended, sample.size, encoding.kind, deadline)
        return DecodeTask(sample, ImageStream(sample.seed, f"image/{image_format}", on_end), encoding)

    def _relative_deadline(self, size: Size, deadline_ms: int | None) -> float:
        """Return the deadline in seconds from now: the request's, or the default, extended for slow sizes."""
        if deadline_ms is not None:
            limit = self.settings.max_deadline
            if deadline_ms > 1000 * limit:
                raise InvalidOptionError(f"The option deadline_ms is limited to {1000 * limit:.0f} on this server.")
            return deadline_ms / 1000
        alone = self.dispatcher.query(lambda scheduler: scheduler.costs.decode(size))
        return max(self.settings.deadline, 4 * alone)

    def _png_text(self, options: DecodeOptions, seed: int) -> dict[str, str]:
        if not options.metadata:
            return {}
        return {
            "Software": "pid-decode-server",
            "Decoder": self.info.decoder,
            "Seed": str(seed),
            "Sigma": f"{options.sigma:g}",
            "Steps": str(options.steps),
        }

    def _ended(self, size: Size, encoding: str, deadline: float, stream: ImageStream) -> None:
        self.metrics.ended(stream, late=self._clock() > deadline)
        if stream.error is None:
            # Under load, encoding waits for a free thread; predictions should include that.
            self.dispatcher.observe("encode", size, stream.timings.encode, encoding=encoding)

    def _add_gauges(self, gpus: Mapping[str, Gpu], runtimes: Mapping[str, Runtime]) -> None:
        self._add_queue_gauges()
        self._add_state_gauges()
        add_memory(
            self.metrics.registry, gpus, lambda: {name: runtime.peak_memory() for name, runtime in runtimes.items()}
        )

    def _add_queue_gauges(self) -> None:
        limits, query = self.settings, self.dispatcher.query
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("pid_queue_images", "Images waiting for a device.", partial(query, Scheduler.queued)),
            ("pid_running_images", "Images on a device.", partial(query, Scheduler.running)),
            ("pid_backlog_seconds", "Predicted seconds of work, per device.", partial(query, Scheduler.backlog)),
            (
                "pid_pending_bytes",
                "Bytes of admitted images that are not delivered yet: pixels until they are encoded.",
                lambda: self.undelivered.bytes,
            ),
            ("pid_queue_limit_images", "Maximum number of queued images.", lambda: limits.queue_images),
            ("pid_backlog_limit_seconds", "Maximum of pid_backlog_seconds.", lambda: limits.queue_seconds),
            ("pid_pending_limit_bytes", "Maximum of pid_pending_bytes.", lambda: limits.pending_bytes),
        )
        for name, text, read in gauges:
            add_gauge(self.metrics.registry, name, text, read)

    def _add_state_gauges(self) -> None:
        info = self.info
        gauges: tuple[tuple[str, str, tuple[str, ...], Callable[[], Values]], ...] = (
            (
                "pid_state",
                "1 for the current state of the server, 0 for the others.",
                ("state",),
                lambda: {(state,): state is self.lifecycle.state for state in State},
            ),
            (
                "pid_step_overdue_seconds",
                "Time by which a device's step exceeds its prediction; the watchdog ends the process if it is stuck.",
                ("device",),
                self._overdue,
            ),
            (
                "pid_cost_seconds",
                "Running estimate of the cost of a stage.",
                ("stage", "size", "batch", "encoding"),
                lambda: {
                    (key.stage, str(key.size), str(key.batch), key.encoding): x for key, x in self.costs.table().items()
                },
            ),
            (
                "pid_info",
                "Always 1; the decoder, and the runtime and device that serve it.",
                ("decoder", "runtime", "precision", "device"),
                lambda: {(info.decoder, info.kind, info.precision, info.device): 1.0},
            ),
        )
        for name, text, labels, read in gauges:
            add_gauges(self.metrics.registry, name, text, labels, read)

    def _overdue(self) -> Values:
        progress = self.dispatcher.progress()
        overdue = {name: max(0.0, x.elapsed - x.predicted) for name, x in progress.items()}
        return {(worker.name,): overdue.get(worker.name, 0.0) for worker in self._workers}


def _samples(request: DecodeRequest, size: Size) -> Iterator[Sample]:
    """Yield the inputs of the images of `request`. Seeds count up from the request's, or from a random one."""
    options = request.options
    first_seed = secrets.randbits(53) if options.seed is None else options.seed  # 53 bits are exact in JavaScript
    for index, latent in enumerate(request.latents):
        caption = None if request.captions is None else request.captions[index]
        yield Sample(latent, size, options.sigma, (first_seed + index) % 2**64, caption)


def _scheduler(settings: Settings, runtimes: Mapping[str, Runtime], costs: CostTable) -> Scheduler[DecodeTask]:
    """Create a scheduler that accepts nothing until the devices are warm."""
    limits = Limits(
        queue_images=settings.queue_images,
        queue_seconds=settings.queue_seconds,
        slots=min(runtime.info.slots for runtime in runtimes.values()),
        max_batch=min(runtime.info.max_batch for runtime in runtimes.values()),
        shares=(settings.interactive_share, settings.standard_share, settings.batch_share),
    )
    devices = {name: frozenset(runtime.info.sizes) for name, runtime in runtimes.items()}
    return Scheduler(costs, limits, devices, accepting=False)
