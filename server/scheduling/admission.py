"""Admission control: which requests the scheduler accepts, so that accepted ones meet their deadlines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from server.errors import ClientShareError, QueueFullError
from server.scheduling.clients import Clients
from server.scheduling.forecast import ROUNDING, Devices, Forecast
from server.scheduling.jobs import Job, Pool, Priority
from server.scheduling.shares import FairShares

Jobs = Sequence[Job[Any]]


class AdmissionControl:
    """Checks new jobs against the queue limits, fair shares and the deadlines of all jobs.

    Every rejection is a QueueFullError with the seconds after which the request may fit.
    """

    def __init__(self, forecast: Forecast, devices: Devices, clients: Clients) -> None:
        """Share all arguments with the scheduler."""
        self._forecast, self._devices, self._clients = forecast, devices, clients
        self._costs, self._limits = forecast.costs, forecast.limits
        self._shares = FairShares(forecast, devices, clients)

    def check(self, jobs: Jobs, queue: Jobs, now: float) -> None:
        """Raise QueueFullError unless all of `jobs`, ranked images of one size and client, can join `queue`."""
        client = jobs[0].client
        self._clients.seen({client, *(job.client for job in self._devices.admitted(queue))}, now)
        try:
            self._check(jobs, queue, now)
        except QueueFullError as error:
            self._clients.rejected(client, now, error.retry_after)
            if not isinstance(error, ClientShareError):
                self._shares.record_rejected(jobs, queue, now, error.retry_after)
            raise
        self._shares.record_admitted(jobs)

    def backlog(self, queue: Jobs) -> float:
        """Return the predicted seconds of admitted work per device."""
        return self._backlog(queue, self._limits.pools(Priority.INTERACTIVE)[0])

    def _check(self, jobs: Jobs, queue: Jobs, now: float) -> None:
        for pool in self._limits.pools(jobs[0].priority):
            self._check_pool(pool, jobs, queue, now)
            self._shares.check_pool(jobs, queue, now, pool)
        self._shares.check_time(jobs, queue, now)
        self._check_deadlines(jobs, queue, now)

    def _check_pool(self, pool: Pool, jobs: Jobs, queue: Jobs, now: float) -> None:
        """Check the limits of images and of predicted work of one pool."""
        limit = self._limits.images(pool)
        reserved = self._shares.reserved(jobs[0], limit, now)
        excess = sum(job.priority in pool.classes for job in queue) + len(jobs) + reserved - limit
        if excess > 0:
            forecast = self._forecast.ends(now, self._devices, queue)
            ends = sorted(end for job, end in forecast if job.priority in pool.classes)
            until = ends[min(excess, len(ends)) - 1] - now if ends else 1.0
            raise QueueFullError(f"{pool.subject} is full (limit: {limit} images); retry later.", until)
        backlog, seconds = self._backlog(queue, pool), self._limits.seconds(pool)
        if backlog > seconds:
            raise QueueFullError(
                f"{pool.subject} holds {backlog:.1f} s of work (limit: {seconds:g} s); retry later.", backlog - seconds
            )

    def _backlog(self, queue: Jobs, pool: Pool) -> float:
        admitted = self._devices.admitted(queue)
        work = (self._forecast.remaining(job) for job in admitted if job.priority in pool.classes)
        return sum(work) / len(self._devices.sizes)

    def _check_deadlines(self, jobs: Jobs, queue: Jobs, now: float) -> None:
        """Check that none of the jobs would be late, nor make an admitted one late."""
        ends = list(self._forecast.ends(now, self._devices, (*queue, *jobs)))
        late = self._forecast.late(now, ends)
        if late and not late.keys() <= set(jobs):
            for job in self._forecast.late(now, self._forecast.ends(now, self._devices, queue)):
                late.pop(job, None)  # late with or without the new jobs
        if late:
            excess = max(late.values())
            possible = not any(self._forecast.is_hopeless(job, now) for job in jobs)
            if possible:
                self._shares.record_late(jobs, queue, now, excess)
            reason = "retry later or allow more time" if possible else "allow more time, as one decode needs longer"
            raise QueueFullError(f"A deadline would be missed by {excess:.2f} s; {reason}.", excess)
        self._check_slack(jobs, now, ends)

    def _check_slack(self, jobs: Jobs, now: float, ends: Iterable[tuple[Job[Any], float]]) -> None:
        """Check that jobs of a lower class wait for at most their class's share of their slack.

        Lower-class jobs admitted up to their deadlines would leave no room for urgent ones, which must not make an
        admitted job late.
        """
        priority, size, encoding = jobs[0].priority, jobs[0].size, jobs[0].encoding
        share = self._limits.shares[priority]
        if share == 1 or priority is Priority.INTERACTIVE:
            return
        alone = now + sum(map(self._forecast.remaining, jobs)) + self._costs.encode(size, encoding)
        allowed = share * (min(job.deadline for job in jobs) - alone)
        wait = max(end for job, end in ends if job in jobs) - alone
        if wait - allowed > ROUNDING:
            raise QueueFullError(
                f"A {priority.name.lower()} request with this deadline may wait {max(0.0, allowed):.2f} s; it would "
                f"wait {wait:.2f} s. Retry later or allow more time.",
                wait - allowed,
            )
