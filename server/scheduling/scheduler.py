"""Which image takes the next step. Plain data and arithmetic: no tensors, no HTTP, no clock and no threads of its own.

The most urgent image goes first: by priority class, then by earliest deadline; lower classes age into higher ones, so
nothing starves. But no image, however urgent, goes first if that makes one late that was promised to be in time: then
it is earliest deadline first without regard to class, the order by which images are admitted. The unit of control is
one step: between steps an image can be joined, overtaken, cancelled or dropped.

Sizes: with equal relative deadlines, earliest deadline first is first come first served, so a large image that was
admitted never waits for small ones that came later. What it would suffer from is admission, since room for a small one
appears sooner; hence the equal shares in `_check_share`.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence

from engines.size import Size
from server.errors import QueueFullError, UnavailableError
from server.scheduling.costs import CostTable
from server.scheduling.forecast import ROUNDING, Devices, Forecast, Step, by_rank
from server.scheduling.jobs import DevicePlan, Job, JobState, Limits, Priority

__all__ = ["DevicePlan", "Job", "JobState", "Limits", "Priority", "Scheduler"]


class Scheduler:
    """All methods take the time as `now`; the caller serialises them and acts on what they return."""

    def __init__(
        self, costs: CostTable, limits: Limits, devices: Mapping[str, frozenset[Size]], accepting: bool = True
    ) -> None:
        """`devices`: by name, the sizes that each decodes."""
        self.costs, self.limits, self.accepting = costs, limits, accepting
        self._forecast = Forecast(costs, limits)
        self._devices = Devices(devices)
        self._queue: list[Job] = []  # by rank
        self._admitted = 0
        self._batch_caps: dict[Size, int] = {}
        self._starved_sizes: dict[Size, float] = {}  # when a size was refused though it had less than its share

    # Admission.

    def admit(self, jobs: Sequence[Job], now: float) -> None:
        """Take all of `jobs`, images of one size, or none.

        Raises QueueFullError with the seconds after which they may fit, or UnavailableError.
        """
        if not self.accepting:
            raise UnavailableError("The server takes no new work now; send the request to another one.")
        self._check_queue(jobs, now)
        for number, job in enumerate(jobs, self._admitted + 1):
            job.admitted = now
            job.rank = (min(job.deadline, now + self.limits.default_deadline), number)
        self._check_share(jobs, now)
        self._check_deadlines(jobs, now)
        self._admitted += len(jobs)
        self._starved_sizes.pop(jobs[0].size, None)
        for job in jobs:
            insort(self._queue, job, key=by_rank)

    def backlog(self, priority: Priority = Priority.INTERACTIVE) -> float:
        """Predicted seconds of admitted work still to be done, of this class and those below it, per device."""
        work = (self._forecast.remaining(job) for job in self._live() if job.priority >= priority)
        return sum(work) / len(self._devices.sizes)

    def _check_queue(self, jobs: Sequence[Job], now: float) -> None:
        """Refuse `jobs` if the queue is full, or as full as their class and those below it together may make it."""
        for priority in list(Priority)[: jobs[0].priority + 1]:
            share = self.limits.shares[priority]
            if share == 1 and priority is not Priority.INTERACTIVE:
                continue
            whose = "The queue" if share == 1 else f"The share of the queue for {priority.name.lower()} requests"
            self._check_images(whose, priority, len(jobs), now)
            backlog, limit = self.backlog(priority), share * self.limits.queue_seconds
            if backlog > limit:
                raise QueueFullError(
                    f"{whose} holds {backlog:.1f} s of work, its limit is {limit:g} s.", backlog - limit
                )

    def _check_images(self, whose: str, priority: Priority, images: int, now: float) -> None:
        limit = self.limits.images(priority)
        excess = sum(job.priority >= priority for job in self._queue) + images - limit
        if excess > 0:
            forecast = self._forecast.ends(now, self._devices, self._queue)
            ends = sorted(end for job, end in forecast if job.priority >= priority)
            until = ends[min(excess, len(ends)) - 1] - now if ends else 1.0
            raise QueueFullError(f"{whose} is full at {limit} images; try again later.", until)

    def _check_deadlines(self, jobs: Sequence[Job], now: float) -> None:
        """Refuse `jobs` if one of them, or by them one that was admitted, would be late."""
        ends = list(self._forecast.ends(now, self._devices, (*self._queue, *jobs)))
        late = self._forecast.late(now, ends)
        if late and not late.keys() <= set(jobs):
            for job in self._late(now, self._queue):  # that it will be late anyway is not the fault of `jobs`
                late.pop(job, None)
        if late:
            excess = max(late.values())
            possible = not any(self._forecast.is_hopeless(job, now) for job in jobs)
            if possible and self._share_excess(jobs, now, len({job.size for job in (*self._live(), *jobs)})) <= 0:
                self._starved_sizes[jobs[0].size] = now
            advice = "try again later or allow more time" if possible else "it takes longer by itself, allow more time"
            raise QueueFullError(f"An image would be finished {excess:.2f} s after its deadline; {advice}.", excess)
        self._check_slack(jobs, now, ends)

    def _check_slack(self, jobs: Sequence[Job], now: float, ends: Iterable[tuple[Job, float]]) -> None:
        """Refuse `jobs` of a lower class that would wait for others longer than for its share of the time they have.

        Admitted up to their deadlines, they would leave no room for more urgent ones, which may make nobody late.
        """
        priority, size = jobs[0].priority, jobs[0].size
        share = self.limits.shares[priority]
        if share < 1:
            alone = now + sum(map(self._forecast.remaining, jobs)) + self.costs.encode(size)
            slack = min(job.deadline for job in jobs) - alone
            excess = max(end for job, end in ends if job in jobs) - alone - share * slack
            if excess > ROUNDING:
                raise QueueFullError(
                    f"The wait would be {excess:.2f} s longer than a request with this deadline may wait that is "
                    f"{priority.name.lower()}; try again later or allow more time.",
                    excess,
                )

    def _check_share(self, jobs: Sequence[Job], now: float) -> None:
        """Refuse `jobs` that would take the room that another size was refused lately for want of."""
        size, since = jobs[0].size, now - self.limits.fairness_window
        competing_sizes = sum(when > since for other, when in self._starved_sizes.items() if other != size)
        if competing_sizes and (excess := self._share_excess(jobs, now, 1 + competing_sizes)) > 0:
            raise QueueFullError(
                f"Images of {size} have their share of the queue while other sizes wait for theirs.",
                excess,
            )

    def _share_excess(self, jobs: Sequence[Job], now: float, parties: int) -> float:
        """Seconds by which images of one size go beyond an equal share of the time until `jobs` are due."""
        size = jobs[0].size
        own = sum(self._forecast.remaining(job) for job in self._live() if job.size == size)
        need = sum(map(self._forecast.remaining, jobs))
        devices = sum(size in sizes for sizes in self._devices.sizes.values())
        share = (min(job.deadline for job in jobs) - now) * devices / parties
        return own + need - share if own else 0.0  # whoever has nothing yet may have one

    # Planning.

    def plan(self, device: str, now: float) -> DevicePlan:
        """What `device` does next, perhaps nothing. Queued images in the plan become its own."""
        held = self._devices.held[device]
        self._devices.steps[device] = Step(until=now)
        drop = tuple(job for job in held if job.cancelled or job.deadline < now)
        for job in drop:
            self._end(job)
        free = self.limits.slots - len(held)
        sizes = self._devices.sizes[device]
        pool = [*held, *(job for job in self._queue if free > 0 and job.size in sizes)]
        if not pool:
            return DevicePlan(drop)
        batch = self._choose(device, pool, free, now)
        start = tuple(job for job in batch if job.state is JobState.QUEUED)
        for job in start:
            self._dequeue(job)
            job.state, job.device = JobState.RUNNING, device
            held.append(job)
        return DevicePlan(drop, start, batch)

    def _choose(self, device: str, pool: Sequence[Job], free: int, now: float) -> tuple[Job, ...]:
        """The most urgent image with company, or without, or the first by the rule, whichever makes nobody late."""
        first = self._forecast.first(pool, now)
        urgent = min(pool, key=lambda job: self._urgency(job, now))
        tried: set[tuple[Job, ...]] = {(first,)}  # what the rule would do, for which no forecast is needed
        for head in dict.fromkeys((urgent, first)):
            for batch in (self._largest_batch(head, pool, free, now), (head,)):
                step = Step(batch, now + self._seconds(batch))
                if batch not in tried and self._makes_nobody_late(device, step, now):
                    self._devices.steps[device] = step
                    return batch
                tried.add(batch)
        self._devices.steps[device] = Step((first,), now + self._seconds((first,)))
        return (first,)

    def _makes_nobody_late(self, device: str, step: Step, now: float) -> bool:
        """Whether `step` leaves in time whoever would be so without it."""
        late = self._late(now, self._queue, {device: step})
        return not late or late.keys() <= self._late(now, self._queue).keys()

    def _largest_batch(self, head: Job, pool: Sequence[Job], free: int, now: float) -> tuple[Job, ...]:
        """The largest batch around `head` that pays and would leave every member in time if it stayed together."""
        size = head.size
        cap = min(self.limits.max_batch, self._batch_caps.get(size, self.limits.max_batch))
        if cap == 1:
            return (head,)
        peers = sorted((job for job in pool if job.size == size and job is not head), key=by_rank)
        single, tail = self.costs.step(size), self.costs.finish(size) + self.costs.encode(size)
        for count in range(min(cap, 1 + len(peers)), 1, -1):
            step = self.costs.step(size, count)
            if count * single < self.limits.min_batch_gain * step:
                continue
            batch = _members(head, peers, count, free)
            begun = now + self._seconds(batch) - step
            if len(batch) == count and all(begun + job.steps_left * step + tail <= job.deadline for job in batch):
                return batch
        return (head,)

    def _seconds(self, batch: Sequence[Job]) -> float:
        """What a plan of `batch` takes: its newcomers' conditions and one step."""
        size = batch[0].size
        starting = sum(job.state is JobState.QUEUED for job in batch)
        return starting * self.costs.condition(size) + self.costs.step(size, len(batch))

    def _urgency(self, job: Job, now: float) -> tuple[int, tuple[float, int]]:
        aged = int((now - job.admitted) / self.limits.aging)
        return max(0, job.priority - aged), job.rank

    def _late(self, now: float, waiting: Sequence[Job], trial: Mapping[str, Step] | None = None) -> dict[Job, float]:
        return self._forecast.late(now, self._forecast.ends(now, self._devices, waiting, trial))

    # Progress.

    def stepped(self, batch: Iterable[Job], now: float) -> list[Job]:
        """Record one step for all of `batch`; returns those that have taken their last and leave the scheduler."""
        done: list[Job] = []
        for job in batch:
            job.steps_done += 1
            if job.state is JobState.RUNNING:
                assert job.device is not None  # noqa: S101  every running job has one
                until = max(now, self._devices.steps[job.device].until if done else now)
                if job.steps_left == 0:
                    self._end(job)
                    done.append(job)
                    until += self.costs.finish(job.size)
                self._devices.steps[job.device] = Step(until=until)
        return done

    def fail(self, job: Job) -> None:
        """Take a job on a device out, for whatever reason."""
        if job.state is JobState.RUNNING:
            self._end(job)

    def cancel(self, job: Job) -> bool:
        """Nobody wants `job` any more. True if it waited and has ended now; a running one ends at the next plan."""
        job.cancelled = True
        if job.state is JobState.QUEUED and job in self._queue:
            self._dequeue(job)
            job.state = JobState.ENDED
            return True
        return False

    def expire(self, now: float) -> list[Job]:
        """Take out the waiting images whose deadline is past."""
        due = itertools.takewhile(lambda job: job.rank[0] < now, self._queue)
        late = [job for job in due if job.deadline < now]
        for job in late:
            self._dequeue(job)
            job.state = JobState.ENDED
        return late

    def clear(self) -> list[Job]:
        """Take out everything, waiting or running."""
        jobs = list(self._live())
        for job in jobs:
            job.state = JobState.ENDED
        self._queue.clear()
        for held in self._devices.held.values():
            held.clear()
        return jobs

    def cap_batch(self, size: Size, cap: int) -> None:
        """Never again batch more than `cap` images of `size`; a device was too small for it."""
        self._batch_caps[size] = max(1, min(cap, self._batch_caps.get(size, cap)))

    # State.

    def queued(self) -> int:
        return len(self._queue)

    def running(self) -> int:
        return sum(map(len, self._devices.held.values()))

    def busy_until(self, device: str) -> float:
        """When `device` should be done with what it was planned to do."""
        return self._devices.steps[device].until

    def next_deadline(self) -> float:
        return min((job.deadline for job in self._queue), default=math.inf)

    def _live(self) -> Iterable[Job]:
        return itertools.chain(self._queue, *self._devices.held.values())

    def _dequeue(self, job: Job) -> None:
        del self._queue[bisect_left(self._queue, job.rank, key=by_rank)]

    def _end(self, job: Job) -> None:
        assert job.device is not None  # noqa: S101  every running job has one
        self._devices.held[job.device].remove(job)
        job.state = JobState.ENDED


def _members(head: Job, peers: Iterable[Job], count: int, free: int) -> tuple[Job, ...]:
    """`head` and those of `peers` that are on the device or find a free slot there, up to `count` in all."""
    batch = [head]
    free -= head.state is JobState.QUEUED
    for job in peers:
        if len(batch) == count:
            break
        if job.state is JobState.RUNNING or free > 0:
            free -= job.state is JobState.QUEUED
            batch.append(job)
    return tuple(batch)
