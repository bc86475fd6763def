"""Thread-safe access to the scheduler, which tracks each admitted image until its stream has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from engines.errors import PidError
from engines.runtime.protocol import Sample, Slot
from server.errors import CancelledError, DeadlineError
from server.images.encoding import EncodeProgress, Encoding
from server.scheduling.costs import CostStage, Loaded, Output
from server.scheduling.jobs import DevicePlan, Job, Priority
from server.scheduling.pauses import Pauses
from server.scheduling.scheduler import Scheduler
from server.stream import ImageStream, Stage

Clock = Callable[[], float]
T = TypeVar("T")

_MAX_WAIT = 1.0  # seconds after which an idle worker checks for expired images
_WAS: dict[Stage, str] = {"queued": "queued", "running": "being decoded", "encoding": "being encoded"}


@dataclass(eq=False)
class DecodeTask:
    """One image to decode: its input, its output stream and its state on a device."""

    sample: Sample
    stream: ImageStream
    encoding: Encoding
    slot: Slot = -1  # slot of the runtime, once started
    captioned: float | None = None  # time at which its prompt was encoded, if it had to wait for that
    started: float = 0.0  # time at which the conditioning began


DecodeJob = Job[DecodeTask]


@dataclass(frozen=True)
class Progress:
    """Work that a device is doing: seconds for which it has been running, without pauses, and predicted seconds."""

    elapsed: float
    predicted: float


@dataclass(frozen=True)
class _Work:
    """Start and predicted end of a step."""

    start: float
    end: float


class Dispatcher:
    """The scheduler behind a lock, between the event loop, the worker threads and the watchdog."""

    def __init__(self, scheduler: Scheduler[DecodeTask], pauses: Pauses, clock: Clock = time.monotonic) -> None:
        """Take over `scheduler` and `pauses`; nothing else may change them."""
        self._scheduler, self._pauses, self._clock = scheduler, pauses, clock
        self._changed = threading.Condition()
        self._open: set[DecodeJob] = set()  # admitted, and the stream has not ended
        self._stopping = False
        self._work: dict[str, _Work] = {}  # of each busy device
        self._prompt_work: _Work | None = None  # of the text encoder

    # From the event loop

    def submit(self, jobs: Sequence[DecodeJob]) -> None:
        """Admit all jobs or none. Raises QueueFullError or UnavailableError."""
        with self._changed:
            self._scheduler.admit(jobs, self._clock())
            self._open.update(jobs)
            self._changed.notify_all()

    def check(self, client: str, priority: Priority | None) -> None:
        """Raise the error with which `submit` would reject any image of this client and class, if it is known."""
        with self._changed:
            self._scheduler.check(client, priority, self._clock())

    def cancel(self, jobs: Sequence[DecodeJob]) -> None:
        """Cancel jobs whose client has disconnected, before their next step or strip."""
        with self._changed:
            for job in jobs:
                self._scheduler.cancel(job)
        for job in jobs:
            stream = job.payload.stream
            stream.fail(CancelledError(f"The client disconnected while the image was {_WAS[stream.stage]}."))

    def accept(self, accepting: bool) -> None:
        """Start or stop admitting jobs; a stopped dispatcher admits none."""
        with self._changed:
            self._scheduler.accepting = accepting and not self._stopping

    def query(self, read: Callable[[Scheduler[DecodeTask]], T]) -> T:
        """Return read(scheduler), called under the lock."""
        with self._changed:
            return read(self._scheduler)

    def encoder_backlog(self) -> float:
        """Return the predicted seconds until the images in the encoder are encoded."""
        with self._changed:
            return self._scheduler.encoder_backlog(self._clock())

    def open_jobs(self) -> int:
        """Return the number of admitted images whose stream has not ended."""
        with self._changed:
            return len(self._open)

    # Decoders

    def load(self, outputs: Mapping[str, Mapping[Output, int]]) -> None:
        """Let devices decode `outputs` too, by device and with their maximum batches."""
        with self._changed:
            for device, each in outputs.items():
                self._scheduler.load(device, each)

    def retire(self, loaded: Loaded) -> None:
        """Let every device unload a decoder as soon as no image needs it."""
        with self._changed:
            self._scheduler.retire(loaded)
            self._changed.notify_all()

    # From worker threads

    def next_plan(self, device: str) -> DevicePlan[DecodeTask] | None:
        """Wait until `device` has work and return it. Return None once the dispatcher stops."""
        while True:
            with self._changed:
                if self._stopping:
                    return None
                now = self._clock()
                self._work.pop(device, None)
                expired = self._scheduler.expire(now)
                plan = self._scheduler.plan(device, now)
                _set_stage(plan.start, "running")
                if plan.start and self._scheduler.limits.resident is not None:
                    self._changed.notify_all()  # others may have left images to this device that it did not start
                if plan.batch:
                    self._work[device] = _Work(now, self._scheduler.busy_until(device))
                elif not (expired or plan.drop or plan.unload):
                    self._changed.wait(timeout=min(_MAX_WAIT, max(0.001, self._scheduler.next_deadline() - now)))
            self._fail_expired(expired)
            if plan.drop or plan.batch or plan.unload:
                return plan

    def stepped(self, batch: Sequence[DecodeJob]) -> list[DecodeJob]:
        """Record a step of `batch`; return the jobs whose last step it was."""
        with self._changed:
            done = self._scheduler.stepped(batch, self._clock())
            _set_stage(done, "encoding")
            return done

    def record_encoding(self, job: DecodeJob, progress: EncodeProgress) -> None:
        """Record the progress of an encoding. If the deadline has passed, the stream ends with a DeadlineError.

        The work of an image that was not encoded in full is extrapolated, but counts only if it exceeds the estimate:
        otherwise images that always miss their deadline would never correct an estimate that is too low.
        """
        with self._changed:
            now, costs = self._clock(), self._scheduler.costs
            if progress.ended:
                self._scheduler.encoded(job)
                work = progress.work / progress.done if progress.done else 0.0
                informative = progress.done == 1 or work > costs.encode(job.output, job.encoding)
                if informative and not self._pauses.seconds(job.ready, now):
                    costs.observe("encode", job.output, work, now, encoding=job.encoding)
                return
            self._scheduler.record_encoding(job, progress.begun, progress.done, now)
        if job.deadline < now:
            self._fail_expired([job])

    def fail(self, job: DecodeJob, error: PidError) -> None:
        """Remove a job from its device and end its stream with `error`."""
        with self._changed:
            self._scheduler.fail(job)
        job.payload.stream.fail(error)

    def close(self, job: DecodeJob) -> None:
        """Stop tracking a job whose stream has ended."""
        with self._changed:
            self._open.discard(job)

    def measure(
        self, stage: CostStage, subject: Output | Loaded | None, seconds: float, batch: int = 1, encoding: str = ""
    ) -> None:
        """Add a cost measured at the warm-up to the cost table."""
        with self._changed:
            self._scheduler.costs.measure(stage, subject, seconds, batch, encoding)

    def observe(
        self, stage: CostStage, subject: Output | Loaded | None, seconds: float, batch: int = 1, encoding: str = ""
    ) -> None:
        """Add the cost of a request's stage, which has just ended, to the cost table, unless it includes a pause."""
        with self._changed:
            now = self._clock()
            if not self._pauses.seconds(now - seconds, now):
                self._scheduler.costs.observe(stage, subject, seconds, now, batch, encoding)

    def paused(self, since: float) -> bool:
        """Return whether the process was paused after the time `since`."""
        with self._changed:
            return self._pauses.seconds(since, self._clock()) > 0

    def offloaded(self, device: str, loaded: Loaded) -> None:
        """Record that the weights of a decoder could not be moved to `device`."""
        with self._changed:
            self._scheduler.offloaded(device, loaded)

    def cap_batch(self, output: Output, cap: int) -> None:
        """Limit batches of `output` to `cap` images for some time."""
        with self._changed:
            self._scheduler.cap_batch(output, cap, self._clock())

    # From the thread of the text encoder

    def next_prompts(self) -> tuple[str, ...] | None:
        """Wait until admitted images wait for prompts, and return those to encode. Return None once stopping."""
        while True:
            with self._changed:
                if self._stopping:
                    return None
                now = self._clock()
                self._prompt_work = None
                if prompts := self._scheduler.plan_prompts(now):
                    self._prompt_work = _Work(now, self._scheduler.prompts_until())
                    return prompts
                self._changed.wait(timeout=_MAX_WAIT)

    def add_captions(self, captions: Mapping[str, Tensor]) -> None:
        """Give each image that waits for one of these prompts its caption, the embedding [T, E]."""
        with self._changed:
            now = self._clock()
            for job, prompt in self._scheduler.encoded_prompts(captions).items():
                job.payload.sample = replace(job.payload.sample, caption=captions[prompt])
                job.payload.captioned = now
            self._changed.notify_all()

    def fail_prompts(self, prompts: Collection[str], error: PidError) -> None:
        """End the streams of all images that wait for one of `prompts` with `error`."""
        with self._changed:
            jobs = self._scheduler.encoded_prompts(prompts)
            for job in jobs:
                self._scheduler.cancel(job)
        for job in jobs:
            job.payload.stream.fail(error)

    # From the watchdog

    def wake(self) -> None:
        """Record that the process runs; if the last call was long ago, it was paused."""
        with self._changed:
            self._pauses.wake(self._clock())

    def expire(self) -> None:
        """Fail the images whose deadline has passed."""
        with self._changed:
            expired = self._scheduler.expire(self._clock())
        self._fail_expired(expired)

    def progress(self) -> dict[str, Progress]:
        """Return the progress of each busy device."""
        with self._changed:
            return {name: self._progress(work) for name, work in self._work.items()}

    def prompt_progress(self) -> Progress | None:
        """Return the progress of the text encoder, or None if it is idle."""
        with self._changed:
            return None if self._prompt_work is None else self._progress(self._prompt_work)

    def _progress(self, work: _Work) -> Progress:
        now = self._clock()
        return Progress(now - work.start - self._pauses.seconds(work.start, now), work.end - work.start)

    # Shutdown

    def stop(self) -> None:
        """Admit no more jobs, and let all `next_plan` calls return None."""
        with self._changed:
            self._stopping, self._scheduler.accepting = True, False
            self._changed.notify_all()

    def fail_all(self, error: PidError) -> None:
        """Empty the scheduler and end every open stream with `error`."""
        with self._changed:
            self._scheduler.clear()
            jobs = tuple(self._open)
        for job in jobs:
            job.payload.stream.fail(error)

    def _fail_expired(self, jobs: Iterable[DecodeJob]) -> None:
        for job in jobs:
            stream = job.payload.stream
            stream.fail(DeadlineError(f"The deadline passed while the image was {_WAS[stream.stage]}."))


def _set_stage(jobs: Iterable[DecodeJob], stage: Stage) -> None:
    for job in jobs:
        job.payload.stream.stage = stage
