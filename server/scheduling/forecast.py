"""When every admitted image will be answered, by the cost table, if nothing else arrives."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from engines.size import Size
from server.scheduling.costs import CostTable
from server.scheduling.jobs import Job, JobState, Limits

by_rank = attrgetter("rank")

ROUNDING = 1e-6  # seconds; sums taken in another order differ in their last bits


@dataclass(frozen=True)
class Step:
    """What a device is at: a step of `batch` that ends, as predicted, at `until`."""

    batch: tuple[Job, ...] = ()
    until: float = 0.0


@dataclass
class Devices:
    """What each device takes, holds and is at."""

    sizes: Mapping[str, frozenset[Size]]
    held: dict[str, list[Job]] = field(default_factory=dict)  # started and not finished, running or paused
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.held = {name: [] for name in self.sizes}
        self.steps = {name: Step() for name in self.sizes}


@dataclass(frozen=True)
class Forecast:
    """Follows the rule that the scheduler falls back to: in order of rank, one image at a time, hopeless ones last.

    Ranks never change, so as long as the rule is followed the forecast stays true, and a scheduler that departs from
    it only where a new forecast makes nobody late keeps every deadline that it accepted: exactly so on one device with
    exact costs, closely on several, where an image goes to the device that is free first.
    """

    costs: CostTable
    limits: Limits

    def late(self, now: float, ends: Iterable[tuple[Job, float]]) -> dict[Job, float]:
        """Of a forecast `ends`, the images that will miss their deadlines, and by how many seconds."""
        stretch = 1 + self.limits.prediction_margin
        late = {}
        for job, end in ends:
            excess = now + (end - now) * stretch - job.deadline
            if excess > ROUNDING:
                late[job] = excess
        return late

    def ends(
        self, now: float, devices: Devices, waiting: Iterable[Job], trial: Mapping[str, Step] | None = None
    ) -> Iterator[tuple[Job, float]]:
        """Every image and when its last byte is encoded, after `trial` steps where given."""
        steps = {**devices.steps, **(trial or {})}
        free: dict[str, float] = {}
        held: dict[Job, str] = {}
        begun = {job for step in steps.values() for job in step.batch}
        ahead = []  # what has to leave first, because no slot is free
        for name, step in steps.items():
            free[name] = max(now, step.until)
            staying = []
            for job in dict.fromkeys((*step.batch, *devices.held[name])):
                if job in begun and job.steps_left == 1:
                    free[name] += self.costs.finish(job.size)
                    yield job, free[name] + self.costs.encode(job.size)
                else:
                    staying.append(job)
            held.update(dict.fromkeys(staying, name))
            if len(staying) >= self.limits.slots:
                ahead.append(self.first(staying, now, begun))
        rest = [*held.keys() - ahead, *(job for job in waiting if job not in begun)]
        rest.sort(key=by_rank)
        yield from self._in_order((*ahead, *rest), now, devices.sizes, free, held, begun)

    def _in_order(
        self,
        order: Sequence[Job],
        now: float,
        sizes: Mapping[str, frozenset[Size]],
        free: dict[str, float],
        held: Mapping[Job, str],
        begun: set[Job],
    ) -> Iterator[tuple[Job, float]]:
        image, present = self.costs.image, {job.size for job in order}
        encode = {size: self.costs.encode(size) for size in present}
        takers = {size: [name for name in free if size in sizes[name]] for size in present}
        hopeless: list[Job] = []
        for last_round in (False, True):
            for job in hopeless if last_round else order:
                name, size = held.get(job), job.size
                seconds = image(size, name is None, job.steps_left - (job in begun))
                if not last_round and now + seconds + encode[size] > job.deadline + ROUNDING:
                    hopeless.append(job)
                    continue
                if name is None:
                    names = takers[size]
                    name = min(names, key=free.__getitem__) if len(names) > 1 else names[0]
                free[name] += seconds
                yield job, free[name] + encode[size]

    def first(self, jobs: Iterable[Job], now: float, begun: Container[Job] = ()) -> Job:
        """The one that goes first by the rule; those `begun` are at a step already."""
        ordered = sorted(jobs, key=by_rank)
        return next((job for job in ordered if not self.is_hopeless(job, now, job in begun)), ordered[0])

    def is_hopeless(self, job: Job, now: float, begun: bool = False) -> bool:
        """Whether `job` would be late even if it had a device for itself from now on."""
        return now + self.remaining(job, begun) + self.costs.encode(job.size) > job.deadline + ROUNDING

    def remaining(self, job: Job, begun: bool = False) -> float:
        """Predicted device seconds that `job` still needs by itself, without the step that it has begun."""
        return self.costs.image(job.size, job.state is JobState.QUEUED and not begun, job.steps_left - begun)
