"""The threads that drive the devices: each asks the scheduler for its next step, runs it, and reports back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

from engines.errors import DecodeError, DeviceLostError, DeviceMemoryError, PidError
from engines.pid.sampler import step_indices
from engines.runtime.protocol import Rows, Runtime, Sample, Slot
from engines.size import Size
from server.errors import CancelledError, DeadlineError, UnavailableError
from server.images.encoder import Encoder, Encoding
from server.metrics import Metrics
from server.scheduling.costs import CostStage
from server.scheduling.scheduler import DevicePlan, Job, Scheduler
from server.stream import ImageStream

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Clock = Callable[[], float]
STOP_SECONDS = 5.0  # for the steps at hand when everything stops
LOST = "A device failed and the server restarts; send the request again in a moment."


@dataclass(eq=False)
class DecodeTask:
    """What a job carries for the threads that run it."""

    sample: Sample
    answer: ImageStream
    encoding: Encoding
    slot: Slot = -1
    started: float = 0.0


class Dispatcher:
    """Owns the scheduler, the device threads and the promise that every admitted image is answered."""

    def __init__(
        self,
        runtimes: Mapping[str, Runtime],
        scheduler: Scheduler,
        encoder: Encoder,
        metrics: Metrics,
        on_ready: Callable[[], None] = lambda: None,
        on_fatal: Callable[[str], None] = lambda reason: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._runtimes, self._scheduler, self._encoder, self._metrics = runtimes, scheduler, encoder, metrics
        self._on_ready, self._on_fatal, self._clock = on_ready, on_fatal, clock
        self._changed = threading.Condition()
        self._unanswered: set[Job] = set()  # admitted, and not yet failed or handed to the encoder
        self._stopping = False
        self._warming = len(runtimes)
        self._at_work: dict[str, tuple[float, float]] = {}  # since when, and until when by the cost table
        self._threads = [
            threading.Thread(target=self._drive, args=(name, runtime), name=f"device {name}", daemon=True)
            for name, runtime in runtimes.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads after the step at hand, unless it hangs; whatever is still admitted is answered 503."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.give_up()
        limit = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, limit - time.monotonic()))

    def give_up(self) -> None:
        """ImageStream whatever is admitted with 503."""
        self._fail_all(UnavailableError("The server shut down before this image was finished; send it to another one."))

    def lose(self, reason: str) -> None:
        """A device is of no more use: answer whatever is admitted with 503 and take nothing more."""
        self.accept(False)
        self._on_fatal(reason)  # first, so that nobody has the answer while the state still says otherwise
        self._fail_all(DeviceLostError(LOST))

    def tend(self, is_stuck: Callable[[float, float], bool]) -> str | None:
        """What device threads cannot do during a step: answer images that came to be late, and tell which is stuck.

        `is_stuck` takes the seconds that a device has been at its work and those it was predicted to take.
        """
        now = self._clock()
        with self._changed:
            late = self._scheduler.expire(now)
            at_work = dict(self._at_work)
        self._fail_late(late)
        for name, (since, until) in at_work.items():
            if is_stuck(now - since, until - since):
                return f"Device {name} has been at a step for {now - since:.1f} s that takes {until - since:.1f} s."
        return None

    def overdue(self) -> dict[str, float]:
        """Seconds by which each device's work at hand goes beyond its prediction."""
        with self._changed:
            now = self._clock()
            return {name: max(0.0, now - self._at_work.get(name, (now, now))[1]) for name in self._runtimes}

    def submit(self, jobs: Sequence[Job]) -> None:
        """Admit all jobs or none. Raises QueueFullError or UnavailableError."""
        with self._changed:
            self._scheduler.admit(jobs, self._clock())
            self._unanswered.update(jobs)
            self._changed.notify_all()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """The client is gone. Waiting images end now, running ones before their next step."""
        with self._changed:
            waiting = [job for job in jobs if not job.payload.answer.ended and self._scheduler.cancel(job)]
        for job in waiting:
            self._fail(job, CancelledError("The client left while the image was waiting."), "queued")

    def accept(self, accepting: bool) -> None:
        with self._changed:
            self._scheduler.accepting = accepting

    def read(self, question: Callable[[Scheduler], float]) -> float:
        """Ask the scheduler something, between its changes."""
        with self._changed:
            return question(self._scheduler)

    def observe_encoding(self, size: Size, seconds: float) -> None:
        with self._changed:
            self._scheduler.costs.observe("encode", size, seconds)

    # A device's thread.

    def _drive(self, name: str, runtime: Runtime) -> None:
        try:
            self._warm_up(runtime)
            self._metrics.busy(name, 0.0)
            self._report_warm()
            while (plan := self._next_plan(name)) is not None:
                began = self._clock()
                self._execute(runtime, plan)
                self._metrics.busy(name, self._clock() - began)
            runtime.close()
        except BaseException as error:  # a dead device thread must never be silent
            log.critical("the thread of device %s ended", name, exc_info=error)
            self.lose(f"The thread of device {name} ended: {type(error).__name__}.")

    def _warm_up(self, runtime: Runtime) -> None:
        """Prepare the runtime and measure it: every size, every batch, every stage."""
        began = self._clock()
        self._encoder.warm_up()
        runtime.warm_up()
        info = runtime.info
        channels = info.latent_channels
        for size in info.sizes:
            sample = Sample(latent=torch.zeros(channels, *info.latent_size(size)), size=size)
            for batch in range(1, info.max_batch + 1):
                slots = [self._timed("condition", size, 1, runtime.start, sample) for _ in range(batch)]
                for index in step_indices(2):  # the first one may still pick kernels; the running estimate forgets it
                    self._timed("step", size, batch, runtime.step, slots, [index] * batch)
                rows = self._timed("finish", size, 1, runtime.finish, slots[0])
                for slot in slots:
                    runtime.release(slot)
                self._timed("encode", size, 1, self._encoder.measure, rows)
        log.info("%s on %s is warm after %.1f s", info.decoder, info.device, self._clock() - began)

    def _timed(
        self, stage: CostStage, size: Size, batch: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        began = self._clock()
        result = work(*args, **kwargs)
        self._observe(stage, size, began, batch)
        return result

    def _report_warm(self) -> None:
        with self._changed:
            self._warming -= 1
            if self._warming == 0:
                self._scheduler.accepting = True
                self._on_ready()

    def _next_plan(self, name: str) -> DevicePlan | None:
        """Wait until there is something to do; None when the thread should end."""
        while True:
            with self._changed:
                if self._stopping:
                    return None
                now = self._clock()
                self._at_work.pop(name, None)
                late = self._scheduler.expire(now)
                plan = self._scheduler.plan(name, now)
                if plan.batch:
                    self._at_work[name] = (now, self._scheduler.busy_until(name))
                elif not (late or plan.drop):
                    self._changed.wait(timeout=min(1.0, max(0.001, self._scheduler.next_deadline() - now)))
            self._fail_late(late)
            if plan.drop or plan.batch:
                return plan

    def _execute(self, runtime: Runtime, plan: DevicePlan) -> None:
        for job in plan.drop:
            runtime.release(job.payload.slot)
            error: PidError = DeadlineError("The deadline passed while the image was being decoded.")
            if job.cancelled:
                error = CancelledError("The client left while the image was being decoded.")
            self._fail(job, error, "running")
        failed = [job for job in plan.start if not self._start(runtime, job)]
        batch = [job for job in plan.batch if job not in failed]
        if batch and self._step(runtime, batch):
            with self._changed:
                done = self._scheduler.stepped(batch, self._clock())
            for job in done:
                self._finish(runtime, job)

    def _start(self, runtime: Runtime, job: Job) -> bool:
        work: DecodeTask = job.payload
        began = work.started = self._clock()
        work.answer.timings.queue = began - job.admitted
        work.answer.spans.append(("queue", job.admitted, began))
        try:
            work.slot = runtime.start(work.sample)
        except (DecodeError, DeviceMemoryError) as error:
            self._take_out(job, error)
            return False
        work.answer.timings.condition = self._observe("condition", job.size, began)
        work.answer.spans.append(("condition", began, self._clock()))
        return True

    def _step(self, runtime: Runtime, batch: Sequence[Job]) -> bool:
        """One step for all of `batch`. False if it has to be planned anew, because some or all of it failed."""
        began = self._clock()
        try:
            runtime.step([job.payload.slot for job in batch], [job.next_step for job in batch])
        except (DecodeError, DeviceMemoryError) as error:
            self._recover(runtime, batch, error)
            return False
        self._observe("step", batch[0].size, began, len(batch))
        ended = self._clock()
        for job in batch:
            job.payload.answer.spans.append((f"step {job.next_step}", began, ended))
        self._metrics.stepped(len(batch))
        return True

    def _recover(self, runtime: Runtime, batch: Sequence[Job], error: PidError) -> None:
        """A failed step: a batch is split and its members tried one by one; an image that fails alone is given up."""
        if len(batch) == 1:
            runtime.release(batch[0].payload.slot)
            self._take_out(batch[0], error)
            return
        if isinstance(error, DeviceMemoryError):
            cap = len(batch) // 2
            log.warning("a batch of %d did not fit the device; from now on at most %d", len(batch), cap)
            with self._changed:
                self._scheduler.cap_batch(batch[0].size, cap)
        for job in batch:
            if self._step(runtime, [job]):
                with self._changed:
                    done = self._scheduler.stepped([job], self._clock())
                for finished in done:
                    self._finish(runtime, finished)

    def _finish(self, runtime: Runtime, job: Job) -> None:
        work: DecodeTask = job.payload
        began = self._clock()
        work.answer.timings.denoise = began - work.started - work.answer.timings.condition
        rows: Rows | None = None
        try:
            rows = runtime.finish(work.slot)
        except (DecodeError, DeviceMemoryError) as error:
            self._fail(job, error, "running")
        finally:
            runtime.release(work.slot)
        if rows is not None:
            work.answer.timings.finish = self._observe("finish", job.size, began)
            work.answer.spans.append(("finish", began, self._clock()))
            self._encoder.encode(rows, work.answer, work.encoding)
            self._forget(job)

    # Ends.

    def _take_out(self, job: Job, error: PidError) -> None:
        with self._changed:
            self._scheduler.fail(job)
        self._fail(job, error, "running")

    def _fail(self, job: Job, error: PidError, stage: str) -> None:
        if isinstance(error, CancelledError | DeadlineError):
            self._metrics.cancelled(stage, error)
        job.payload.answer.fail(error)
        self._forget(job)

    def _fail_late(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._fail(job, DeadlineError("The deadline passed while the image was waiting."), "queued")

    def _forget(self, job: Job) -> None:
        with self._changed:
            self._unanswered.discard(job)

    def _fail_all(self, error: PidError) -> None:
        with self._changed:
            self._scheduler.clear()
            jobs = tuple(self._unanswered)
        for job in jobs:
            self._fail(job, error, "running")

    def _observe(self, stage: CostStage, size: Size, began: float, batch: int = 1) -> float:
        seconds = self._clock() - began
        with self._changed:
            self._scheduler.costs.observe(stage, size, seconds, batch)
        return seconds
