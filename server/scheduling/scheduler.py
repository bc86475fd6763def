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
from server.scheduling.batches import Batches
from server.scheduling.clients import Clients
from server.scheduling.costs import CostTable, Loaded, Output
from server.scheduling.forecast import Devices, Forecast, RunningStep
from server.scheduling.jobs import DevicePlan, Job, JobState, Limits, Payload, Priority, by_rank
from server.scheduling.prompts import PromptBatch, next_batch, waiting_prompts
from server.scheduling.residency import Residency


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
        self._residency = Residency(self._devices.resident, costs, limits.resident)
        self._batches: Batches[Payload] = Batches(
            costs, self._forecast, self._devices, self._clients, self._residency, self._queue
        )

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
        batch = self._batches.choose(device, now)
        if not batch:
            return DevicePlan(drop, unload)
        self._devices.steps[device] = RunningStep(batch, now + self._batches.seconds(device, batch))
        offload, restore = self._residency.move(device, batch[0].loaded, now)
        start = tuple(job for job in batch if job.state is JobState.QUEUED)
        for job in start:
            self._dequeue(job)
            job.state, job.device = JobState.RUNNING, device
            held.append(job)
        return DevicePlan(drop, unload, offload, restore, start, batch)

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
                self._batches.forget(loaded)
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
        """Limit batches of `output` to `cap` images for some time, because a larger one did not fit on a device."""
        self._batches.cap(output, cap, now)

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
