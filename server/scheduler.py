"""Which image takes the next step. Plain data and arithmetic: no tensors, no HTTP, no clock and no threads of its own.

Order is earliest deadline first within a priority class; lower classes age into higher ones, so nothing starves. The
unit of control is one step: between steps an image can be joined, overtaken, cancelled or dropped. An image is admitted
only if, by the cost table, it and everything admitted before it will be in time.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.costs import CostTable, Size
from server.errors import QueueFullError, UnavailableError


class Priority(enum.IntEnum):
    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2


class Stage(enum.StrEnum):
    QUEUED = "queued"
    RUNNING = "running"  # on a device, between condition and finish
    ENDED = "ended"


@dataclass(eq=False)
class Job:
    """One image. The scheduler owns everything below `payload`."""

    size: Size
    steps: tuple[int, ...]  # step indices still to be taken, in order, when it is admitted
    priority: Priority = Priority.STANDARD
    deadline: float = math.inf  # on the scheduler's clock, seconds
    payload: Any = None
    stage: Stage = Stage.QUEUED
    device: str | None = None
    steps_done: int = 0
    admitted: float = 0.0
    number: int = 0
    cancelled: bool = False

    @property
    def steps_left(self) -> int:
        return len(self.steps) - self.steps_done

    @property
    def next_step(self) -> int:
        return self.steps[self.steps_done]


@dataclass(frozen=True)
class Limits:
    queue_images: int = 64  # waiting, not counting those on a device
    queue_seconds: float = 60.0  # predicted work waiting, per device
    slots: int = 2  # images on one device at once, running or paused
    max_batch: int = 1
    aging: float = 10.0  # seconds of waiting that raise an image by one class
    batch_gain: float = 1.05  # images per second, against one by one, from which a batch pays


@dataclass(frozen=True)
class Plan:
    """What a device does next: let go of `drop`, then start `start`, then one step for all of `batch`."""

    drop: tuple[Job, ...] = ()
    start: tuple[Job, ...] = ()
    batch: tuple[Job, ...] = ()


@dataclass
class Scheduler:
    """All methods take the time as `now`; the caller serialises them and acts on what they return."""

    costs: CostTable
    limits: Limits
    devices: int = 1
    accepting: bool = True
    _queue: list[Job] = field(default_factory=list)
    _running: dict[str, list[Job]] = field(default_factory=dict)
    _admitted: int = 0
    _batch_caps: dict[Size, int] = field(default_factory=dict)

    # Admission.

    def admit(self, jobs: Sequence[Job], now: float) -> None:
        """Take all of `jobs` or none. Raises QueueFullError with the seconds after which it may fit, or Unavailable."""
        if not self.accepting:
            raise UnavailableError("The server takes no new work now; send the request to another one.")
        waiting = len(self._queue) + len(jobs)
        if waiting > self.limits.queue_images:
            raise QueueFullError(
                f"The queue is full at {self.limits.queue_images} images; try again later.",
                self._drain_time(waiting - self.limits.queue_images),
            )
        backlog = self.backlog()
        if backlog > self.limits.queue_seconds:
            raise QueueFullError(
                f"The queue holds {backlog:.1f} s of work, its limit is {self.limits.queue_seconds:g} s.",
                backlog - self.limits.queue_seconds,
            )
        for job in jobs:
            self._admitted += 1
            job.admitted, job.number = now, self._admitted
        late = self._lateness(jobs, now)
        if late > 0:
            raise QueueFullError(f"The image would be finished {late:.2f} s after its deadline; try again later.", late)
        self._queue.extend(jobs)

    def backlog(self) -> float:
        """Predicted seconds of admitted work still to be done, per device."""
        return sum(map(self.remaining, self._live())) / self.devices

    def predicted_wait(self, size: Size, now: float) -> float:
        """Seconds after which an image admitted now at standard priority would be finished."""
        job = Job(size=size, steps=(0,) * 4, deadline=math.inf, admitted=now)
        return self.backlog() + self.remaining(job) + self.costs.encode(size)

    def remaining(self, job: Job) -> float:
        """Predicted device seconds that `job` still needs by itself."""
        condition = self.costs.condition(job.size) if job.stage is Stage.QUEUED else 0.0
        return condition + job.steps_left * self.costs.step(job.size) + self.costs.finish(job.size)

    def _lateness(self, new: Sequence[Job], now: float) -> float:
        """By how much `new`, or a job in time so far that it would delay, misses its deadline; the worst of them."""
        before, after = 0.0, 0.0  # work ahead of the job at hand, without and with the new ones
        fresh, worst = set(map(id, new)), -math.inf
        for job in sorted([*self._live(), *new], key=lambda job: self._order(job, now)):
            alone = self.remaining(job)
            finish = now + after + alone + self.costs.encode(job.size)
            if id(job) in fresh or finish - (after - before) <= job.deadline:
                worst = max(worst, finish - job.deadline)
            after += alone / self.devices
            before += 0.0 if id(job) in fresh else alone / self.devices
        return worst

    def _drain_time(self, images: int) -> float:
        ahead = sorted(map(self.remaining, self._live()))[:images]
        return max(sum(ahead) / self.devices, 0.1)

    # Planning.

    def plan(self, device: str, now: float, sizes: frozenset[Size] | None = None) -> Plan:
        """What `device` does next, perhaps nothing. Queued images in the plan become its own."""
        running = self._running.setdefault(device, [])
        drop = tuple(job for job in running if job.cancelled or job.deadline < now)
        for job in drop:
            self._end(job)
        free = self.limits.slots - len(running)
        queued = [job for job in self._queue if sizes is None or job.size in sizes]
        head = self._head(running, queued if free > 0 else [], now)
        if head is None:
            return Plan(drop)
        mates = [job for job in self._by_order([*running, *queued], now) if job.size == head.size and job is not head]
        batch = self._batch(head, mates, free, now)
        start = tuple(job for job in batch if job.stage is Stage.QUEUED)
        for job in start:
            self._queue.remove(job)
            job.stage, job.device = Stage.RUNNING, device
            running.append(job)
        return Plan(drop, start, tuple(batch))

    def _head(self, running: list[Job], queued: list[Job], now: float) -> Job | None:
        """The most urgent image; one that waits may overtake those on the device only as far as their slack allows."""
        for job in self._by_order([*running, *queued], now):
            if job.stage is Stage.RUNNING:
                return job
            service = self.remaining(job)
            if all(now + service + self.remaining(other) <= other.deadline for other in running):
                return job
        return None

    def _batch(self, head: Job, mates: list[Job], free: int, now: float) -> list[Job]:
        """The largest batch around `head` that pays and leaves every member in time; `head` alone otherwise."""
        cap = min(self.limits.max_batch, self._batch_caps.get(head.size, self.limits.max_batch))
        single = self.costs.step(head.size)
        for count in range(min(cap, 1 + len(mates)), 1, -1):
            step = self.costs.step(head.size, count)
            if count * single < self.limits.batch_gain * step:
                continue
            batch = self._members(head, mates, count, free)
            starting = sum(job.stage is Stage.QUEUED for job in batch) * self.costs.condition(head.size)
            tail = self.costs.finish(head.size) + self.costs.encode(head.size)
            if len(batch) == count and all(
                now + starting + job.steps_left * step + tail <= job.deadline for job in batch
            ):
                return batch
        return [head]

    @staticmethod
    def _members(head: Job, mates: list[Job], count: int, free: int) -> list[Job]:
        batch = [head]
        free -= head.stage is Stage.QUEUED
        for job in mates:
            if len(batch) == count:
                break
            if job.stage is Stage.RUNNING or free > 0:
                free -= job.stage is Stage.QUEUED
                batch.append(job)
        return batch

    # Progress.

    def stepped(self, batch: Iterable[Job]) -> list[Job]:
        """Record one step for all of `batch`; returns those that have taken their last and leave the scheduler."""
        done = []
        for job in batch:
            job.steps_done += 1
            if job.steps_left == 0 and job.stage is Stage.RUNNING:
                self._end(job)
                done.append(job)
        return done

    def fail(self, job: Job) -> None:
        """Take a job on a device out, for whatever reason."""
        if job.stage is Stage.RUNNING:
            self._end(job)

    def cancel(self, job: Job) -> bool:
        """Nobody wants `job` any more. True if it waited and has ended now; a running one ends at the next plan."""
        job.cancelled = True
        if job.stage is Stage.QUEUED and job in self._queue:
            self._queue.remove(job)
            job.stage = Stage.ENDED
            return True
        return False

    def expire(self, now: float) -> list[Job]:
        """Take out the waiting images whose deadline is past."""
        late = [job for job in self._queue if job.deadline < now]
        for job in late:
            self._queue.remove(job)
            job.stage = Stage.ENDED
        return late

    def clear(self) -> list[Job]:
        """Take out everything, waiting or running."""
        jobs = list(self._live())
        for job in jobs:
            job.stage = Stage.ENDED
        self._queue.clear()
        self._running.clear()
        return jobs

    def cap_batch(self, size: Size, cap: int) -> None:
        """Never again batch more than `cap` images of `size`; a device was too small for it."""
        self._batch_caps[size] = max(1, min(cap, self._batch_caps.get(size, cap)))

    # State.

    def queued(self) -> int:
        return len(self._queue)

    def running(self) -> int:
        return sum(map(len, self._running.values()))

    def next_deadline(self) -> float:
        return min((job.deadline for job in self._queue), default=math.inf)

    def _live(self) -> Iterable[Job]:
        return itertools.chain(self._queue, *self._running.values())

    def _order(self, job: Job, now: float) -> tuple[int, float, int]:
        aged = int((now - job.admitted) / self.limits.aging)
        return max(0, job.priority - aged), job.deadline, job.number

    def _by_order(self, jobs: Iterable[Job], now: float) -> list[Job]:
        return sorted(jobs, key=lambda job: self._order(job, now))

    def _end(self, job: Job) -> None:
        assert job.device is not None  # noqa: S101  every running job has one
        self._running[job.device].remove(job)
        job.stage = Stage.ENDED
