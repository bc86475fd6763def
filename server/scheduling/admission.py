"""Admission control: which requests the scheduler accepts, so that accepted ones meet their deadlines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engines.size import Size
from server.errors import DeadlineTooShortError, QueueFullError, TooManyImagesError
from server.scheduling.costs import CostTable
from server.scheduling.forecast import ROUNDING, Devices, Forecast
from server.scheduling.jobs import Job, JobState, Priority

Jobs = Sequence[Job[Any]]


class AdmissionControl:
    """Checks new jobs against the queue limits, the deadlines of all jobs and the fair share of each size.

    A request that may fit later is rejected with a QueueFullError, which has the seconds after which it may. Requests
    that an idle server would reject too get other errors.
    """

    def __init__(self, costs: CostTable, forecast: Forecast, devices: Devices) -> None:
        """Share `costs`, the `forecast` from them and `devices` with the scheduler."""
        self._costs, self._forecast, self._devices = costs, forecast, devices
        self._idle_devices = Devices(devices.sizes)
        self._limits = forecast.limits
        self._starved_sizes: dict[Size, float] = {}  # when a size was last rejected below its fair share

    def check(self, jobs: Jobs, queue: Jobs, now: float) -> None:
        """Raise an error unless all of `jobs`, ranked images of one size, can join `queue`."""
        self._check_possible(jobs, now)
        self.check_queue(jobs[0].priority, len(jobs), queue, now)
        self._check_share(jobs, queue, now)
        self._check_deadlines(jobs, queue, now)
        self._starved_sizes.pop(jobs[0].size, None)

    def backlog(self, queue: Jobs, priority: Priority) -> float:
        """Return the predicted seconds of admitted work of this class and those below it, per device."""
        work = (self._forecast.remaining(job) for job in self._admitted(queue) if job.priority >= priority)
        return sum(work) / len(self._devices.sizes)

    def _check_possible(self, jobs: Jobs, now: float) -> None:
        """Check that an idle server would accept the jobs, if each stage costs as much as its baseline."""
        priority = jobs[0].priority
        limit = min(map(self._limits.images, list(Priority)[: priority + 1]))
        if len(jobs) > limit:
            raise TooManyImagesError(
                f"The server queues at most {limit} images of {priority.name.lower()} requests, not {len(jobs)}; "
                "send fewer images per request."
            )
        forecast = replace(self._forecast, costs=self._costs.baseline)
        late = forecast.late(now, forecast.ends(now, self._idle_devices, jobs))
        if late:
            needed = max(job.deadline + excess for job, excess in late.items()) - now
            raise DeadlineTooShortError(
                f"The deadline cannot be met even by an idle server; allow at least {math.ceil(1000 * needed)} ms."
            )

    def check_queue(self, own: Priority, images: int, queue: Jobs, now: float) -> None:
        """Check the limits of the whole queue, and of the share of each class that this class is part of."""
        for priority in list(Priority)[: own + 1]:
            share = self._limits.shares[priority]
            if share == 1 and priority is not Priority.INTERACTIVE:
                continue
            subject = "The queue" if share == 1 else f"The queue's share for {priority.name.lower()} requests"
            self._check_images(subject, priority, images, queue, now)
            backlog, limit = self.backlog(queue, priority), share * self._limits.queue_seconds
            if backlog > limit:
                raise QueueFullError(
                    f"{subject} holds {backlog:.1f} s of work (limit: {limit:g} s); retry later.", backlog - limit
                )

    def _check_images(self, subject: str, priority: Priority, images: int, queue: Jobs, now: float) -> None:
        limit = self._limits.images(priority)
        excess = sum(job.priority >= priority for job in queue) + images - limit
        if excess > 0:
            forecast = self._forecast.ends(now, self._devices, queue)
            ends = sorted(
                end for job, end in forecast if job.priority >= priority and job.state is not JobState.ENCODING
            )
            until = ends[min(excess, len(ends)) - 1] - now if ends else 1.0
            raise QueueFullError(f"{subject} is full (limit: {limit} images); retry later.", until)

    def _check_share(self, jobs: Jobs, queue: Jobs, now: float) -> None:
        """Check that the jobs leave the fair share of recently rejected sizes free.

        With equal relative deadlines, earliest deadline first is first come first served, so an admitted large image
        never waits for later small ones. Admission alone would still starve large images, because room for a small
        one appears sooner. Competing sizes therefore get equal shares.
        """
        size, since = jobs[0].size, now - self._limits.fairness_window
        competing = sum(when > since for other, when in self._starved_sizes.items() if other != size)
        if competing and (excess := self._share_excess(jobs, queue, now, 1 + competing)) > 0:
            raise QueueFullError(f"Requests for {size} already use their fair share of the queue; retry later.", excess)

    def _check_deadlines(self, jobs: Jobs, queue: Jobs, now: float) -> None:
        """Check that none of the jobs would be late, nor make an admitted one late."""
        ends = list(self._forecast.ends(now, self._devices, (*queue, *jobs)))
        late = self._forecast.late(now, ends)
        if late and not late.keys() <= set(jobs):
            for job in self._forecast.late(now, self._forecast.ends(now, self._devices, queue)):
                late.pop(job, None)  # late with or without the new jobs
        if late and self._may_probe(jobs, queue, late):
            return
        if late:
            excess = max(late.values())
            possible = not any(self._forecast.is_hopeless(job, now) for job in jobs)
            sizes = len({job.size for job in (*self._admitted(queue), *jobs)})
            if possible and self._share_excess(jobs, queue, now, sizes) <= 0:
                self._starved_sizes[jobs[0].size] = now
            reason = "retry later or allow more time" if possible else "allow more time, as one decode needs longer"
            raise QueueFullError(f"A deadline would be missed by {excess:.2f} s; {reason}.", excess)
        self._check_slack(jobs, now, ends)

    def _may_probe(self, jobs: Jobs, queue: Jobs, late: Mapping[Job[Any], float]) -> bool:
        """Return whether `jobs`, predicted to be `late`, may run nevertheless because a device is idle.

        Only admitted work is measured, so an estimate that is too high would otherwise reject all work that could
        correct it. The baseline allows the deadline, and no other job becomes late.
        """
        able = (name for name, sizes in self._devices.sizes.items() if jobs[0].size in sizes)
        idle = not (queue or self._devices.encoding) and any(not self._devices.held[name] for name in able)
        return idle and late.keys() <= set(jobs)

    def _check_slack(self, jobs: Jobs, now: float, ends: Iterable[tuple[Job[Any], float]]) -> None:
        """Check that jobs of a lower class wait for at most their class's share of their slack.

        Lower-class jobs admitted up to their deadlines would leave no room for urgent ones, which must not make an
        admitted job late.
        """
        priority = jobs[0].priority
        share = self._limits.shares[priority]
        if share == 1:
            return
        alone = self._forecast.alone(jobs, now)
        allowed = share * (min(job.deadline for job in jobs) - alone)
        wait = max(end for job, end in ends if job in jobs) - alone
        if wait - allowed > ROUNDING:
            raise QueueFullError(
                f"A {priority.name.lower()} request with this deadline may wait {max(0.0, allowed):.2f} s; it would "
                f"wait {wait:.2f} s. Retry later or allow more time.",
                wait - allowed,
            )

    def _share_excess(self, jobs: Jobs, queue: Jobs, now: float, sizes: int) -> float:
        """Return the seconds by which the jobs' size exceeds its share of the time until their deadline.

        The time is shared equally among `sizes` sizes.
        """
        size = jobs[0].size
        own = sum(self._forecast.remaining(job) for job in self._admitted(queue) if job.size == size)
        need = sum(map(self._forecast.remaining, jobs))
        devices = sum(size in decoded for decoded in self._devices.sizes.values())
        share = (min(job.deadline for job in jobs) - now) * devices / sizes
        return own + need - share if own else 0.0  # a size without admitted work may always have one request

    def _admitted(self, queue: Jobs) -> Iterable[Job[Any]]:
        return (*queue, *(job for held in self._devices.held.values() for job in held))
