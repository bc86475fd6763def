"""The thread of one device: it starts, steps and finishes images as the dispatcher plans."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from engines.errors import DecodeError, DeviceMemoryError, PidError
from engines.runtime.cuda_graphs import return_unused_memory
from engines.runtime.protocol import Runtime
from server.device_thread import DeviceThread, ThreadContext
from server.dispatch import DecodeJob, DecodeTask
from server.images.encoder import Encoder
from server.images.encoding import EncodeProgress
from server.scheduling.costs import PREVIEW, Loaded
from server.scheduling.jobs import DevicePlan
from server.warm_up import WarmUp

log = logging.getLogger(__name__)

T = TypeVar("T")


class Worker(DeviceThread):
    """Thread that runs one device.

    Attributes:
        runtimes: Those of the decoders on the device. Any thread may add one, warmed up unless the thread has not been
            started yet; this thread removes those that it has unloaded.

    DecodeError and DeviceMemoryError fail only the images concerned.
    """

    def __init__(self, name: str, encoder: Encoder, context: ThreadContext, warm_up: WarmUp) -> None:
        """Create the thread of the device `name`, which passes the images on to `encoder`."""
        self.runtimes: dict[Loaded, Runtime] = {}
        super().__init__(f"device {name}", self.runtimes, context)
        self._device_name, self._encoder, self._device_warm_up = name, encoder, warm_up

    def _serve(self) -> None:
        for loaded in self.runtimes:
            self._metrics.busy(self._device_name, loaded.decoder, 0.0)
        while (plan := self._dispatcher.next_plan(self._device_name)) is not None:
            began = self._clock()
            self._execute(plan)
            for job in (*plan.batch, *plan.drop)[:1]:
                self._metrics.busy(self._device_name, job.output.decoder, self._clock() - began)
        for runtime in self.runtimes.values():
            runtime.close()

    def _execute(self, plan: DevicePlan[DecodeTask]) -> None:
        for job in plan.drop:
            self._runtime_of(job).release(job.payload.slot)
        for loaded in plan.unload:
            self.runtimes[loaded].close()
            del self.runtimes[loaded]
            return_unused_memory()
            log.info("%s: unloaded version %d of %s", self.name, loaded.version, loaded.decoder)
        if plan.restore is not None and not self._restore(plan, plan.restore):
            return
        failed = [job for job in plan.start if not self._start(job)]
        for job in self._step([job for job in plan.batch if job not in failed]):
            self._finish(job)

    def _runtime_of(self, job: DecodeJob) -> Runtime:
        return self.runtimes[job.loaded]

    def _restore(self, plan: DevicePlan[DecodeTask], loaded: Loaded) -> bool:
        """Move the weights of a decoder to the device, in place of others. If that fails, fail the plan's images."""
        began = self._clock()
        for other in plan.offload:
            self.runtimes[other].offload()
        try:
            self.runtimes[loaded].restore()
        except DeviceMemoryError as error:
            log.error("%s: the weights of %s cannot be moved to the device: %s", self.name, loaded.decoder, error)
            self._dispatcher.offloaded(self._device_name, loaded)
            for job in plan.batch:
                if job not in plan.start:
                    self._runtime_of(job).release(job.payload.slot)
                self._dispatcher.fail(job, error)
            return False
        ended = self._clock()
        self._dispatcher.observe("restore", loaded, ended - began)
        for job in plan.batch:
            job.payload.stream.add_span("restore", began, ended)
        self._metrics.restored(loaded.decoder)
        return True

    def _start(self, job: DecodeJob) -> bool:
        """Condition the image. Return False if that failed."""
        task, stream = job.payload, job.payload.stream
        task.started = self._clock()
        waited = job.admitted if task.captioned is None else task.captioned
        if task.captioned is not None:
            stream.timings.caption = stream.add_span("caption", job.admitted, waited)
        stream.timings.queue = stream.add_span("queue", waited, task.started)
        try:
            task.slot = self._runtime_of(job).start(task.sample)
        except (DecodeError, DeviceMemoryError) as error:
            self._dispatcher.fail(job, error)
            return False
        stream.timings.condition = stream.add_span("condition", task.started, self._clock())
        self._dispatcher.observe("condition", job.output, stream.timings.condition)
        return True

    def _step(self, batch: Sequence[DecodeJob]) -> list[DecodeJob]:
        """Run one step of `batch`; return the jobs whose last step it was."""
        if not batch:
            return []
        began = self._clock()
        try:
            self._runtime_of(batch[0]).step([job.payload.slot for job in batch], [job.next_step for job in batch])
        except (DecodeError, DeviceMemoryError) as error:
            return self._step_one_by_one(batch, error)
        ended = self._clock()
        self._dispatcher.observe("step", batch[0].unit, ended - began, len(batch))
        for job in batch:
            job.payload.stream.add_span(f"step {job.next_step}", began, ended)
        self._metrics.stepped(batch[0].output.decoder, len(batch))
        for job in batch:
            if job.preview_follows and not job.payload.stream.ended:
                self._preview(job)
        return self._dispatcher.stepped(batch)

    def _preview(self, job: DecodeJob) -> None:
        """Hand a preview of the step that has just ended to the encoder. If that fails, the image has one less."""
        stream, began = job.payload.stream, self._clock()
        try:
            pixels = self._runtime_of(job).preview(job.payload.slot)
        except (DecodeError, DeviceMemoryError) as error:
            log.warning("%s: no preview of an image: %s", self.name, error)
            return
        seconds = stream.add_span("preview", began, self._clock())
        self._dispatcher.observe("preview", job.output, seconds)
        step, steps, report = job.step_number + 1, len(job.steps), partial(self._report_preview, job)
        self._encoder.encode_preview(pixels, step, steps, stream, job.rank, report)

    def _step_one_by_one(self, batch: Sequence[DecodeJob], error: PidError) -> list[DecodeJob]:
        """Retry a failed step image by image, so that only the images that cause the error fail."""
        if len(batch) == 1:
            self._runtime_of(batch[0]).release(batch[0].payload.slot)
            self._dispatcher.fail(batch[0], error)
            return []
        if isinstance(error, DeviceMemoryError):
            cap = len(batch) // 2
            log.warning("%s: a batch of %d does not fit; limited to %d", self.name, len(batch), cap)
            self._dispatcher.cap_batch(batch[0].output, cap)
        return [job for single in batch for job in self._step([single])]

    def _finish(self, job: DecodeJob) -> None:
        """Start the copy to the host and hand the rows to the encoder."""
        task, stream, began = job.payload, job.payload.stream, self._clock()
        stream.timings.denoise = began - task.started - stream.timings.condition
        try:
            rows = self._runtime_of(job).finish(task.slot)
        except (DecodeError, DeviceMemoryError) as error:
            self._dispatcher.fail(job, error)
            return
        finally:
            self._runtime_of(job).release(task.slot)
        stream.timings.finish = stream.add_span("finish", began, self._clock())
        self._dispatcher.observe("finish", job.output, stream.timings.finish)
        self._encoder.encode(rows, stream, task.encoding, job.rank, partial(self._report, job))

    def _report(self, job: DecodeJob, progress: EncodeProgress) -> None:
        """Pass on the progress of an encoding; called on encoder threads."""
        self._dispatcher.record_encoding(job, progress)
        if progress.ended:
            self._metrics.encoder_busy(progress.work)

    def _report_preview(self, job: DecodeJob, progress: EncodeProgress) -> None:
        """Count a preview and record the cost of its encoding; called on encoder threads."""
        if progress.ended and progress.done == 1:
            self._dispatcher.observe("encode", job.output, progress.work, encoding=PREVIEW)
            self._metrics.encoder_busy(progress.work)
            self._metrics.previewed(job.output.decoder)

    def _warm_up(self) -> None:
        """Warm up the runtimes."""
        self._encoder.warm_up()
        for loaded, runtime in self.runtimes.items():
            self._device_warm_up.run(loaded, runtime)
