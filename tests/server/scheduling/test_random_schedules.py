"""Random schedules, checked against the scheduler's guarantees with a manual clock and exact costs.

Encoder threads are simulated as a fluid that an urgent image gets at once; real ones complete their strip first, which
the margin of predictions allows for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engines.size import Size
from server.errors import QueueFullError, TooManyImagesError
from server.scheduling.costs import PNG_FAST, CostTable, Loaded, Output, Tiling
from server.scheduling.jobs import DevicePlan, Job, JobState, Limits, Priority
from server.scheduling.scheduler import Scheduler

SMALL, LARGE = Output("flux", Size(512, 512)), Output("flux", Size(1024, 1024))
OTHER = Output("sdxl", Size(512, 512))
TILED = Output("sdxl", Size(1024, 1024), tiling=Tiling(OTHER.size, 3))
THIRD = Output("sd3", Size(512, 512))  # of the machines that have three decoders
OUTPUTS = SMALL, LARGE, OTHER, TILED, THIRD
SECONDS = {
    "condition": (0.5, 1.0, 0.2, 0.1, 0.3),
    "step": (1.0, 4.0, 0.6, 0.9, 0.8),  # of a tile for TILED
    "preview": (0.3, 0.8, 0.4, 1.2, 0.2),
    "finish": (0.25, 1.0, 0.3, 1.1, 0.2),
}
ENCODE = {  # thread-seconds
    PNG_FAST: (0.5, 2.0, 0.6, 2.2, 0.5),
    "png-best": (8.0, 30.0, 7.0, 28.0, 8.0),
    "webp": (3.0, 12.0, 4.0, 14.0, 3.0),
}
STRIPS = {PNG_FAST: (8, 32, 8, 32, 8), "png-best": (8, 32, 8, 32, 8), "webp": (1, 1, 1, 1, 1)}
EPSILON = 1e-3


RESTORE = {"flux": 0.9, "sdxl": 0.4, "sd3": 0.7}  # seconds
CAPTION = {1: 1.5, 2: 2.0, 3: 4.5}  # seconds, by number of prompts

Request = tuple[Output, int, int, Priority, str, float | None, str, str | None, bool]
REQUESTS = st.tuples(
    st.sampled_from(OUTPUTS),
    st.integers(1, 4),  # steps
    st.sampled_from([1, 1, 1, 2]),  # images
    st.sampled_from(list(Priority)),
    st.sampled_from([PNG_FAST, PNG_FAST, "png-best", "webp"]),
    st.sampled_from([0.0, 0.3, 0.6, 1.0, 1.5, 4.0, None]),  # fraction of the backlog that the deadline leaves time for
    st.sampled_from(["a", "a", "b", ""]),  # client
    st.sampled_from([None, None, "p", "q", "r", "s"]),  # prompt that is not encoded yet
    st.sampled_from([False, False, True]),  # previews
)


def cost_table(slope: float, outputs: Iterable[Output]) -> CostTable:
    table = CostTable()
    for output in outputs:
        measure(table, slope, output, 0)
    for batch, prompts in CAPTION.items():
        table.measure("caption", None, prompts, batch)
    return table


def measure(table: CostTable, slope: float, output: Output, version: int) -> None:
    """Measure the costs of a version of an output; each version is slower than the one before it."""
    index, loaded, factor = OUTPUTS.index(output), output._replace(version=version), 1 + 0.3 * version
    for stage, each in SECONDS.items():
        for batch in range(1, 4 if stage == "step" else 2):
            measured = loaded.unit if stage == "step" else loaded
            seconds = factor * each[index] * (1 + (batch - 1) * slope)
            table.measure(stage, measured, seconds, batch)  # type: ignore[arg-type]
    for encoding, each in ENCODE.items():
        table.measure("encode", loaded, each[index], encoding=encoding)
    table.measure("restore", loaded.loaded, factor * RESTORE[output.decoder])


def first(output: Output) -> Output:
    """Return the output of the first version of its decoder."""
    return output._replace(version=0)


def strips(output: Output, encoding: str) -> int:
    return STRIPS[encoding][OUTPUTS.index(first(output))]


class EncoderThreads:
    """Encoder threads that work on the images of lowest rank. An image of one strip keeps its thread."""

    def __init__(self, scheduler: Scheduler, threads: int) -> None:
        self.scheduler, self.threads = scheduler, threads
        self.now = 0.0
        self.left: dict[Job, float] = {}  # thread-seconds

    def add(self, job: Job) -> None:
        self.left[job] = self.work(job)

    def drop(self, job: Job) -> None:
        """Discard the strips of an image that no thread has begun."""
        if job.strips > 1 or job.encode_began is None:
            del self.left[job]
            self.scheduler.encoded(job)

    def run(self, until: float) -> Iterator[tuple[Job, float]]:
        """Let time pass; yield each image that is encoded, and when."""
        while self.now < until:
            rates = self.rates()
            end = min([until, *(self.now + self.left[job] / rate for job, rate in rates.items())])
            for job, rate in rates.items():
                self.report(job)
                self.left[job] -= rate * (end - self.now)
                self.report(job)
            self.now = end
            for job in [job for job in rates if self.left[job] < 1e-9]:
                del self.left[job]
                self.scheduler.encoded(job)
                yield job, end

    def rates(self) -> dict[Job, int]:
        """Return the number of threads that work on each image."""
        free, rates = self.threads, {}
        for job in sorted(self.left, key=lambda job: (job.strips > 1 or job.encode_began is None, job.rank)):
            if free:
                rates[job] = min(free, job.strips)
                free -= rates[job]
        return rates

    def report(self, job: Job) -> None:
        done = 1 - self.left[job] / self.work(job)
        self.scheduler.record_encoding(job, done, done, self.now)

    def work(self, job: Job) -> float:
        return self.scheduler.costs.encode(job.output, job.encoding)


class Schedules(RuleBasedStateMachine):
    """Devices run plans; jobs arrive, fail and are cancelled at random times.

    A device completes its plan, and an encoder thread its image, exactly when the cost table predicts it.
    """

    device_outputs: tuple[tuple[Output, ...], ...] = (OUTPUTS[:4],)
    resident: int | None = None  # decoders whose weights are on a device at once

    @initialize(
        slope=st.sampled_from([0.2, 0.6, 1.0]),
        slots=st.integers(1, 3),
        max_batches=st.fixed_dictionaries(dict.fromkeys(("flux", "sdxl", "sd3"), st.integers(1, 3))),
        encoder_threads=st.sampled_from([1, 2, 5]),
        queue_images=st.integers(1, 8),
        queue_seconds=st.sampled_from([10.0, 1e9]),
        shares=st.sampled_from([(1.0, 1.0, 1.0), (1.0, 0.9, 0.5), (0.8, 0.6, 0.6)]),
        max_prompts=st.integers(1, 3),
    )
    def begin(
        self,
        slope: float,
        slots: int,
        max_batches: dict[str, int],
        encoder_threads: int,
        queue_images: int,
        queue_seconds: float,
        shares: tuple[float, float, float],
        max_prompts: int,
    ) -> None:
        self.limits = Limits(
            queue_images,
            queue_seconds,
            slots,
            encoder_threads,
            max_prompts,
            default_deadline=20.0,
            shares=shares,
            resident=self.resident,
        )
        self.costs = cost_table(slope, self.device_outputs[0])
        self.max_batch = {output.unit: min(max_batches[output.decoder], slots) for output in OUTPUTS}
        self.max_batch[TILED.unit] = 1
        devices = {
            str(number): {output.unit: self.max_batch[output.unit] for output in outputs}
            for number, outputs in enumerate(self.device_outputs)
        }
        self.scheduler = Scheduler(self.costs, self.limits, devices)
        self.slope, self.versions = slope, {output.decoder: 0 for output in itertools.chain(*self.device_outputs)}
        self.unloaded: list[tuple[str, Loaded]] = []
        self.on_device: dict[str, set[Loaded]] = {device: set() for device in devices}  # whose weights
        self.encoder = EncoderThreads(self.scheduler, encoder_threads)
        self.now = 0.0
        self.running: dict[str, tuple[DevicePlan, float]] = {}
        self.prompts: tuple[tuple[str, ...], float] | None = None  # in the text encoder, and until when
        self.idle = set(devices)
        self.admitted: list[Job] = []
        self.ends: dict[Job, str] = {}
        self.guaranteed: set[Job] = set()  # jobs admitted with a deadline
        self.cancelled: set[Job] = set()

    def end(self, job: Job, how: str) -> None:
        assert job not in self.ends, "ended twice"
        assert job in self.admitted
        allowed = how in ("done", "failed") or job in self.cancelled or job not in self.guaranteed
        assert allowed or not self.exact(), "a job admitted with a deadline was dropped"
        self.ends[job] = how

    # Events

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=5))
    def admit(self, requests: list[Request]) -> None:
        for first_output, steps, count, priority, encoding, slack, client, prompt, previews in requests:
            if first_output.decoder not in self.versions:
                continue
            output = first_output._replace(version=self.versions[first_output.decoder])
            deadline = math.inf
            if slack is not None:
                alone = (CAPTION[1] + self.blocking(output) if prompt else 0.0) + count * (
                    self.costs.image(output, True, steps * output.units, previews) + self.costs.encode(output, encoding)
                )
                if self.resident:
                    alone += self.costs.restore(output.loaded) * (1 + 2 * count if prompt else 1)
                backlog = self.scheduler.backlog() + self.scheduler.encoder_backlog(self.now)
                deadline = self.now + 1.1 * (alone + slack * backlog)
            job = partial(
                Job, output, tuple(range(steps)), priority, deadline, client, encoding, strips(output, encoding)
            )
            job = partial(job, prompt=prompt, previews=previews)
            self.submit([job(payload=None) for _ in range(count)])
        self.assign()

    @rule(decoder=st.sampled_from(["flux", "sdxl"]))
    def replace(self, decoder: str) -> None:
        """Load a new version of a decoder, and retire the current one."""
        old, version = Loaded(decoder, self.versions[decoder]), self.versions[decoder] + 1
        self.versions[decoder] = version
        for output in (output for output in OUTPUTS if output.decoder == decoder):
            measure(self.costs, self.slope, output, version)
            for number, outputs in enumerate(self.device_outputs):
                if output in outputs:
                    unit = output.unit._replace(version=version)
                    self.scheduler.load(str(number), {unit: self.max_batch[output.unit]})
        self.scheduler.retire(old)
        self.assign()

    def blocking(self, output: Output) -> float:
        """Return how long an image may have to wait for the device after its prompt was encoded."""
        if self.limits.slots == 1:
            return self.costs.image(output, True, 4 * output.units, previews=True)
        return self.costs.condition(output) + self.costs.step(output) + self.costs.preview(output)

    def submit(self, jobs: list[Job]) -> None:
        queued, backlog = self.scheduler.queued(), self.scheduler.backlog()
        try:
            self.scheduler.admit(jobs, self.now)
        except TooManyImagesError:
            most = self.limits.queue_images * min(self.limits.shares[: jobs[0].priority + 1])
            assert len(jobs) > max(1, int(most))
            assert self.scheduler.queued() == queued, "part of a rejected request was admitted"
        except QueueFullError as error:
            assert error.retry_after > 0  # noqa: PT017
            assert self.scheduler.queued() == queued, "part of a rejected request was admitted"
        else:
            assert backlog <= self.limits.queue_seconds
            assert queued + len(jobs) <= self.limits.queue_images
            self.admitted += jobs
            self.guaranteed.update(job for job in jobs if job.deadline < math.inf)

    @precondition(lambda self: any(job not in self.ends for job in self.admitted))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from([job for job in self.admitted if job not in self.ends]))
        self.cancelled.add(job)
        self.scheduler.cancel(job)
        self.end(job, "cancelled")
        if job in self.encoder.left:
            self.encoder.drop(job)

    @rule(seconds=st.sampled_from([0.1, 0.7, 1.0, 3.0, 10.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass; devices complete their plans."""
        until = self.now + seconds
        while self.next_event() <= until:
            self.encode_prompts(self.next_event())
            if self.running and self.next_event() <= until:
                self.finish_next()
        self.now = max(self.now, until)
        self.assign()

    def next_event(self) -> float:
        """Return when the next device completes its plan, or the text encoder its batch."""
        ends = [until for _, until in self.running.values()]
        return min([*ends, self.prompts[1]] if self.prompts else ends, default=math.inf)

    def encode_prompts(self, until: float) -> None:
        """Let the text encoder complete what it completes before `until`."""
        while self.prompts and self.prompts[1] <= until:
            prompts, end = self.prompts
            self.prompts = None
            self.now = max(self.now, end)
            for job in self.scheduler.encoded_prompts(prompts):
                assert job not in self.ends
            self.assign()

    @precondition(lambda self: self.running)
    @rule()
    def finish_next(self) -> None:
        self.encode_prompts(min(until for _, until in self.running.values()))
        device = min(self.running, key=lambda name: self.running[name][1])
        plan, until = self.running.pop(device)
        self.now = max(self.now, until)  # with two devices, the other one may have gone further
        self.encode()
        for job in self.scheduler.stepped(plan.batch, self.now):
            self.now += self.costs.finish(job.output)
            self.encode()
            assert job.steps_left == 0
            self.encoder.add(job)
        self.idle.add(device)
        self.assign()

    def encode(self) -> None:
        """Let the encoder threads work until now."""
        for job, end in self.encoder.run(self.now):
            if job in self.guaranteed:
                assert end <= job.deadline + EPSILON or not self.exact(), "a job admitted with a deadline was made late"
            if job not in self.ends:
                self.end(job, "done")

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail_a_step(self, data: st.DataObject) -> None:
        """One job of a batch fails; the others must repeat the step."""
        device = data.draw(st.sampled_from(sorted(self.running)))
        self.encode_prompts(self.running[device][1])
        plan, until = self.running.pop(device)
        self.now = max(self.now, until)
        self.scheduler.fail(plan.batch[0])
        if plan.batch[0] not in self.ends:
            self.end(plan.batch[0], "failed")
        self.guaranteed -= set(plan.batch)
        self.idle.add(device)
        self.guaranteed.clear()  # the lost step was part of every prediction
        self.assign()

    def assign(self) -> None:
        """Plan for the idle devices, as workers do after every change."""
        self.encode()
        for job in self.scheduler.expire(self.now):
            self.end(job, "expired")
            if job in self.encoder.left:
                self.encoder.drop(job)
        if self.prompts is None and (prompts := self.scheduler.plan_prompts(self.now)):
            assert len(prompts) <= self.limits.max_prompts
            self.prompts = prompts, self.now + self.costs.caption(len(prompts))
        for device in sorted(self.idle):
            plan = self.scheduler.plan(device, self.now)
            for job in plan.drop:
                assert self.ends[job] in ("cancelled", "expired")
            for loaded in plan.unload:
                assert loaded.version < self.versions[loaded.decoder], "the current version was unloaded"
                assert not any(job.output.loaded == loaded for job in self.admitted if job not in self.ends)
                self.unloaded.append((device, loaded))
                self.on_device[device].discard(loaded)
            if plan.batch:
                self.check(device, plan)
                self.idle.remove(device)
                output = plan.batch[0].output
                step = self.costs.step(output, len(plan.batch))
                step += sum(self.costs.preview(output) for job in plan.batch if job.preview_follows)
                seconds = step + sum(self.costs.condition(job.output) for job in plan.start)
                self.running[device] = (plan, self.now + seconds + self.move_weights(device, plan))

    def move_weights(self, device: str, plan: DevicePlan) -> float:
        """Move weights as planned; return how long it takes."""
        if self.resident is None:
            assert plan.restore is None
            return 0.0
        on_device, loaded = self.on_device[device], plan.batch[0].output.loaded
        assert on_device.issuperset(plan.offload)
        on_device.difference_update(plan.offload)
        if plan.restore is not None:
            assert plan.restore not in on_device
            on_device.add(plan.restore)
        assert loaded in on_device, "the weights that a batch needs are in host memory"
        assert len(on_device) <= self.resident
        return 0.0 if plan.restore is None else self.costs.restore(plan.restore)

    def check(self, device: str, plan: DevicePlan) -> None:
        assert len(set(plan.batch)) == len(plan.batch) <= self.max_batch[first(plan.batch[0].unit)]
        assert len({job.output for job in plan.batch}) == 1
        assert set(plan.start) <= set(plan.batch)
        others = itertools.chain.from_iterable(work.batch for work, _ in self.running.values())
        assert not set(plan.batch) & set(others), "a job on two devices"
        for job in plan.batch:
            assert first(job.output) in self.device_outputs[int(device)]
            assert (device, job.output.loaded) not in self.unloaded
            assert job.device == device, "a job changed its device"
            assert job not in self.ends
            assert job not in self.cancelled, "work on a cancelled job"
            assert job.steps_left > 0
            assert job.prompt is None, "an image started without its caption"

    def exact(self) -> bool:
        return len(self.device_outputs) == 1

    # Invariants

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        live = [job for job in self.admitted if job not in self.ends]
        assert self.scheduler.queued() == sum(job.state is JobState.QUEUED for job in live) <= self.limits.queue_images
        assert self.scheduler.encoding_images() == len(self.encoder.left)
        arriving = max((job.ready - self.now for job in self.encoder.left), default=0.0)  # still on their way to it
        assert (
            self.scheduler.encoder_backlog(self.now) <= sum(self.encoder.left.values()) + max(0.0, arriving) + EPSILON
        )
        running = [job for job in self.admitted if job.state is JobState.RUNNING]
        assert self.scheduler.running() == len(running)
        for priority in Priority:
            for pool in self.limits.pools(priority):
                waiting = sum(job.state is JobState.QUEUED and job.priority in pool.classes for job in live)
                assert waiting <= max(1, int(pool.share * self.limits.queue_images)), "a class exceeds its share"
        for device in range(len(self.device_outputs)):
            assert sum(job.device == str(device) for job in running) <= self.limits.slots
        waiting = any(job.state is JobState.QUEUED and job.prompt is None for job in live)
        assert self.prompts or all(job.prompt is None for job in live), "prompts wait although the encoder is idle"
        assert not (self.idle and self.running == {} and waiting), "jobs wait although all devices are idle"

    def teardown(self) -> None:
        """Let all devices finish and check how every job ended."""
        if not hasattr(self, "scheduler"):
            return
        self.wait(1000.0)
        assert set(self.ends) == set(self.admitted), "a job was lost"
        for job, how in self.ends.items():
            dropped = how not in ("done", "failed")
            assert not dropped or job in self.cancelled or job.deadline < math.inf, "dropped without a reason"
        assert self.scheduler.queued() == self.scheduler.running() == self.scheduler.encoding_images() == 0
        assert self.scheduler.backlog() == pytest.approx(0)
        old = [Loaded(decoder, number) for decoder, version in self.versions.items() for number in range(version)]
        devices = map(str, range(len(self.device_outputs)))
        assert sorted(self.unloaded) == sorted(itertools.product(devices, old)), "not unloaded once on each device"
        known = {key.output.loaded for key in self.costs.table() if key.output is not None}
        assert known == {Loaded(*item) for item in self.versions.items()}, "costs of old versions are kept"


