"""The thread of one device: it starts, steps and finishes images as the dispatcher plans."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from engines.errors import DecodeError, DeviceMemoryError, PidError
from engines.pid.sampler import step_indices
from engines.runtime.protocol import Runtime, Sample
from engines.size import Size
from server.device_thread import DeviceThread, ThreadContext
from server.dispatch import DecodeJob, DecodeTask
from server.images.encoder import Encoder
from server.images.encoding import EncodeProgress
from server.scheduling.costs import PNG_FAST, PREVIEW, CostStage
from server.scheduling.jobs import DevicePlan

log = logging.getLogger(__name__)

T = TypeVar("T")


class Worker(DeviceThread):
    """Thread that runs one device.

    DecodeError and DeviceMemoryError fail only the images concerned.
    """

    def __init__(self, name: str, runtime: Runtime, encoder: Encoder, context: ThreadContext) -> None:
        """Create the thread of the device `name`, which runs `runtime` and passes the images on to `encoder`."""
        super().__init__(f"device {name}", runtime, context)
        self._device_name, self._runtime, self._encoder = name, runtime, encoder

    def _serve(self) -> None:
        self._metrics.busy(self._device_name, 0.0)
        while (plan := self._dispatcher.next_plan(self._device_name)) is not None:
            began = self._clock()
            self._execute(plan)
            self._metrics.busy(self._device_name, self._clock() - began)
        self._runtime.close()

    def _execute(self, plan: DevicePlan[DecodeTask]) -> None:
        for job in plan.drop:
            self._runtime.release(job.payload.slot)
        failed = [job for job in plan.start if not self._start(job)]
        for job in self._step([job for job in plan.batch if job not in failed]):
            self._finish(job)

    def _start(self, job: DecodeJob) -> bool:
        """Condition the image. Return False if that failed."""
        task, stream = job.payload, job.payload.stream
        task.started = self._clock()
        waited = job.admitted if task.captioned is None else task.captioned
        if task.captioned is not None:
            stream.timings.caption = stream.add_span("caption", job.admitted, waited)
        stream.timings.queue = stream.add_span("queue", waited, task.started)
        try:
            task.slot = self._runtime.start(task.sample)
        except (DecodeError, DeviceMemoryError) as error:
            self._dispatcher.fail(job, error)
            return False
        stream.timings.condition = stream.add_span("condition", task.started, self._clock())
        self._dispatcher.observe("condition", job.size, stream.timings.condition)
        return True

    def _step(self, batch: Sequence[DecodeJob]) -> list[DecodeJob]:
        """Run one step of `batch`; return the jobs whose last step it was."""
        if not batch:
            return []
        began = self._clock()
        try:
            self._runtime.step([job.payload.slot for job in batch], [job.next_step for job in batch])
        except (DecodeError, DeviceMemoryError) as error:
            return self._step_one_by_one(batch, error)
        ended = self._clock()
        self._dispatcher.observe("step", batch[0].size, ended - began, len(batch))
        for job in batch:
            job.payload.stream.add_span(f"step {job.next_step}", began, ended)
        self._metrics.stepped(len(batch))
        for job in batch:
            if job.previews and not job.payload.stream.ended:
                self._preview(job)
        return self._dispatcher.stepped(batch)

    def _preview(self, job: DecodeJob) -> None:
        """Hand a preview of the step that has just ended to the encoder. If that fails, the image has one less."""
        stream, began = job.payload.stream, self._clock()
        try:
            pixels = self._runtime.preview(job.payload.slot)
        except (DecodeError, DeviceMemoryError) as error:
            log.warning("%s: no preview of an image: %s", self.name, error)
            return
        seconds = stream.add_span("preview", began, self._clock())
        self._dispatcher.observe("preview", job.size, seconds)
        step, steps, report = job.steps_done + 1, len(job.steps), partial(self._report_preview, job)
        self._encoder.encode_preview(pixels, step, steps, stream, job.rank, report)

    def _step_one_by_one(self, batch: Sequence[DecodeJob], error: PidError) -> list[DecodeJob]:
        """Retry a failed step image by image, so that only the images that cause the error fail."""
        if len(batch) == 1:
            self._runtime.release(batch[0].payload.slot)
            self._dispatcher.fail(batch[0], error)
            return []
        if isinstance(error, DeviceMemoryError):
            cap = len(batch) // 2
            log.warning("%s: a batch of %d does not fit; limited to %d", self.name, len(batch), cap)
            self._dispatcher.cap_batch(batch[0].size, cap)
        return [job for single in batch for job in self._step([single])]

    def _finish(self, job: DecodeJob) -> None:
        """Start the copy to the host and hand the rows to the encoder."""
        task, stream, began = job.payload, job.payload.stream, self._clock()
        stream.timings.denoise = began - task.started - stream.timings.condition
        try:
            rows = self._runtime.finish(task.slot)
        except (DecodeError, DeviceMemoryError) as error:
            self._dispatcher.fail(job, error)
            return
        finally:
            self._runtime.release(task.slot)
        stream.timings.finish = stream.add_span("finish", began, self._clock())
        self._dispatcher.observe("finish", job.size, stream.timings.finish)
        self._encoder.encode(rows, stream, task.encoding, job.rank, partial(self._report, job))

    def _report(self, job: DecodeJob, progress: EncodeProgress) -> None:
        """Pass on the progress of an encoding; called on encoder threads."""
        self._dispatcher.record_encoding(job, progress)
        if progress.ended:
            self._metrics.encoder_busy(progress.work)

    def _report_preview(self, job: DecodeJob, progress: EncodeProgress) -> None:
        """Record the cost of encoding a preview; called on encoder threads."""
        if progress.ended and progress.done == 1:
            self._dispatcher.observe("encode", job.size, progress.work, encoding=PREVIEW)
            self._metrics.encoder_busy(progress.work)

    def _warm_up(self) -> None:
        """Prepare the runtime and measure the cost of every stage, for every size and batch."""
        began = self._clock()
        self._encoder.warm_up()
        self._runtime.warm_up()
        info = self._runtime.info
        for size in info.sizes:
            for batch in range(1, info.max_batch + 1):
                self._measure_undisturbed(partial(self._measure, size, batch))
        log.info("%s on %s: warm-up took %.1f s", info.decoder, info.device, self._clock() - began)

    def _measure(self, size: Size, batch: int) -> None:
        """Measure the cost of every stage."""
        runtime, info = self._runtime, self._runtime.info
        sample = Sample(latent=torch.zeros(info.latent_channels, *info.latent_size(size)), size=size)
        slots = [self._timed("condition", size, partial(runtime.start, sample)) for _ in range(batch)]
        for index in step_indices(2):  # the first step may select kernels; the cost table discards it
            self._timed("step", size, partial(runtime.step, slots, [index] * batch), batch)
        preview = self._timed("preview", size, partial(runtime.preview, slots[0]))
        rows = self._timed("finish", size, partial(runtime.finish, slots[0]))
        for slot in slots:
            runtime.release(slot)
        self._timed("encode", size, partial(self._encoder.measure, rows), encoding=PNG_FAST)
        self._timed("encode", size, partial(self._encoder.measure_preview, preview), encoding=PREVIEW)

    def _timed(self, stage: CostStage, size: Size, work: Callable[[], T], batch: int = 1, encoding: str = "") -> T:
        began = self._clock()
        result = work()
        self._dispatcher.measure(stage, size, self._clock() - began, batch, encoding)
        return result
