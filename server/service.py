"""The decode service: admission, lifecycle and accounting of decodes, independent of HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ParamSpec, TypeVar

import torch

from engines.captions.protocol import TextEncoder
from engines.errors import DeviceLostError, PidError
from engines.pid.sampler import step_indices
from server.body.receive import BodyMemory, BodyReader
from server.captions.cache import CaptionCache, open_caption_cache
from server.captions.worker import CaptionWorker
from server.decoders import Decoder, DecoderTable, Runtimes
from server.delivery import Admission, Undelivered
from server.device_thread import DeviceThread, ThreadContext
from server.dispatch import Clock, DecodeJob, DecodeTask, Dispatcher
from server.errors import InvalidLatentError, InvalidOptionError, OutOfMemoryError, UnavailableError
from server.faults import Faults
from server.gpus import Gpu
from server.images.available import check_available, check_format
from server.images.encoder import Encoder
from server.images.encoding import Encoding
from server.images.formats import OutputFormat
from server.lifecycle import Lifecycle, State
from server.metrics import Metrics
from server.process.threads import started_pool
from server.request import DecodeOptions, DecodeRequest, ServerLimits
from server.scheduling.costs import CostKey, CostTable, Output
from server.scheduling.jobs import Job, Limits, Priority
from server.scheduling.pauses import Pauses
from server.scheduling.scheduler import Scheduler
from server.settings import READ_RATE_WINDOW, STALL_FACTOR, Settings
from server.switch import DecoderSwitch
from server.tasks import KnownCaptions, make_tasks
from server.warm_up import WarmUp
from server.watchdog import Watchdog, is_stuck
from server.worker import Worker

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
EncoderFactory = Callable[[int, Callable[[], None]], Encoder]  # threads, before_strip
_NO_CAPTIONS: KnownCaptions = {}

STALL_RETRY_SECONDS = 5.0
SWAP_RETRY_SECONDS = 10.0
DEVICE_LOST = "A device failed and the server is restarting; retry shortly."
CHECK_SECONDS = 0.25  # maximum time between checks of the devices
THREADS = 4  # that parse large bodies and write metrics
STOP_SECONDS = 5.0  # limit for running steps, and then for running encodings, when the service stops


class DecodeService:
    """Decodes requests on one or more runtimes.

    Attributes:
        start_error: Why a device could not be warmed up although it works, or None.
    """

    def __init__(
        self,
        settings: Settings,
        runtimes: Runtimes,
        gpus: Mapping[str, Gpu] | None = None,
        on_failure: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
        encoder_factory: EncoderFactory = Encoder,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        """Build the service around `runtimes`.

        Args:
            settings: The server's settings.
            runtimes: Runtimes by decoder and by device, not warmed up yet. Each decoder has the same devices.
            gpus: GPUs whose memory and utilisation are reported, by device name.
            on_failure: Called once, from any thread, when a device is lost.
            clock: Returns the time in seconds. Must be `time.monotonic`, the clock of the spans, outside tests.
            encoder_factory: Makes the encoder; benchmarks replace it.
            text_encoder: Encodes the prompts of requests; None if the server accepts none.
        """
        self.settings, self._clock = settings, clock
        self.start_error: PidError | None = None
        self.text_encoder = None if text_encoder is None else text_encoder.info
        self._faults = Faults(settings.faults)
        if self._faults:
            log.warning("--faults is set, so requests fail on purpose: %s", settings.faults)
        self.gpus = gpus or {}
        self.decoders = DecoderTable(runtimes, settings, self._faults, self.text_encoder)
        self.devices = self.decoders.devices
        threads = len(self.devices) + (text_encoder is not None)
        self.lifecycle = Lifecycle(threads, self._accept_requests, on_failure)
        self.body_memory = BodyMemory(settings.body_memory_bytes)
        self._threads = started_pool(THREADS, "request", partial(torch.set_num_threads, 1))
        self.bodies = BodyReader(self.limits.max_body_bytes, self.body_memory, settings.body_timeout, self._threads)
        self.metrics = Metrics(settings.deadline, self.decoders)
        self.costs = CostTable()
        check_interval = min(CHECK_SECONDS, settings.watchdog_seconds / 4, settings.stall_seconds / 4)
        max_prompts = 1 if text_encoder is None else text_encoder.info.max_batch
        scheduler = _scheduler(settings, self.decoders, self.costs, max_prompts)
        self.dispatcher = Dispatcher(scheduler, Pauses(check_interval), clock)
        read_timeout = min(settings.response_timeout, 2 * READ_RATE_WINDOW)
        self.undelivered = Undelivered(settings.pending_bytes, read_timeout, self.dispatcher, clock)
        self._encoder = encoder_factory(settings.encoder_threads, self._faults.before_strip)
        context = ThreadContext(
            self.dispatcher,
            self.metrics,
            self.lifecycle.device_ready,
            self.device_lost,
            self._cannot_start,
            clock,
            settings.cpu_threads or torch.get_num_threads(),
        )
        warm_up = WarmUp(self.dispatcher, self._encoder, clock, offload=self.decoders.resident is not None)
        workers = {device: Worker(device, self._encoder, context, warm_up) for device in self.devices}
        self.switch = DecoderSwitch(self.decoders, self.dispatcher, self.lifecycle, warm_up, workers)
        self._workers: list[DeviceThread] = [*workers.values()]
        self.captions: CaptionCache | None = None
        if text_encoder is not None:
            self.captions = open_caption_cache(settings, text_encoder.info)
            self._workers.append(CaptionWorker(text_encoder, self.captions, context))
        self._watchdog = Watchdog(self._check_devices, check_interval)

    # Lifecycle

    def start(self) -> None:
        """Begin the warm-up; the state becomes READY when every device is warm."""
        self._encoder.start()
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
        if self.captions is not None:
            self.captions.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """Call `function` on a thread that exists already; asyncio's own are started only when they are needed."""
        call = partial(function, *arguments, **keywords)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

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
        """Reject new requests and fail the admitted images."""
        self.dispatcher.accept(False)
        self._fail_admitted()

    def _fail_admitted(self) -> None:
        self.dispatcher.fail_all(UnavailableError("The server shut down before the image was finished; retry."))

    def _accept_requests(self) -> None:
        self._faults.arm()
        self.dispatcher.accept(True)

    def out_of_memory(self) -> None:
        """Fail the server, since any allocation may fail now. May be called from any thread, also repeatedly."""
        self._fail("The process ran out of memory.", OutOfMemoryError())

    def device_lost(self, reason: str) -> None:
        """Fail the server, since the state of a device is unknown. May be called from any thread."""
        self._fail(reason, DeviceLostError(DEVICE_LOST))

    def _cannot_start(self, error: PidError) -> None:
        self.start_error = error
        self.device_lost(str(error))

    def _fail(self, reason: str, error: PidError) -> None:
        # Turn liveness off first, so that no client gets 503 while /health/live still reports a live server.
        self.lifecycle.fail(reason)
        self.dispatcher.accept(False)
        self.dispatcher.fail_all(error)

    def _check_devices(self) -> bool:
        """Expire queued images and detect a stalled or stuck device. Return False once the server has failed."""
        if self.lifecycle.state is State.FAILED:
            self.dispatcher.fail_all(DeviceLostError(DEVICE_LOST))  # again, as it may have failed for lack of memory
            return False
        self.dispatcher.wake()
        self.dispatcher.expire()
        factor, minimum = self.settings.watchdog_factor, self.settings.watchdog_seconds
        stall = None
        for name, progress in self.dispatcher.progress().items():
            if is_stuck(progress.elapsed, progress.predicted, factor, minimum):
                self.device_lost(
                    f"Device {name}: step running for {progress.elapsed:.1f} s, expected {progress.predicted:.1f} s."
                )
                return False
            if is_stuck(progress.elapsed, progress.predicted, STALL_FACTOR, self.settings.stall_seconds):
                stall = f"Device {name}: a step takes far longer than the expected {progress.predicted:.2f} s."
        encoding = self.dispatcher.prompt_progress()
        if encoding is not None and is_stuck(encoding.elapsed, encoding.predicted, factor, minimum):
            self.device_lost(
                f"The text encoder has been encoding for {encoding.elapsed:.1f} s, expected {encoding.predicted:.1f} s."
            )
            return False
        self.lifecycle.stall(stall)
        return True

    # Decoders

    @property
    def limits(self) -> ServerLimits:
        """What requests may contain."""
        return self.decoders.limits

    def is_ready(self, name: str) -> bool:
        """Return whether the server accepts requests for a decoder."""
        return self.lifecycle.state in (State.READY, State.LOADING) and bool(self.decoders[name].runtimes)

    def current_costs(self) -> Mapping[CostKey, float]:
        """Return the estimated costs in seconds, without those of decoders that have been or are being replaced."""
        versions = {decoder.loaded for decoder in self.decoders.values()}
        table = self.costs.table()
        return {key: x for key, x in table.items() if key.loaded is None or key.loaded in versions}

    def _decoder_of(self, request: DecodeRequest) -> Decoder:
        """Return the decoder of a request, which may have been replaced while the request arrived."""
        decoder = self.decoders[request.decoder]
        if not decoder.runtimes:
            raise UnavailableError(f"The decoder {decoder.name} is being replaced; retry shortly.", SWAP_RETRY_SECONDS)
        if not decoder.limits.supports(request):
            raise InvalidLatentError(
                f"The decoder {decoder.name} was replaced while the request arrived; it does not support this latent."
            )
        return decoder

    # Requests

    def check(self, options: DecodeOptions, final: bool, client: str = "") -> None:
        """Reject a request that `submit` would reject whatever its body is. Call it on the event loop.

        Args:
            options: The options known so far.
            final: The body cannot add options. Otherwise it may still set the priority.
            client: Who sends the request, for fair shares.

        Raises:
            InvalidOptionError, QueueFullError, UnavailableError: as `submit`.
        """
        self._check_stall()
        if options.format is not None:
            check_available(options.format)
        self._check_deadline(options.deadline_ms)
        known = final or "priority" in options.model_fields_set
        self.dispatcher.check(client, _priority(options) if known else None)
        self.undelivered.check(client, self.decoders.smallest_image)

    async def find_captions(self, request: DecodeRequest) -> KnownCaptions:
        """Return the known captions of the prompts of `request`, and where each was found. Call it before `submit`."""
        if self.captions is None or request.prompts is None:
            return {}
        return await self.captions.find(request.prompts)

    def submit(
        self,
        request: DecodeRequest,
        image_format: OutputFormat,
        client: str = "",
        captions: KnownCaptions = _NO_CAPTIONS,
        previews: bool = False,
    ) -> Admission:
        """Admit all images of `request`, sent by `client`, or none of them. Call it on the event loop.

        Images whose prompt is not among `captions`, from `find_captions`, wait for the text encoder. With `previews`,
        the stream of each image gets a preview after each step.

        Raises:
            InvalidOptionError: the requested deadline exceeds the server's maximum, or this server cannot encode
                `image_format`, or no image of this size.
            DeadlineTooShortError, TooManyImagesError: the request can never be accepted.
            QueueFullError: the request does not fit now, or exceeds the client's share (ClientShareError).
            UnavailableError: the server is starting, stalled, draining or failed.
        """
        self._check_stall()
        options = request.options
        decoder = self._decoder_of(request)
        size = decoder.limits.output_size(request.latents.shape)
        output = decoder.output(size)
        check_format(image_format, size)
        encoding = Encoding(image_format, options.compression, options.quality)
        nbytes = encoding.held_bytes(size)  # per image
        self.undelivered.check(client, nbytes * len(request.latents))
        self._check_deadline(options.deadline_ms)
        tasks = make_tasks(request, size, encoding, captions, decoder.info.decoder)
        prompts = [prompt if prompt not in captions else None for prompt in request.prompts or [None] * len(tasks)]
        seconds = self._relative_deadline(output, encoding.kind, previews, prompts, options.deadline_ms)
        steps, priority, deadline = step_indices(options.steps), _priority(options), self._clock() + seconds
        strips = len(encoding.strips(size))
        job = partial(Job, output, steps, priority, deadline, client, encoding.kind, strips, previews)
        jobs = tuple(job(prompt, payload=task) for prompt, task in zip(prompts, tasks, strict=True))
        self.dispatcher.submit(jobs)
        for one in jobs:
            one.payload.stream.on_end(partial(self._ended, one))
        for prompt in request.prompts or ():
            self.metrics.admitted_prompt(captions[prompt][1] if prompt in captions else "encoder")
        return self.undelivered.admit(jobs, nbytes)

    def _check_deadline(self, deadline_ms: int | None) -> None:
        limit = 1000 * self.settings.max_deadline
        if deadline_ms is not None and deadline_ms > limit:
            raise InvalidOptionError(f"The option deadline_ms is limited to {limit:.0f} on this server.")

    def _check_stall(self) -> None:
        if self.lifecycle.stalled:
            raise UnavailableError(
                "A device takes far longer for a step than expected; retry on another replica.", STALL_RETRY_SECONDS
            )

    def _relative_deadline(
        self, output: Output, encoding: str, previews: bool, prompts: Sequence[str | None], deadline_ms: int | None
    ) -> float:
        """Return the deadline in seconds from now: the request's, or the default, extended for slow requests.

        `prompts` has the prompt of each image that has to be encoded, or None.
        """
        if deadline_ms is not None:
            return deadline_ms / 1000
        missing = len(set(prompts) - {None})
        decode, caption = self.dispatcher.query(
            lambda scheduler: (scheduler.costs.decode(output, encoding, previews), scheduler.costs.caption())
        )
        return max(self.settings.deadline, 4 * (len(prompts) * decode + missing * caption))

    def _ended(self, job: DecodeJob) -> None:
        stream = job.payload.stream
        if isinstance(stream.error, OutOfMemoryError) and self.lifecycle.state is not State.FAILED:
            self.out_of_memory()
        self.metrics.ended(job.output.decoder, stream, job.payload.encoding.format, late=self._clock() > job.deadline)
        self.dispatcher.close(job)


def _priority(options: DecodeOptions) -> Priority:
    return Priority[options.priority.upper()]


def _scheduler(settings: Settings, decoders: DecoderTable, costs: CostTable, max_prompts: int) -> Scheduler[DecodeTask]:
    """Create a scheduler that accepts nothing until the devices are warm, and whose devices have no decoders yet."""
    limits = Limits(
        queue_images=settings.queue_images,
        queue_seconds=settings.queue_seconds,
        slots=decoders.slots,
        resident=decoders.resident,
        encoder_threads=settings.encoder_threads,
        max_prompts=max_prompts,
        shares=(settings.interactive_share, settings.standard_share, settings.batch_share),
    )
    return Scheduler(costs, limits, {device: {} for device in decoders.devices}, accepting=False)
