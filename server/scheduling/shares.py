"""Fair shares of the queue and of device time, per client and per output: a decoder and an image size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from server.errors import ClientShareError, QueueFullError
from server.scheduling.clients import MAX_CLIENTS, Clients
from server.scheduling.forecast import ROUNDING, Devices, Forecast
from server.scheduling.jobs import Job, JobState, Pool, Priority, by_rank

Jobs = Sequence[Job[Any]]
Group = Literal["client", "bucket"]  # attributes of jobs


@dataclass(frozen=True)
class _TimeShare:
    """Share of the time until a deadline that the jobs of `members` may use together."""

    subject: str
    members: Callable[[Job[Any]], bool]
    fraction: float
    spare: float = 0.0  # fraction of the time of which the members may use as much as they leave free
    error: type[QueueFullError] = QueueFullError


class FairShares:
    """Checks that no client and no output takes the room of the others.

    With n active clients, the work of one may exceed an n-th of a limit only if it leaves as much room free as it uses.
    The limits are the queued images, the predicted work, and the time until a deadline. A single client may use all of
    each limit, and the shares never reject the request of a client none of whose images wait.

    A client that is rejected although none of its images wait is starved, and so is an output that is rejected because
    of a deadline although it is below its fair share. Until they have had time to retry, the others get at most equal
    shares of the time, images on devices included, and a place in the queue is kept for the client. With equal relative
    deadlines, earliest deadline first is first come first served, so an admitted large image never waits for later
    small ones. Admission alone would still starve large images, because room for a small one appears sooner, and
    occasional clients, because busy ones notice it sooner.
    """

    def __init__(self, forecast: Forecast, devices: Devices, clients: Clients) -> None:
        """Share all arguments with the scheduler."""
        self._forecast, self._devices, self._clients, self._limits = forecast, devices, clients, forecast.limits
        self._starved: dict[tuple[Group, object], float] = {}  # until when each has a claim, in the order of the claims

    def check_pool(self, jobs: Jobs, queue: Jobs, now: float, pool: Pool) -> None:
        """Check the client's share of the queued images and of the predicted work in `pool`."""
        clients = self._clients.active(now)
        if clients == 1:
            return
        devices = len(self._devices.outputs)
        admitted = [job for job in self._devices.admitted(queue) if job.priority in pool.classes]
        images = {job: 1.0 for job in admitted if job.state is JobState.QUEUED}
        seconds = {job: self._forecast.remaining(job) for job in admitted}
        levels: tuple[tuple[Mapping[Job[Any], float], float, float], ...] = (
            (images, len(jobs), self._limits.images(pool)),
            (seconds, sum(map(self._forecast.remaining, jobs)), self._limits.seconds(pool) * devices),
        )
        for level, need, limit in levels:
            if (wait := self._wait(jobs[0].client, queue, now, level, need, limit, clients)) > 0:
                raise ClientShareError(
                    f"This client already uses its share of the queue, because {clients} clients are active; "
                    "retry later.",
                    wait,
                )

    def check_time(self, jobs: Jobs, queue: Jobs, now: float) -> None:
        """Check the shares of the time until the deadline: of the client, of interactive requests, of the output."""
        for share in self._time_shares(jobs, queue, now):
            excess = self._excess(jobs, queue, now, share)
            if excess > ROUNDING:
                raise share.error(
                    f"{share.subject} already use their share of the time until this deadline; "
                    "retry later or allow more time.",
                    self._until_finished(queue, now, share.members, excess),
                )

    def reserved(self, client: str, limit: int, now: float) -> int:
        """Return how many of `limit` places are kept for starved clients other than `client`, at most half of them.

        A starved client itself passes over those that were starved after it.
        """
        self._forget_expired(now)
        starved = [value for group, value in self._starved if group == "client"]
        before = starved.index(client) if client in starved else len(starved)
        return min(before, limit // 2)

    def record_late(self, jobs: Jobs, queue: Jobs, now: float, retry_after: float) -> None:
        """Record that a deadline would be missed; this starves the output if it is below its fair share."""
        admitted = self._devices.admitted(queue)
        share = _equal_share(jobs[0], "bucket", len({job.bucket for job in (*admitted, *jobs)}))
        if not any(map(share.members, admitted)) or self._excess(jobs, queue, now, share) <= ROUNDING:
            self._starve(("bucket", jobs[0].bucket), now + retry_after)

    def record_rejected(self, client: str, queue: Jobs, now: float, retry_after: float) -> None:
        """Record a rejection that is not because of a share; this starves the client if none of its images wait."""
        if not any(job.client == client for job in queue):
            self._starve(("client", client), now + retry_after)

    def record_admitted(self, jobs: Jobs) -> None:
        """Record that `jobs` were admitted, so that their client and output are not starved."""
        for group in get_args(Group):
            self._starved.pop((group, getattr(jobs[0], group)), None)

    def _time_shares(self, jobs: Jobs, queue: Jobs, now: float) -> Iterator[_TimeShare]:
        """Yield the shares that apply to `jobs`."""
        job, part = jobs[0], self._limits.shares[jobs[0].priority]
        clients = self._clients.active(now)
        own = _equal_share(job, "client", clients)
        if any(map(own.members, queue)):
            if clients > 1:
                yield replace(own, fraction=part / clients, spare=part)
            if job.priority is Priority.INTERACTIVE and part < 1 and any(map(_is_interactive, queue)):
                yield _TimeShare("Interactive requests", _is_interactive, part)
            yield from self._share_with_starved(job, "bucket", queue, now)
        yield from self._share_with_starved(job, "client", queue, now)

    def _share_with_starved(self, job: Job[Any], group: Group, queue: Jobs, now: float) -> Iterator[_TimeShare]:
        others = self._starved_others(job, group, now)
        share = _equal_share(job, group, 1 + others)
        if others and any(map(share.members, self._devices.admitted(queue))):
            yield share

    def _starve(self, key: tuple[Group, object], retry_at: float) -> None:
        until = retry_at + self._limits.fairness_window
        if key in self._starved or len(self._starved) < MAX_CLIENTS:
            self._starved[key] = until  # an earlier claim keeps its position

    def _starved_others(self, job: Job[Any], group: Group, now: float) -> int:
        self._forget_expired(now)
        return sum(kind == group and value != getattr(job, group) for kind, value in self._starved)

    def _forget_expired(self, now: float) -> None:
        self._starved = {key: until for key, until in self._starved.items() if until > now}

    def _excess(self, jobs: Jobs, queue: Jobs, now: float, share: _TimeShare) -> float:
        """Return the device seconds by which a share would be exceeded.

        The members' work that ranks before the last of `jobs`, or before a later one of their client, has to fit into
        the share of the time until that rank: the deadline, or the default deadline if it is earlier.
        """
        client = jobs[0].client
        devices = sum(jobs[0].unit in outputs for outputs in self._devices.outputs.values())
        total = own = excess = 0.0
        for job in sorted((*self._devices.admitted(queue), *jobs), key=by_rank):
            seconds = self._forecast.remaining(job)
            total += seconds
            if share.members(job):
                own += seconds
                if job.client == client and job.rank >= jobs[-1].rank:
                    time = devices * (job.rank[0] - now)
                    excess = max(excess, own - max(share.fraction * time, share.spare * time - total))
        return excess

    def _until_finished(
        self, queue: Jobs, now: float, members: Callable[[Job[Any]], bool], device_seconds: float
    ) -> float:
        """Return the predicted seconds until that much of the admitted work of `members` is finished."""
        wait, left = 0.0, device_seconds
        for job, end in self._in_order_of_end(queue, now):
            if members(job):
                wait, left = end - now, left - self._forecast.remaining(job)
                if left <= ROUNDING:
                    break
        return wait

    def _in_order_of_end(self, queue: Jobs, now: float) -> list[tuple[Job[Any], float]]:
        return sorted(self._forecast.ends(now, self._devices, queue), key=lambda item: item[1])

    def _wait(
        self,
        client: str,
        queue: Jobs,
        now: float,
        level: Mapping[Job[Any], float],
        need: float,
        limit: float,
        clients: int,
    ) -> float:
        """Return the predicted seconds until `client` may add `need` to `level`; 0 if it may now."""
        total, own = sum(level.values()), sum(x for job, x in level.items() if job.client == client)

        def fits() -> bool:
            return own <= ROUNDING or own + need <= max(limit / clients, limit - total - need) + ROUNDING

        if fits():
            return 0.0
        wait = 0.0
        for job, end in self._in_order_of_end(queue, now):
            if amount := level.get(job, 0.0):
                wait, total, own = end - now, total - amount, own - amount * (job.client == client)
                if fits():
                    break
        return wait


def _equal_share(job: Job[Any], group: Group, count: int) -> _TimeShare:
    """Return the share of the client or output of `job` among `count` of them."""
    value = getattr(job, group)
    subject, error = (
        ("Requests of this client", ClientShareError)
        if group == "client"
        else (f"Requests for {value}", QueueFullError)
    )
    return _TimeShare(subject, lambda other: getattr(other, group) == value, 1 / count, error=error)


def _is_interactive(job: Job[Any]) -> bool:
    return job.priority is Priority.INTERACTIVE
