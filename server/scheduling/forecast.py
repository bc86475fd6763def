"""Forecast of when each admitted image will be finished, from the cost table, if no other request arrives."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engines.size import Size
from server.scheduling.costs import CostTable
from server.scheduling.jobs import Job, JobState, Limits, by_rank

AnyJob = TypeVar("AnyJob", bound=Job[Any])

ROUNDING = 1e-6  # seconds; sums of the same terms in another order differ in their last bits


@dataclass(frozen=True)
class RunningStep:
    """The step that a device is running and its predicted end."""

    batch: tuple[Job[Any], ...] = ()
    until: float = 0.0


@dataclass
class Devices:
    """The devices by name: the sizes each one decodes, the images it holds and the step it is running."""

    sizes: Mapping[str, frozenset[Size]]
    held: dict[str, list[Job[Any]]] = field(default_factory=dict)  # started but not finished, running or paused
    steps: dict[str, RunningStep] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.held = {name: [] for name in self.sizes}
        self.steps = {name: RunningStep() for name in self.sizes}

    def admitted(self, queue: Iterable[Job[Any]]) -> list[Job[Any]]:
        """Return the jobs of `queue` and those on devices."""
        return [*queue, *(job for held in self.held.values() for job in held)]


@dataclass(frozen=True)
class Forecast:
    """Simulates the default rule: jobs in order of rank, one at a time; those that cannot meet their deadline last.

    Ranks never change, so a forecast stays true as long as the rule is followed. The scheduler departs from the rule
    only if a new forecast shows no additional missed deadline, and so meets every deadline that it accepted: exactly
    on one device with exact costs, and approximately on several devices, because an image runs on the one that is free
    first.
    """

    costs: CostTable
    limits: Limits

    def late(self, now: float, ends: Iterable[tuple[AnyJob, float]]) -> dict[AnyJob, float]:
        """Return the jobs of a forecast that miss their deadline, with the seconds by which they miss it."""
        stretch = 1 + self.limits.prediction_margin
        late = {}
        for job, end in ends:
            excess = now + (end - now) * stretch - job.deadline
            if excess > ROUNDING:
                late[job] = excess
        return late

    def ends(
        self, now: float, devices: Devices, queue: Iterable[Job[Any]], trial: Mapping[str, RunningStep] | None = None
    ) -> Iterator[tuple[Job[Any], float]]:
        """Yield each job with the predicted time at which its last byte is encoded.

        `trial` replaces the running step of some devices by one under consideration.
        """
        steps = {**devices.steps, **(trial or {})}
        free: dict[str, float] = {}  # when each device is free
        held: dict[Job[Any], str] = {}
        begun = {job for step in steps.values() for job in step.batch}
        ahead = []  # jobs that must finish before others can start, because their device has no free slot
        for name, step in steps.items():
            free[name] = max(now, step.until)
            staying = []
            for job in dict.fromkeys((*step.batch, *devices.held[name])):
                if job in begun and job.steps_left == 1:
                    free[name] += self.costs.finish(job.size)
                    yield job, free[name] + self.costs.encode(job.size, job.encoding)
                else:
                    staying.append(job)
            held.update(dict.fromkeys(staying, name))
            if len(staying) >= self.limits.slots:
                ahead.append(self.first(staying, now, begun))
        rest = [*held.keys() - ahead, *(job for job in queue if job not in begun)]
        rest.sort(key=by_rank)
        yield from self._in_order((*ahead, *rest), now, devices.sizes, free, held, begun)

    def _in_order(
        self,
        order: Sequence[Job[Any]],
        now: float,
        sizes: Mapping[str, frozenset[Size]],
        free: dict[str, float],
        held: Mapping[Job[Any], str],
        begun: set[Job[Any]],
    ) -> Iterator[tuple[Job[Any], float]]:
        """Run `order` job by job, each on the device that holds it or, if queued, on the one that is free first.

        This loop runs for every admission and every plan, hence the lookups ahead of it.
        """
        image, present = self.costs.image, {job.size for job in order}
        encode = {kind: self.costs.encode(*kind) for kind in {(job.size, job.encoding) for job in order}}
        able = {size: [name for name in free if size in sizes[name]] for size in present}

        def run(job: Job[Any], seconds: float) -> float:
            name = held.get(job)
            if name is None:
                names = able[job.size]
                name = min(names, key=free.__getitem__) if len(names) > 1 else names[0]
            free[name] += seconds
            return free[name] + encode[job.size, job.encoding]

        hopeless: list[tuple[Job[Any], float]] = []
        for job in order:
            seconds = image(job.size, job not in held, job.steps_left - (job in begun))
            if now + seconds + encode[job.size, job.encoding] > job.deadline + ROUNDING:
                hopeless.append((job, seconds))
            else:
                yield job, run(job, seconds)
        for job, seconds in hopeless:
            yield job, run(job, seconds)

    def first(self, jobs: Iterable[AnyJob], now: float, begun: Container[Job[Any]] = ()) -> AnyJob:
        """Return the job that the default rule runs first; jobs in `begun` are already running a step."""
        ordered = sorted(jobs, key=by_rank)
        return next((job for job in ordered if not self.is_hopeless(job, now, job in begun)), ordered[0])

    def is_hopeless(self, job: Job[Any], now: float, begun: bool = False) -> bool:
        """Return whether `job` would miss its deadline even if a device ran it alone from now on."""
        end = now + self.remaining(job, begun) + self.costs.encode(job.size, job.encoding)
        return end > job.deadline + ROUNDING

    def remaining(self, job: Job[Any], begun: bool = False) -> float:
        """Return the predicted device seconds that `job` still needs, not counting a step that it has begun."""
        return self.costs.image(job.size, job.state is JobState.QUEUED and not begun, job.steps_left - begun)
