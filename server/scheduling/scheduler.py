"""The scheduler: it decides which images run their next step on which device.

Data and arithmetic only: no tensors, no HTTP, no clock, no threads.

The most urgent image runs first: by the turn of its client, then by priority class, then by earliest deadline. Turns
come first so that no client takes the devices by declaring all its requests urgent. Waiting raises an image's class, so
no image starves. Neither turns nor classes make an admitted image miss its deadline: if they would, images run in the
order of the forecast, earliest deadline first. Scheduling happens per step: between two steps an image can join a
batch, be preempted, be cancelled or expire.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Generic

from server.errors import UnavailableError
from server.scheduling.admission import AdmissionControl
from server.scheduling.clients import Clients
from server.scheduling.costs import CostTable, Loaded, Output
from server.scheduling.forecast import Devices, Forecast, RunningStep
from server.scheduling.jobs import DevicePlan, Job, JobState, Limits, Payload, Priority, by_rank
from server.scheduling.prompts import PromptBatch, next_batch, waiting_prompts
from server.scheduling.residency import Residency

CAP_SECONDS = 60.0  # time for which a batch size that did not fit is not tried again


class Scheduler(Generic[Payload]):
    """Queue, devices and encoder threads of a server.

    Methods that depend on time have a parameter `now`, in seconds. The caller serialises calls and executes the plans.
    """

    def __init__(
        self, costs: CostTable, limits: Limits, devices: Mapping[str, Mapping[Output, int]], accepting: bool = True
    ) -> None:
        """Create a scheduler for `devices`: by name, what each one decodes and the maximum batch of it."""
        self.costs, self.limits, self.accepting = costs, limits, accepting
        self._forecast = Forecast(costs, limits)
        self._devices = Devices({device: dict(outputs) for device, outputs in devices.items()})
        self._clients = Clients(limits.client_window)
        self._admission = AdmissionControl(costs, self._forecast, self._devices, self._clients)
        self._queue: list[Job[Payload]] = []  # by rank
        self._admitted = 0
        self._retired: dict[str, list[Loaded]] = {device: [] for device in devices}  # to be unloaded
        self._batch_caps: dict[Output, tuple[int, float]] = {}  # maximum batch, and until when
        self._residency = Residency(self._devices.resident, costs, limits.resident)

    # Admission

    def admit(self, jobs: Sequence[Job[Payload]], now: float) -> None:
        """Queue all of `jobs`, which are images of one output, or none of them.

        Raises:
            QueueFullError: they do not fit now; has the seconds after which they may.
            DeadlineTooShortError, TooManyImagesError: they would not fit into an idle server either.
            UnavailableError: the scheduler does not accept jobs.
        """
        self._check_accepting()
        self.costs.advance(now)
        for number, job in enumerate(jobs, self._admitted + 1):
            job.admitted = now
            job.rank = (min(job.deadline, now + self.limits.default_deadline), number)
        self._admission.check(jobs, self._queue, now)
        self._admitted += len(jobs)
        for job in jobs:
            insort(self._queue, job, key=by_rank)

    def check(self, client: str, priority: Priority | None, now: float) -> None:
        """Raise the error with which `admit` would reject a job of this client, whatever its output and deadline.

        If `priority` is None, whatever its priority.
        """
        self._check_accepting()
        self._admission.check_queue(client, priority, self._queue, now)

    def _check_accepting(self) -> None:
        if not self.accepting:
            raise UnavailableError("The server is not accepting requests; retry on another replica.")

    def backlog(self) -> float:
        """Return the predicted seconds of admitted work per device."""
        return self._admission.backlog(self._queue)

    def ends(self, now: float) -> dict[Job[Payload], float]:
        """Return the predicted time at which the last byte of each admitted job is encoded."""
        return dict(self._forecast.ends(now, self._devices, self._queue))

    # Planning

    def plan(self, device: str, now: float) -> DevicePlan[Payload]:
        """Return the next work of `device`, possibly none; queued images in it move to the device."""
        held = self._devices.held[device]
        self._devices.steps[device] = RunningStep(until=now)
        drop = tuple(job for job in held if _is_unwanted(job, now))
        for job in drop:
            self._end(job)
        unload = self._unused(device)
        ready, free = self._startable(device)
        candidates = [*held, *ready]
        if not candidates:
            return DevicePlan(drop, unload)
        batch = self._choose(device, candidates, free, now)
        self._devices.steps[device] = RunningStep(batch, now + self._seconds(device, batch))
        offload, restore = self._residency.move(device, batch[0].loaded, now)
        start = tuple(job for job in batch if job.state is JobState.QUEUED)
        for job in start:
            self._dequeue(job)
            job.state, job.device = JobState.RUNNING, device
            held.append(job)
        return DevicePlan(drop, unload, offload, restore, start, batch)

    def _startable(self, device: str) -> tuple[list[Job[Payload]], int]:
        """Return the queued jobs that can start on `device`, and how many of them may.

        If it has several slots, one is kept for the most urgent image that waits for its prompt: less urgent ones could
        otherwise use all slots until they are finished.
        """
        free, outputs = self.limits.slots - len(self._devices.held[device]), self._devices.outputs[device]
        if free == 0:
            return [], 0
        able = [job for job in self._queue if job.unit in outputs and not self._starts_elsewhere(job, device)]
        ready = [job for job in able if job.prompt is None]
        waiting = next((job for job in able if job.prompt is not None), None)
        if waiting is None or self.limits.slots == 1:
            return ready, free
        if free == 1:
            return [job for job in ready if job.rank < waiting.rank], 1
        return ready, free - 1

    def _starts_elsewhere(self, job: Job[Payload], device: str) -> bool:
        """Return whether a queued job is left to an idle device, because less weights would have to move there."""
        moves, devices = self._residency.moves(device, job.loaded), self._devices
        idle = (name for name in devices.outputs if not (devices.held[name] or devices.steps[name].batch))
        return moves > 0 and any(
            job.unit in devices.outputs[name] and self._residency.moves(name, job.loaded) < moves for name in idle
        )

    def _choose(
        self, device: str, candidates: Sequence[Job[Payload]], free: int, now: float
    ) -> tuple[Job[Payload], ...]:
        """Return the best batch that causes no missed deadline.

        In order of preference: the most urgent image with others, that image alone, the first image of the default
        rule with others, that image alone. For some time after weights were moved to the device, the most urgent image
        that needs no others comes before them.
        """
        first = self._forecast.first(candidates, now)
        kept = self._residency.kept(device, now)
        groups = [job for job in candidates if job.loaded in kept], candidates
        heads = [min(jobs, key=lambda job: self._urgency(job, now)) for jobs in groups if jobs]
        for head in dict.fromkeys((*heads, first)):
            for batch in dict.fromkeys((self._largest_batch(device, head, candidates, free, now), (head,))):
                step = RunningStep(batch, now + self._seconds(device, batch))
                if batch == (first,) or self._harms_none(device, step, now):  # the default rule needs no forecast
                    return batch
        return (first,)

    def _harms_none(self, device: str, step: RunningStep, now: float) -> bool:
        """Return whether no job is harmed if `step` runs next, see `Forecast.harmed`."""
        late = self._late(now, {device: step})
        return not late or not self._forecast.harmed(late, self._late(now), now)

    def _largest_batch(
        self, device: str, head: Job[Payload], candidates: Sequence[Job[Payload]], free: int, now: float
    ) -> tuple[Job[Payload], ...]:
        """Return the largest batch around `head` that raises throughput and whose members all meet their deadlines."""
        output = head.output
        cap = self._batch_limit(device, head.unit, now)
        if cap == 1:
            return (head,)
        peers = sorted((job for job in candidates if job.output == output and job is not head), key=by_rank)
        single, finish, preview = self.costs.step(output), self.costs.finish(output), self.costs.preview(output)
        for count in range(min(cap, 1 + len(peers)), 1, -1):
            step = self.costs.step(output, count)
            if count * single < self.limits.min_batch_gain * step:
                continue
            batch = _members(head, peers, count, free)
            step += preview * sum(job.preview_follows for job in batch)
            begun = now + self._seconds(device, batch) - step
            ends = [begun + job.steps_left * step + finish + self._forecast.encode_alone(job) for job in batch]
            if len(batch) == count and all(end <= job.deadline for end, job in zip(ends, batch, strict=True)):
                return batch
        return (head,)

    def _batch_limit(self, device: str, output: Output, now: float) -> int:
        limit = self._devices.outputs[device][output]
        cap, until = self._batch_caps.get(output, (limit, now))
        return min(cap, limit) if now < until else limit

    def _seconds(self, device: str, batch: Sequence[Job[Payload]]) -> float:
        """Return the predicted cost of conditioning the queued members of `batch` and running one step of it.

        This includes the previews of the step, and moving the weights to `device` if they are in host memory.
        """
        output = batch[0].output
        starting = sum(job.state is JobState.QUEUED for job in batch)
        previews = sum(job.preview_follows for job in batch)
        step = self.costs.step(output, len(batch)) + previews * self.costs.preview(output)
        return self._residency.seconds(device, batch[0].loaded) + starting * self.costs.condition(output) + step

    def _urgency(self, job: Job[Payload], now: float) -> tuple[float, int, tuple[float, int]]:
        classes = int((now - job.admitted) / self.limits.aging)
        return self._clients.turn(job.client), max(0, job.priority - classes), job.rank

    def _late(self, now: float, trial: Mapping[str, RunningStep] | None = None) -> dict[Job[Any], float]:
        return self._forecast.late(now, self._forecast.ends(now, self._devices, self._queue, trial))

    # Decoders

    def load(self, device: str, outputs: Mapping[Output, int]) -> None:
        """Let `device` decode `outputs` too, with their maximum batches."""
        self._devices.outputs[device].update(outputs)

    def retire(self, loaded: Loaded) -> None:
        """Let every device unload a decoder as soon as no image needs it. No more jobs for it may be admitted."""
        for device, outputs in self._devices.outputs.items():
            if any(output.loaded == loaded for output in outputs):
                self._retired[device].append(loaded)

    def _unused(self, device: str) -> tuple[Loaded, ...]:
        """Return the retired decoders that `device` has to unload now, and forget them."""
        retired = self._retired[device]
        if not retired:
            return ()
        used = {job.loaded for job in self._live()}
        unload = tuple(loaded for loaded in retired if loaded not in used)
        self._retired[device] = [loaded for loaded in retired if loaded in used]
        outputs = self._devices.outputs[device]
        for output in [output for output in outputs if output.loaded in unload]:
            del outputs[output]
        for loaded in unload:
            self._residency.remove(device, loaded)
            if not any(loaded in others for others in self._retired.values()):
                self.costs.forget(loaded)
                self._batch_caps = {x: cap for x, cap in self._batch_caps.items() if x.loaded != loaded}
        return unload

    def offloaded(self, device: str, loaded: Loaded) -> None:
        """Record that the weights of a decoder are not on `device` any more."""
        self._residency.remove(device, loaded)

    # Prompts

    def plan_prompts(self, now: float) -> tuple[str, ...]:
        """Return the prompts that the text encoder, which is idle, encodes next, possibly none."""
        self._devices.prompts = PromptBatch()
        waiting = waiting_prompts(self._queue, self._devices.prompts)
        batch = next_batch(waiting, self.costs, self.limits)
        if batch:
            self._devices.prompts = PromptBatch(batch, now + self.costs.caption(len(batch)))
        return batch

    def encoded_prompts(self, prompts: Container[str]) -> dict[Job[Payload], str]:
        """Let the jobs that wait for one of `prompts` start; return them with their prompts."""
        jobs = {job: job.prompt for job in self._queue if job.prompt is not None and job.prompt in prompts}
        for job in jobs:
            job.prompt = None
        return jobs

    def prompts_until(self) -> float:
        """Return the predicted time at which the text encoder completes its batch."""
        return self._devices.prompts.until

    def waiting_prompts(self) -> int:
        """Return the number of prompts that wait for the text encoder."""
        return len(waiting_prompts(self._queue, self._devices.prompts))

    # Progress

    def stepped(self, batch: Iterable[Job[Payload]], now: float) -> list[Job[Payload]]:
        """Record one step of all of `batch`; return the jobs that leave for the encoder, as it was their last step."""
        done: list[Job[Payload]] = []
        for job in batch:
            job.steps_done += 1
            if job.state is JobState.RUNNING:
                assert job.device is not None  # noqa: S101  every running job has one
                until = max(now, self._devices.steps[job.device].until if done else now)
                if job.steps_left == 0 and not _is_unwanted(job, now):  # otherwise the next plan drops it
                    until += self.costs.finish(job.output)
                    self._end(job)
                    job.state, job.ready = JobState.ENCODING, until
                    self._devices.encoding[job] = None
                    done.append(job)
                self._devices.steps[job.device] = RunningStep(until=until)
        return done

    def fail(self, job: Job[Payload]) -> None:
        """Remove a job from its device or the encoder after an error; no effect if it was removed before."""
        if job.state is JobState.RUNNING:
            self._end(job)
        self.encoded(job)

    def record_encoding(self, job: Job[Payload], begun: float, done: float, now: float) -> None:
        """Record the fractions of the rows of `job` that the encoder has begun and done."""
        job.rows_begun, job.rows_encoded = begun, done
        if job.encode_began is None:
            job.encode_began = now

    def encoded(self, job: Job[Payload]) -> None:
        """Remove a job that no encoder thread works on any more; no effect if it was removed before."""
        if job in self._devices.encoding:
            del self._devices.encoding[job]
            job.state = JobState.ENDED

    def cancel(self, job: Job[Payload]) -> None:
        """Cancel `job`; no effect if it has ended.

        A job on a device uses its slot until the device's next plan. One in the encoder counts until `encoded`, because
        a thread may still be working on it.
        """
        job.cancelled = True
        if job.state is JobState.QUEUED and job in self._queue:
            self._dequeue(job)
            job.state = JobState.ENDED
        elif job.state is JobState.ENCODING:
            job.state = JobState.ENDED

    def expire(self, now: float) -> list[Job[Payload]]:
        """Cancel and return the jobs whose deadline has passed. Call it regularly, even if there are none."""
        self.costs.advance(now)
        queued = itertools.takewhile(lambda job: job.rank[0] < now, self._queue)
        live = itertools.chain(queued, self._devices.encoding, *self._devices.held.values())
        expired = [job for job in live if job.deadline < now and not job.cancelled]
        for job in expired:
            self.cancel(job)
        return expired

    def clear(self) -> list[Job[Payload]]:
        """Remove and return all jobs."""
        jobs = list(self._live())
        for job in jobs:
            job.state = JobState.ENDED
        self._queue.clear()
        for held in self._devices.held.values():
            held.clear()
        self._devices.encoding.clear()
        return jobs

    def cap_batch(self, output: Output, cap: int, now: float) -> None:
        """Limit batches of `output` to `cap` images for CAP_SECONDS, because a larger one did not fit on a device.

        The limit ends, because the memory may have been used by something else.
        """
        before, until = self._batch_caps.get(output, (cap, now))
        self._batch_caps[output] = (max(1, min(cap, before) if now < until else cap), now + CAP_SECONDS)

    # State

    def queued(self, priority: Priority | None = None, decoder: str | None = None) -> int:
        """Return the number of queued jobs, of one priority class and one decoder or of all."""
        return _count((job for job in self._queue if priority in (None, job.priority)), decoder)

    def running(self, decoder: str | None = None) -> int:
        """Return the number of jobs on devices, of one decoder or of all."""
        return _count(itertools.chain(*self._devices.held.values()), decoder)

    def encoding_images(self, decoder: str | None = None) -> int:
        """Return the number of images in the encoder or waiting for one of its threads, of one decoder or of all."""
        return _count(self._devices.encoding, decoder)

    def encoder_backlog(self, now: float) -> float:
        """Return the predicted seconds until the encoder has encoded all images that have left their devices."""
        images = (self._forecast.encoding(job, now) for job in self._devices.encoding)
        return sum(image.work for image in images) / self.limits.encoder_threads

    def busy_until(self, device: str) -> float:
        """Return the predicted time at which `device` completes its plan."""
        return self._devices.steps[device].until

    def next_deadline(self) -> float:
        """Return the earliest deadline of the jobs that have not ended, or infinity."""
        return min((job.deadline for job in self._live() if not job.cancelled), default=math.inf)

    def _live(self) -> Iterable[Job[Payload]]:
        return itertools.chain(self._queue, self._devices.encoding, *self._devices.held.values())

    def _dequeue(self, job: Job[Payload]) -> None:
        del self._queue[bisect_left(self._queue, job.rank, key=by_rank)]

    def _end(self, job: Job[Payload]) -> None:
        assert job.device is not None  # noqa: S101  every running job has one
        self._devices.held[job.device].remove(job)
        job.state = JobState.ENDED
        self._clients.served(job.client, self.costs.image(job.output, True, job.steps_done, job.previews))


def _count(jobs: Iterable[Job[Any]], decoder: str | None) -> int:
    return sum(decoder in (None, job.output.decoder) for job in jobs)


def _is_unwanted(job: Job[Any], now: float) -> bool:
    return job.cancelled or job.deadline < now


def _members(head: Job[Payload], peers: Iterable[Job[Payload]], count: int, free: int) -> tuple[Job[Payload], ...]:
    """Return `head` and up to `count` - 1 of `peers` that are on the device already or fit into its `free` slots."""
    batch = [head]
    free -= head.state is JobState.QUEUED
    for job in peers:
        if len(batch) == count:
            break
        if job.state is JobState.RUNNING or free > 0:
            free -= job.state is JobState.QUEUED
            batch.append(job)
    return tuple(batch)