class TwoDeviceSchedules(Schedules):
    """Two devices, one of which decodes no large images of one decoder."""

    device_outputs = (OUTPUTS[:4], (SMALL, OTHER, TILED))


class OneResidentDecoder(Schedules):
    """A device on which only one decoder at a time has its weights."""

    resident = 1


class TwoOfThreeDecoders(Schedules):
    """A device on which two of three decoders have their weights at a time."""

    device_outputs = (OUTPUTS,)
    resident = 2

    def exact(self) -> bool:
        """A cancellation can change which weights were not used for the longest time."""
        return not self.cancelled


class OneResidentDecoderPerDevice(TwoDeviceSchedules):
    """Two devices, on each of which only one decoder at a time has its weights."""

    resident = 1


FAST = settings(
    max_examples=1000,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestOneDevice = Schedules.TestCase
TestOneDevice.settings = FAST
TestTwoDevices = TwoDeviceSchedules.TestCase
TestTwoDevices.settings = settings(FAST, max_examples=400)
TestOneResidentDecoder = OneResidentDecoder.TestCase
TestOneResidentDecoder.settings = FAST
TestTwoOfThreeDecoders = TwoOfThreeDecoders.TestCase
TestTwoOfThreeDecoders.settings = settings(FAST, max_examples=400)
TestOneResidentDecoderPerDevice = OneResidentDecoderPerDevice.TestCase
TestOneResidentDecoderPerDevice.settings = settings(FAST, max_examples=400)
