"""The decode service behind the routes: what it takes, whether it is healthy, and images in and answers out."""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from engines.pid.sampler import step_indices
from engines.runtime.protocol import Runtime, Sample
from engines.size import Size
from server.dispatch import DecodeTask, Dispatcher
from server.errors import InvalidOptionError, QueueFullError
from server.faults import Faults, FaultyRuntime
from server.images.encoder import Encoder, Encoding
from server.images.formats import ImageFormat
from server.metrics import Gpu, Metrics
from server.request import DecodeRequest, DecoderLimits
from server.scheduling.costs import CostTable
from server.scheduling.scheduler import Job, Limits, Priority, Scheduler
from server.settings import Settings
from server.stream import ImageStream
from server.watchdog import Watchdog, is_stuck

log = logging.getLogger(__name__)


class State(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True)
class Admitted:
    """The images of one request, in its order."""

    jobs: tuple[Job, ...]
    answers: tuple[ImageStream, ...]
    nbytes: int  # of their pixels, which is what their answers can take up at most


class DecodeService:
    """All of the server that is not HTTP."""

    def __init__(
        self,
        settings: Settings,
        runtimes: Mapping[str, Runtime],
        gpus: Mapping[str, Gpu] | None = None,
        on_fatal: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.state, self._clock, self._on_fatal = settings, State.STARTING, clock, on_fatal
        self.reason: str | None = None  # why the state is FAILED
        self._faults = Faults(settings.faults)
        if self._faults:
            log.warning("faults will be injected: %s", settings.faults)
            runtimes = {name: FaultyRuntime(runtime, self._faults) for name, runtime in runtimes.items()}
        self.info = info = next(iter(runtimes.values())).info
        self.sizes = tuple(dict.fromkeys(size for runtime in runtimes.values() for size in runtime.info.sizes))
        self.accepts = DecoderLimits(
            channels=info.latent_channels,
            latent_sizes=tuple(map(info.latent_size, self.sizes)),
            pixels_per_cell=info.pixels_per_cell * info.upscale,
            caption_tokens=info.caption_tokens,
            caption_width=info.caption_width,
            max_batch=settings.max_images,
            max_body=settings.max_body,
        )
        self.metrics = Metrics(settings.deadline)
        slots = min(runtime.info.slots for runtime in runtimes.values())
        max_batch = min(runtime.info.max_batch for runtime in runtimes.values())
        shares = 1.0, settings.standard_share, settings.batch_share
        limits = Limits(settings.queue_images, settings.queue_seconds, slots, max_batch, shares=shares)
        devices = {name: frozenset(runtime.info.sizes) for name, runtime in runtimes.items()}
        self._scheduler = Scheduler(CostTable(), limits, devices, accepting=False)
        self._encoder = Encoder(settings.encoder_threads, self._faults.before_strip)
        self._dispatcher = Dispatcher(
            runtimes, self._scheduler, self._encoder, self.metrics, self._ready, self._failed, clock
        )
        self._watchdog = Watchdog(self._look, interval=min(1.0, settings.watchdog_seconds / 4))
        self._undelivered = self._pending_bytes = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._add_gauges()
        self.metrics.add_costs(self._scheduler.costs.table)
        self.metrics.add_memory(gpus or {}, lambda: {name: runtime.peak_memory() for name, runtime in runtimes.items()})

    def _add_gauges(self) -> None:
        """What Prometheus reads here whenever it asks."""
        info, limits, metrics = self.info, self.settings, self.metrics
        for name, text, read in (
            ("pid_queue_images", "Images waiting for a device.", Scheduler.queued),
            ("pid_running_images", "Images on a device.", Scheduler.running),
            ("pid_backlog_seconds", "Predicted device seconds of admitted work, per device.", Scheduler.backlog),
        ):
            metrics.add_gauge(name, text, partial(self._dispatcher.read, read))
        for name, text, limit in (
            ("pid_queue_limit_images", "Images that may wait.", limits.queue_images),
            ("pid_backlog_limit_seconds", "Predicted device seconds that may wait, per device.", limits.queue_seconds),
            ("pid_pending_limit_bytes", "Pixels that may be undelivered.", limits.pending_bytes),
        ):
            metrics.add_gauge(name, text, partial(float, limit))
        metrics.add_gauge(
            "pid_pending_bytes", "Pixels of images admitted and not yet delivered.", lambda: self._pending_bytes
        )
        metrics.add_gauges(
            "pid_state", "1 for the state that the server is in.", "state", lambda: {x: x is self.state for x in State}
        )
        metrics.add_gauges(
            "pid_step_overdue_seconds",
            "Time by which a device's step goes beyond its prediction; far beyond, the watchdog ends the process.",
            "device",
            self._dispatcher.overdue,
        )
        metrics.add_info(decoder=info.decoder, runtime=info.kind, precision=info.precision, device=info.device)

    # Life.

    def start(self) -> None:
        """Begin to warm up; `state` turns to ready when every device is."""
        self._dispatcher.start()
        self._watchdog.start()

    def stop(self) -> None:
        """ImageStream whatever is left and end all threads."""
        self._watchdog.stop()
        self._faults.end()
        self._dispatcher.stop()
        self._encoder.close()

    def _ready(self) -> None:
        self._faults.arm()
        if self.state is State.STARTING:
            self.state = State.READY

    def _failed(self, reason: str) -> None:
        if self.state is not State.FAILED:
            log.critical("not live any more: %s", reason)
            self.state, self.reason = State.FAILED, reason
            self._on_fatal()

    def _look(self) -> bool:
        """Once in a while, from the watchdog's thread."""
        factor, floor = self.settings.watchdog_factor, self.settings.watchdog_seconds
        reason = self._dispatcher.tend(lambda seconds, predicted: is_stuck(seconds, predicted, factor, floor))
        if reason is not None:
            self._dispatcher.lose(reason)
        return reason is None

    async def drain(self) -> None:
        """Stop being ready, go on serving while load balancers notice, refuse new work, finish what was admitted."""
        if self.state is State.FAILED:
            return
        self.state = State.DRAINING
        await asyncio.sleep(self.settings.drain_delay)
        self._dispatcher.accept(False)
        try:
            await asyncio.wait_for(self._idle.wait(), self.settings.drain_limit)
        except TimeoutError:
            log.warning("not everything was finished within %g s", self.settings.drain_limit)
            self.give_up()

    def give_up(self) -> None:
        """Take nothing more and answer what was admitted with 503."""
        self._dispatcher.accept(False)
        self._dispatcher.give_up()

    # DecodeTask.

    def submit(self, request: DecodeRequest, image_format: ImageFormat) -> Admitted:
        """Admit all images of `request` or none, on the event loop.

        Raises InvalidOptionError, QueueFullError or UnavailableError.
        """
        options = request.options
        nbytes = self._check_pending(request)
        first_seed = secrets.randbits(53) if options.seed is None else options.seed  # 53 bits: exact in JavaScript too
        now, priority = self._clock(), Priority[options.priority.upper()]
        jobs, answers = [], []
        for i, latent in enumerate(request.latents):
            cell = self.accepts.pixels_per_cell
            size = Size(latent.shape[1] * cell, latent.shape[2] * cell)
            seed = (first_seed + i) % 2**64
            deadline = now + self._due(size, options.deadline_ms)
            answer = ImageStream(seed, f"image/{image_format}", partial(self._count, size, deadline))
            sample = Sample(
                latent, size, options.sigma, seed, None if request.captions is None else request.captions[i]
            )
            text = self._text(sample, options.steps) if options.metadata else {}
            work = DecodeTask(sample, answer, Encoding(image_format, options.compression, options.quality, text))
            jobs.append(Job(size, step_indices(options.steps), priority, deadline, payload=work))
            answers.append(answer)
        self._dispatcher.submit(jobs)
        self._undelivered += 1
        self._pending_bytes += nbytes
        self._idle.clear()
        return Admitted(tuple(jobs), tuple(answers), nbytes)

    def _check_pending(self, request: DecodeRequest) -> int:
        """Bytes that the answers can take up; a client that does not read leaves them here."""
        images, _, height, width = request.latents.shape
        nbytes = 3 * images * height * width * self.accepts.pixels_per_cell**2
        if self._pending_bytes and self._pending_bytes + nbytes > self.settings.pending_bytes:
            held = f"{self._pending_bytes / 2**20:.0f} of {self.settings.pending_bytes / 2**20:.0f} MiB"
            raise QueueFullError(
                f"Images not yet delivered hold {held}; try again later.", self._dispatcher.read(Scheduler.backlog)
            )
        return nbytes

    def _count(self, size: Size, deadline: float, answer: ImageStream) -> None:
        self.metrics.ended(answer, late=self._clock() > deadline)
        if answer.error is None and answer.media_type == "image/png":
            # Under load, encoding waits for threads; predictions should know.
            self._dispatcher.observe_encoding(size, answer.timings.encode)

    def release(self, admitted: Admitted) -> None:
        """The request is over, its answers delivered or not wanted any more. On the event loop, once for each."""
        unfinished = [job for job in admitted.jobs if not job.payload.answer.ended]
        if unfinished:
            self._dispatcher.cancel(unfinished)
        self._undelivered -= 1
        self._pending_bytes -= admitted.nbytes
        if not self._undelivered:
            self._idle.set()

    def _due(self, size: Size, deadline_ms: int | None) -> float:
        """Seconds within which an image is due: as asked for, else as set, or longer where one alone takes longer."""
        if deadline_ms is not None:
            limit = self.settings.max_deadline
            if deadline_ms > 1000 * limit:
                raise InvalidOptionError(f"The option deadline_ms may be up to {1000 * limit:.0f} on this server.")
            return deadline_ms / 1000
        costs = self._scheduler.costs
        alone = costs.condition(size) + 4 * costs.step(size) + costs.finish(size) + costs.encode(size)
        return max(self.settings.deadline, 4 * alone)

    def _text(self, sample: Sample, steps: int) -> dict[str, str]:
        return {
            "Software": "pid-decode-server",
            "Decoder": self.info.decoder,
            "Seed": str(sample.seed),
            "Sigma": f"{sample.sigma:g}",
            "Steps": str(steps),
        }

    def describe(self) -> dict[str, Any]:
        """What `/info` tells: the decoder, what it takes, how it runs, and what that costs."""
        info, settings = self.info, self.settings
        return {
            "decoder": info.decoder,
            "latent_space": {
                "name": info.latent_space,
                "channels": info.latent_channels,
                "pixels_per_cell": info.pixels_per_cell,
                "sigma_frame": info.sigma_frame,
            },
            "upscale": info.upscale,
            "sizes": [{"output": list(size), "latent": list(info.latent_size(size))} for size in self.sizes],
            "caption": {"tokens": info.caption_tokens, "width": info.caption_width},
            "precision": info.precision,
            "runtime": info.kind,
            "device": info.device,
            "notes": list(info.notes),
            "limits": {
                "images_per_request": settings.max_images,
                "images_per_step": info.max_batch,
                "body_bytes": settings.max_body,
                "pending_bytes": settings.pending_bytes,
                "queue_images": settings.queue_images,
                "queue_seconds": settings.queue_seconds,
                "standard_share": settings.standard_share,
                "batch_share": settings.batch_share,
                "deadline_seconds": settings.deadline,
                "max_deadline_seconds": settings.max_deadline,
            },
            "costs": [
                {"stage": key.stage, "size": list(key.size), "batch": key.batch, "seconds": round(seconds, 6)}
                for key, seconds in self._scheduler.costs.table().items()
            ],
        }
