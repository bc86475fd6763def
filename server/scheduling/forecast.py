"""Forecast of when each admitted image will be finished, from the cost table, if no other request arrives."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from server.scheduling.costs import PREVIEW, Costs, Loaded, Output
from server.scheduling.encoders import ReadyImage, encoded
from server.scheduling.jobs import Job, JobState, Limits, by_rank
from server.scheduling.prompts import PromptBatch, encoded_at
from server.scheduling.residency import Resident, use
from server.scheduling.timeline import Timeline

AnyJob = TypeVar("AnyJob", bound=Job[Any])

MAX_STEPS = 4
ROUNDING = 1e-6  # seconds; sums of the same terms in another order differ in their last bits


@dataclass(frozen=True)
class RunningStep:
    """The step that a device is running and its predicted end."""

    batch: tuple[Job[Any], ...] = ()
    until: float = 0.0


@dataclass
class Devices:
    """The devices by name: what each one decodes, the images it holds and its step; and both encoders' work."""

    outputs: dict[str, dict[Output, int]]  # what each device decodes, with the maximum number of images per step
    held: dict[str, list[Job[Any]]] = field(default_factory=dict)  # started but not finished, running or paused
    steps: dict[str, RunningStep] = field(default_factory=dict)
    resident: dict[str, Resident] = field(default_factory=dict)  # unused if the weights of all decoders are
    encoding: dict[Job[Any], None] = field(default_factory=dict)  # images that have left their device, in this order
    prompts: PromptBatch = field(default_factory=PromptBatch)  # what the text encoder is encoding

    def __post_init__(self) -> None:
        self.held = {name: [] for name in self.outputs}
        self.steps = {name: RunningStep() for name in self.outputs}
        self.resident = {name: [] for name in self.outputs}

    def admitted(self, queue: Iterable[Job[Any]]) -> list[Job[Any]]:
        """Return the jobs of `queue` and those on devices."""
        return [*queue, *(job for held in self.held.values() for job in held)]


