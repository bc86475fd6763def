"""Which images run the next step of a device, as one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic

from server.scheduling.clients import Clients
from server.scheduling.costs import Costs, Loaded, Output
from server.scheduling.forecast import Devices, Forecast, RunningStep
from server.scheduling.jobs import Job, JobState, Limits, Payload, by_rank
from server.scheduling.residency import Residency

CAP_SECONDS = 60.0  # time for which a batch size that did not fit is not tried again


class Batches(Generic[Payload]):
    """Chooses the batches of the devices."""

    def __init__(
        self,
        costs: Costs,
        forecast: Forecast,
        devices: Devices,
        clients: Clients,
        residency: Residency,
        queue: Sequence[Job[Payload]],
    ) -> None:
        """Share all arguments with the scheduler; `queue` is by rank."""
        self._costs, self._forecast, self._devices, self._clients = costs, forecast, devices, clients
        self._residency, self._queue = residency, queue
        self._limits: Limits = forecast.limits
        self._caps: dict[Output, tuple[int, float]] = {}  # maximum batch, and until when

    def choose(self, device: str, now: float) -> tuple[Job[Payload], ...]:
        """Return the next batch of `device`, empty if there is nothing to do."""
        ready, free = self._startable(device)
        candidates = [*self._devices.held[device], *ready]
        return self._best(device, candidates, free, now) if candidates else ()

    def cap(self, output: Output, cap: int, now: float) -> None:
        """Limit batches of `output` to `cap` images for CAP_SECONDS, because a larger one did not fit on a device.

        The limit ends, because the memory may have been used by something else.
        """
        before, until = self._caps.get(output, (cap, now))
        self._caps[output] = (max(1, min(cap, before) if now < until else cap), now + CAP_SECONDS)

    def forget(self, loaded: Loaded) -> None:
        """Forget the limits of a decoder that has been unloaded."""
        self._caps = {output: cap for output, cap in self._caps.items() if output.loaded != loaded}

    def _startable(self, device: str) -> tuple[list[Job[Payload]], int]:
        """Return the queued jobs that can start on `device`, and how many of them may.

        If it has several slots, one is kept for the most urgent image that waits for its prompt: less urgent ones could
        otherwise use all slots until they are finished.
        """
        free, outputs = self._limits.slots - len(self._devices.held[device]), self._devices.outputs[device]
        if free == 0:
            return [], 0
        able = [job for job in self._queue if job.unit in outputs and not self._starts_elsewhere(job, device)]
        ready = [job for job in able if job.prompt is None]
        waiting = next((job for job in able if job.prompt is not None), None)
        if waiting is None or self._limits.slots == 1:
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

    def _best(self, device: str, candidates: Sequence[Job[Payload]], free: int, now: float) -> tuple[Job[Payload], ...]:
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
                step = RunningStep(batch, now + self.seconds(device, batch))
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
        cap = self._limit(device, head.unit, now)
        if cap == 1:
            return (head,)
        peers = sorted((job for job in candidates if job.output == output and job is not head), key=by_rank)
        single, finish, preview = self._costs.step(output), self._costs.finish(output), self._costs.preview(output)
        for count in range(min(cap, 1 + len(peers)), 1, -1):
            step = self._costs.step(output, count)
            if count * single < self._limits.min_batch_gain * step:
                continue
            batch = _members(head, peers, count, free)
            step += preview * sum(job.preview_follows for job in batch)
            begun = now + self.seconds(device, batch) - step
            ends = [begun + job.steps_left * step + finish + self._forecast.encode_alone(job) for job in batch]
            if len(batch) == count and all(end <= job.deadline for end, job in zip(ends, batch, strict=True)):
                return batch
        return (head,)

    def _limit(self, device: str, output: Output, now: float) -> int:
        limit = self._devices.outputs[device][output]
        cap, until = self._caps.get(output, (limit, now))
        return min(cap, limit) if now < until else limit

    def seconds(self, device: str, batch: Sequence[Job[Payload]]) -> float:
        """Return the predicted cost of conditioning the queued members of `batch` and running one step of it.

        This includes the previews of the step, and moving the weights to `device` if they are in host memory.
        """
        output = batch[0].output
        starting = sum(job.state is JobState.QUEUED for job in batch)
        previews = sum(job.preview_follows for job in batch)
        step = self._costs.step(output, len(batch)) + previews * self._costs.preview(output)
        return self._residency.seconds(device, batch[0].loaded) + starting * self._costs.condition(output) + step

    def _urgency(self, job: Job[Payload], now: float) -> tuple[float, int, tuple[float, int]]:
        classes = int((now - job.admitted) / self._limits.aging)
        return self._clients.turn(job.client), max(0, job.priority - classes), job.rank

    def _late(self, now: float, trial: Mapping[str, RunningStep] | None = None) -> dict[Job[Any], float]:
        return self._forecast.late(now, self._forecast.ends(now, self._devices, self._queue, trial))


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
