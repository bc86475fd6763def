"""Admission control: which requests the scheduler accepts, so that accepted ones meet their deadlines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from server.errors import ClientShareError, DeadlineTooShortError, QueueFullError, TooManyImagesError, count_of
from server.scheduling.clients import Clients
from server.scheduling.costs import CostTable
from server.scheduling.forecast import ROUNDING, Devices, Forecast
from server.scheduling.jobs import Job, JobState, Pool, Priority
from server.scheduling.shares import FairShares

Jobs = Sequence[Job[Any]]


class AdmissionControl:
    """Checks new jobs against the queue limits, fair shares and the deadlines of all jobs.

    A request that may fit later is rejected with a QueueFullError, which has the seconds after which it may. Requests
    that an idle server would reject too get other errors.
    """

    def __init__(self, costs: CostTable, forecast: Forecast, devices: Devices, clients: Clients) -> None:
        """Share `costs`, the `forecast` from them and the other arguments with the scheduler."""
        self._costs, self._forecast, self._devices, self._clients = costs, forecast, devices, clients
        self._idle_devices = Devices(devices.outputs)  # shares the outputs, which change
        self._limits = forecast.limits
        self._shares = FairShares(forecast, devices, clients)

    def check(self, jobs: Jobs, queue: Jobs, now: float) -> None:
        """Raise an error unless all of `jobs`, ranked images of one output and client, can join `queue`."""
        self._check_possible(jobs, now)
        with self._recording(jobs[0].client, queue, now):
            for pool in self._limits.pools(jobs[0].priority):
                self._check_pool(pool, jobs[0].client, len(jobs), queue, now)
                self._shares.check_pool(jobs, queue, now, pool)
            self._shares.check_time(jobs, queue, now)
            self._check_deadlines(jobs, queue, now)
        self._shares.record_admitted(jobs)

    def check_queue(self, client: str, priority: Priority | None, queue: Jobs, now: float) -> None:
        """Raise a QueueFullError if a job of this client and class, or of any class, exceeds a limit of the queue."""
        pools = self._limits.pools(Priority.INTERACTIVE)[:1] if priority is None else self._limits.pools(priority)
        with self._recording(client, queue, now):
            for pool in pools:
                self._check_pool(pool, client, 1, queue, now)

    def backlog(self, queue: Jobs) -> float:
        """Return the predicted seconds of admitted work per device."""
        return self._backlog(queue, self._limits.pools(Priority.INTERACTIVE)[0])

    @contextmanager
    def _recording(self, client: str, queue: Jobs, now: float) -> Iterator[None]:
        """Record a request of `client`, and its rejection if the context raises a QueueFullError."""
        self._clients.seen({client, *(job.client for job in self._devices.admitted(queue))}, now)
        try:
            yield
        except QueueFullError as error:
            self._clients.rejected(client, now, error.retry_after)
            if not isinstance(error, ClientShareError):
                self._shares.record_rejected(client, queue, now, error.retry_after)
            raise

    def _check_possible(self, jobs: Jobs, now: float) -> None:
        """Check that an idle server would accept the jobs, if each stage costs as much as its baseline."""
        priority = jobs[0].priority
        limit = min(map(self._limits.images, self._limits.pools(priority)))
        if len(jobs) > limit:
            raise TooManyImagesError(
                f"The server queues at most {count_of(limit, 'image')} of {priority.name.lower()} requests, not "
                f"{len(jobs)}; send fewer images per request."
            )
        # As if all weights were on the device: they may be by the time of a retry.
        forecast = replace(self._forecast, costs=self._costs.baseline, limits=replace(self._limits, resident=None))
        late = forecast.late(now, forecast.ends(now, self._idle_devices, jobs))
        if late:
            needed = max(job.deadline + excess for job, excess in late.items()) - now
            raise DeadlineTooShortError(
                f"The deadline cannot be met even by an idle server; allow at least {math.ceil(1000 * needed)} ms."
            )

    def _check_pool(self, pool: Pool, client: str, images: int, queue: Jobs, now: float) -> None:
        """Check the limits of images and of predicted work of one pool."""
        limit = self._limits.images(pool)
        reserved = self._shares.reserved(client, limit, now)
        excess = sum(job.priority in pool.classes for job in queue) + images + reserved - limit
        if excess > 0:
            forecast = self._forecast.ends(now, self._devices, queue)
            ends = sorted(
                end for job, end in forecast if job.priority in pool.classes and job.state is not JobState.ENCODING
            )
            until = ends[min(excess, len(ends)) - 1] - now if ends else 1.0
            raise QueueFullError(f"{pool.subject} is full (limit: {count_of(limit, 'image')}); retry later.", until)
        backlog, seconds = self._backlog(queue, pool), self._limits.seconds(pool)
        if backlog > seconds:
            raise QueueFullError(
                f"{pool.subject} holds {backlog:.1f} s of work (limit: {seconds:g} s); retry later.", backlog - seconds
            )

    def _backlog(self, queue: Jobs, pool: Pool) -> float:
        admitted = self._devices.admitted(queue)
        work = (self._forecast.remaining(job) for job in admitted if job.priority in pool.classes)
        return sum(work) / len(self._devices.outputs)

    def _check_deadlines(self, jobs: Jobs, queue: Jobs, now: float) -> None:
        """Check that none of the jobs would be late, and that they harm no admitted job."""
        ends = list(self._forecast.ends(now, self._devices, (*queue, *jobs)))
        late = self._forecast.late(now, ends)
        if late and not late.keys() <= set(jobs):
            before = self._forecast.late(now, self._forecast.ends(now, self._devices, queue))
            late = self._forecast.harmed(late, before, now)
        if late and self._may_probe(jobs, queue, late, now):
            return
        if late:
            excess = max(late.values())
            possible = not any(self._forecast.is_hopeless(job, now) for job in jobs)
            if possible:
                self._shares.record_late(jobs, queue, now, excess)
            reason = "retry later or allow more time" if possible else "allow more time, as one decode needs longer"
            raise QueueFullError(f"A deadline would be missed by {excess:.2f} s; {reason}.", excess)
        self._check_slack(jobs, now, ends)

    def _may_probe(self, jobs: Jobs, queue: Jobs, late: Mapping[Job[Any], float], now: float) -> bool:
        """Return whether `jobs`, predicted to be `late`, may run nevertheless because a device is idle.

        Only admitted work is measured, so an estimate that is too high would otherwise reject all work that could
        correct it. The baseline allows the deadline, and no other job becomes late.
        """
        able = (name for name, outputs in self._devices.outputs.items() if jobs[0].unit in outputs)
        waits = self._devices.prompts.prompts and any(job.prompt is not None for job in jobs)
        busy = queue or self._devices.encoding or waits
        idle = not busy and any(not self._devices.held[name] for name in able)
        return idle and late.keys() <= set(jobs) and not self._waits_for_weights(jobs, now)

    def _waits_for_weights(self, jobs: Jobs, now: float) -> bool:
        """Return whether `jobs` would be late, at the baseline, because their weights are in host memory."""
        if self._limits.resident is None:
            return False
        forecast = replace(self._forecast, costs=self._costs.baseline)
        return bool(forecast.late(now, forecast.ends(now, self._devices, jobs)))

    def _check_slack(self, jobs: Jobs, now: float, ends: Iterable[tuple[Job[Any], float]]) -> None:
        """Check that jobs of a lower class wait for at most their class's share of their slack.

        Lower-class jobs admitted up to their deadlines would leave no room for urgent ones, which must not make an
        admitted job late.
        """
        priority = jobs[0].priority
        share = self._limits.shares[priority]
        if share == 1 or priority is Priority.INTERACTIVE:
            return
        alone = self._forecast.alone(jobs, now)
        idle = max(end for _, end in self._forecast.ends(now, self._idle_devices, jobs))
        # Waiting for a prompt counts too; otherwise jobs with new prompts would be admitted where others are not.
        latest = max(alone + share * (min(job.deadline for job in jobs) - alone), idle)
        end = max(end for job, end in ends if job in jobs)
        if end - latest > ROUNDING:
            raise QueueFullError(
                f"A {priority.name.lower()} request with this deadline may wait {max(0.0, latest - alone):.2f} s; it "
                f"would wait {end - alone:.2f} s. Retry later or allow more time.",
                end - latest,
            )