@dataclass(frozen=True)
class Forecast:
    """Simulates the default rule: jobs in order of rank, one at a time; those that cannot meet their deadline last.

    The encoder's threads encode the images that leave the devices, also in order of rank (`encoded`).

    Ranks never change, so a forecast stays true as long as the rule is followed. The scheduler departs from the rule
    only if a new forecast shows that this harms no job, and so meets every deadline that it accepted: exactly on one
    device with exact costs, and approximately on several devices, because an image runs on the one that is free first.
    Two deviations are left to the margin: an encoder thread completes its strip before it turns to a more urgent
    image, and after a cancellation an urgent image may reach the encoder earlier and overtake another there.

    An image whose prompt is not encoded yet cannot start, and others run in its place. Its end is the later one of two
    schedules. In one it could start at once, which is the worst case for the others: more urgent images delay them in
    any case, and then reach the encoder early. In the other, it waits for its prompt and then, for at most one step or
    image, for the device.

    If not all decoders have their weights on a device, an image waits for those of its decoder, which are moved there
    when the default rule turns to it. If several have, one more deviation is left to the margin: after a cancellation,
    the weights that were not used for the longest time can be others than before, and have to return.
    """

    costs: Costs
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

    def harmed(self, late: Mapping[AnyJob, float], before: Mapping[AnyJob, float], now: float) -> dict[AnyJob, float]:
        """Return the jobs of `late` that a change harms; `before` has the jobs that are late without it.

        The change harms a job that it makes late, and one that it makes later although it would meet its deadline with
        a part of the margin. A job that misses its deadline anyway is not harmed.
        """
        margin = self.limits.prediction_margin

        def is_harmed(job: AnyJob, excess: float) -> bool:
            if job not in before:
                return True
            meets_deadline = before[job] < margin * (job.deadline - now)
            return meets_deadline and excess > before[job] + ROUNDING

        return {job: excess for job, excess in late.items() if is_harmed(job, excess)}

    def ends(
        self, now: float, devices: Devices, queue: Iterable[Job[Any]], trial: Mapping[str, RunningStep] | None = None
    ) -> Iterator[tuple[Job[Any], float]]:
        """Yield each job that has not ended with the predicted time at which its last byte is encoded.

        `trial` replaces the running step of some devices by one under consideration.
        """
        queue = list(queue)
        prompts = self.prompts_encoded(now, queue, devices.prompts)
        steps = {**devices.steps, **(trial or {})}
        ends = self._ends(now, devices, queue, steps, {})
        if prompts:
            waiting = dict(self._ends(now, devices, queue, steps, prompts))
            return ((job, max(end, waiting[job])) for job, end in ends)
        return ends

    def _ends(
        self,
        now: float,
        devices: Devices,
        queue: Iterable[Job[Any]],
        steps: Mapping[str, RunningStep],
        prompts: Mapping[Job[Any], float],
    ) -> Iterator[tuple[Job[Any], float]]:
        """Yield each job that has not ended with its predicted end; `prompts` has the times before which some wait."""
        images = [self.encoding(job, now) for job in devices.encoding]
        images += self._leave_devices(now, devices, queue, steps, prompts)
        ends = encoded(images, self.limits.encoder_threads)
        return ((job, end) for job, end in ends if job.state is not JobState.ENDED)

    def alone(self, jobs: Iterable[Job[Any]], now: float) -> float:
        """Return the predicted end of `jobs`, if their prompts are known and one device and the encoder start now."""
        free, images = now, []
        for job in jobs:
            free += self.remaining(job)
            images.append(self._image(job, free))
        return max(end for _, end in encoded(images, self.limits.encoder_threads))

    def prompts_encoded(self, now: float, jobs: Iterable[AnyJob], running: PromptBatch) -> dict[AnyJob, float]:
        """Return the predicted time at which the prompt of each job that waits for one is encoded."""
        waiting = sorted((job for job in jobs if job.prompt is not None), key=by_rank)
        if not waiting:
            return {}
        times = encoded_at(now, waiting, running, self.costs, self.limits)
        return {job: times[job.prompt] for job in waiting if job.prompt is not None}

    def encode_alone(self, job: Job[Any]) -> float:
        """Return the predicted seconds of the encoding of `job` if the encoder does nothing else."""
        return self._encode_work(job) / min(self.limits.encoder_threads, job.strips)

    def encoding(self, job: Job[Any], now: float) -> ReadyImage:
        """Return what remains to be encoded of a job that has left its device."""
        image = self._image(job, max(now, job.ready))._replace(work=self.costs.encode(job.output, job.encoding))
        if job.strips > 1:
            rows = job.rows_begun if job.state is JobState.ENDED else 1.0
            return image._replace(work=image.work * (rows - job.rows_encoded))
        if job.encode_began is None:
            return image
        return image._replace(work=max(0.0, image.work - (now - job.encode_began)), begun=True)

    def _image(self, job: Job[Any], ready: float) -> ReadyImage:
        width = min(self.limits.encoder_threads, job.strips)
        return ReadyImage(ready, job.rank, self._encode_work(job), width, job)

    def _encode_work(self, job: Job[Any]) -> float:
        """Return the predicted thread-seconds of encoding `job` and its previews.

        As the previews are encoded earlier than the image, this predicts its end slightly too late.
        """
        previews = len(job.steps) * self.costs.encode(job.output, PREVIEW) if job.previews else 0.0
        return self.costs.encode(job.output, job.encoding) + previews

    def _leave_devices(
        self,
        now: float,
        devices: Devices,
        queue: Iterable[Job[Any]],
        steps: Mapping[str, RunningStep],
        prompts: Mapping[Job[Any], float],
    ) -> Iterator[ReadyImage]:
        """Yield each job that is queued or on a device with the predicted time at which it leaves the device."""
        free: dict[str, float] = {}  # when each device is free
        held: dict[Job[Any], str] = {}
        begun = {job for step in steps.values() for job in step.batch}
        ahead = []  # jobs that must finish before others can start, because their device has no free slot
        for name, step in steps.items():
            free[name] = max(now, step.until)
            staying = []
            for job in dict.fromkeys((*step.batch, *devices.held[name])):
                if job in begun and job.steps_left == 1:
                    free[name] += self.costs.finish(job.output)
                    yield self._image(job, free[name])
                else:
                    staying.append(job)
            held.update(dict.fromkeys(staying, name))
            if len(staying) >= self.limits.slots:
                ahead.append(self.first(staying, now, begun))
        rest = [*held.keys() - ahead, *(job for job in queue if job not in begun)]
        rest.sort(key=by_rank)
        resident = self._resident(devices, steps)
        yield from self._in_order((*ahead, *rest), now, devices.outputs, free, held, begun, prompts, resident)

    def _resident(self, devices: Devices, steps: Mapping[str, RunningStep]) -> dict[str, Resident]:
        """Return the decoders whose weights are on each device after its step; nothing if those of all always are."""
        if self.limits.resident is None:
            return {}
        resident = {name: [*decoders] for name, decoders in devices.resident.items()}
        for name, step in steps.items():
            for job in step.batch[:1]:
                use(resident[name], job.loaded, self.limits.resident)
        return resident

    def _in_order(
        self,
        order: Sequence[Job[Any]],
        now: float,
        outputs: Mapping[str, Mapping[Output, int]],
        free: dict[str, float],
        held: Mapping[Job[Any], str],
        begun: set[Job[Any]],
        prompts: Mapping[Job[Any], float],
        resident: dict[str, Resident],
    ) -> Iterator[ReadyImage]:
        """Run `order` job by job, each on the device that holds it or, if queued, on the one that is free first.

        `prompts` has the time from which each job that waits for its prompt can start. This loop runs for every
        admission and every plan, hence the lookups ahead of it.
        """
        device_seconds, present = self.costs.image, {job.unit for job in order}
        kinds = {_kind(job): job for job in order}
        images = {kind: self._image(job, now) for kind, job in kinds.items()}
        able = {unit: [name for name in free if unit in outputs[name]] for unit in present}
        timelines = {name: Timeline(time) for name, time in free.items()} if prompts else {}
        can_start = self._can_start(order, now, prompts) if prompts else {}
        # A job that waits for its prompt runs out of order: weights may have to return for it, and others after it.
        disorder = 2 * self._slowest_restore(order) if resident else 0.0

        def starts(job: Job[Any]) -> Callable[[str], float]:
            if not resident:
                return free.__getitem__
            restore = self.costs.restore(job.loaded)
            return lambda name: free[name] + (0.0 if job.loaded in resident[name] else restore)

        def run(job: Job[Any], seconds: float, image: ReadyImage) -> ReadyImage:
            name = held.get(job)
            if name is None:
                names = able[job.unit]
                name = min(names, key=starts(job)) if len(names) > 1 else names[0]
            if resident:
                seconds += self._use(resident[name], job.loaded) + (disorder if job.prompt is not None else 0.0)
            free[name] += seconds
            end = free[name]
            if timelines:
                waited = timelines[name].add(can_start[job], seconds)
                end = max(end, waited) if job in prompts else end
            return ReadyImage(end, job.rank, image.work, image.width, job)

        hopeless: list[tuple[Job[Any], float, ReadyImage]] = []
        for job in order:
            seconds = device_seconds(job.output, job not in held, job.steps_left - (job in begun), job.previews)
            image = images[_kind(job)]
            if prompts.get(job, now) + seconds + image.work / image.width > job.deadline + ROUNDING:
                hopeless.append((job, seconds, image))
            else:
                yield run(job, seconds, image)
        for job, seconds, image in hopeless:
            yield run(job, seconds, image)

    def _use(self, resident: Resident, loaded: Loaded) -> float:
        """Use a decoder; return the predicted seconds until its weights are on the device."""
        assert self.limits.resident is not None  # noqa: S101  otherwise `resident` does not exist
        missing = use(resident, loaded, self.limits.resident)
        return self.costs.restore(loaded) if missing else 0.0

    def _slowest_restore(self, jobs: Iterable[Job[Any]]) -> float:
        """Return the longest time to move the weights of one of several decoders, 0 if all jobs are for one."""
        decoders = {job.loaded for job in jobs}
        return max(map(self.costs.restore, decoders)) if len(decoders) > 1 else 0.0

    def _can_start(
        self, order: Sequence[Job[Any]], now: float, prompts: Mapping[Job[Any], float]
    ) -> dict[Job[Any], float]:
        """Return the time from which each job of `order` can start at the latest, if it is the most urgent one.

        When its prompt is encoded, a less urgent image may be running a step. That image may even use the slot that is
        kept for one that waits (`Scheduler.plan`), if its own prompt was encoded before. A step counts in any case, so
        that less urgent images that arrive later do not change the forecast.
        """
        outputs = {job.output for job in order}
        restore = 0.0 if self.limits.resident is None else self._slowest_restore(order)
        image = max(self.costs.image(output, True, MAX_STEPS * output.units, previews=True) for output in outputs)
        step = max(self.costs.condition(x) + self.costs.step(x) + self.costs.preview(x) for x in outputs)
        image, step = restore + image, restore + step
        times = {}
        first = math.inf  # when the first prompt of a less urgent image is encoded
        for job in reversed(order):
            start = prompts.get(job)
            if start is None:
                times[job] = now
            else:
                times[job] = start + (image if first < start or self.limits.slots == 1 else step)
                first = min(first, start)
        return times

    def first(self, jobs: Iterable[AnyJob], now: float, begun: Container[Job[Any]] = ()) -> AnyJob:
        """Return the job that the default rule runs first; jobs in `begun` are already running a step."""
        ordered = sorted(jobs, key=by_rank)
        return next((job for job in ordered if not self.is_hopeless(job, now, job in begun)), ordered[0])

    def is_hopeless(self, job: Job[Any], now: float, begun: bool = False) -> bool:
        """Return whether `job` would miss its deadline even if a device ran it alone from now on."""
        return now + self.remaining(job, begun) + self.encode_alone(job) > job.deadline + ROUNDING

    def remaining(self, job: Job[Any], begun: bool = False) -> float:
        """Return the predicted device seconds that `job` still needs, not counting a step that it has begun."""
        to_start = job.state is JobState.QUEUED and not begun
        return self.costs.image(job.output, to_start, job.steps_left - begun, job.previews)


def _kind(job: Job[Any]) -> tuple[Output, str, int]:
    """Return what the cost of encoding `job` and its previews depends on."""
    return job.output, job.encoding, len(job.steps) if job.previews else 0
