"""Random schedules, checked against the scheduler's guarantees with a manual clock and exact costs."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engines.size import Size
from server.errors import QueueFullError
from server.scheduling.costs import PNG_FAST, CostTable
from server.scheduling.jobs import DevicePlan, Job, JobState, Limits, Priority
from server.scheduling.scheduler import Scheduler

SMALL, LARGE = Size(512, 512), Size(1024, 1024)
SECONDS = {"condition": (0.5, 1.0), "step": (1.0, 4.0), "finish": (0.25, 1.0), "encode": (0.5, 2.0)}
EPSILON = 1e-3


Request = tuple[Size, int, int, Priority, float | None, str]
REQUESTS = st.tuples(
    st.sampled_from([SMALL, LARGE]),
    st.integers(1, 4),  # steps
    st.sampled_from([1, 1, 1, 2]),  # images
    st.sampled_from(list(Priority)),
    st.sampled_from([0.0, 0.3, 0.6, 1.0, 1.5, 4.0, None]),  # fraction of the backlog that the deadline leaves time for
    st.sampled_from(["a", "a", "b", ""]),  # client
)


def cost_table(slope: float) -> CostTable:
    table = CostTable()
    for stage, both in SECONDS.items():
        for size, seconds in zip((SMALL, LARGE), both, strict=True):
            for batch in range(1, 4 if stage == "step" else 2):
                encoding = PNG_FAST if stage == "encode" else ""
                table.observe(stage, size, seconds * (1 + (batch - 1) * slope), batch, encoding)  # type: ignore[arg-type]
    return table


class Schedules(RuleBasedStateMachine):
    """Devices run plans; jobs arrive, fail and are cancelled at random times.

    A device completes its plan exactly when the cost table predicts it.
    """

    device_sizes: tuple[frozenset[Size], ...] = (frozenset({SMALL, LARGE}),)

    @initialize(
        slope=st.sampled_from([0.2, 0.6, 1.0]),
        slots=st.integers(1, 3),
        max_batch=st.integers(1, 3),
        queue_images=st.integers(1, 8),
        queue_seconds=st.sampled_from([10.0, 1e9]),
        shares=st.sampled_from([(1.0, 1.0, 1.0), (1.0, 0.9, 0.5), (0.8, 0.6, 0.6)]),
    )
    def begin(
        self,
        slope: float,
        slots: int,
        max_batch: int,
        queue_images: int,
        queue_seconds: float,
        shares: tuple[float, float, float],
    ) -> None:
        self.limits = Limits(
            queue_images, queue_seconds, slots, min(max_batch, slots), default_deadline=20.0, shares=shares
        )
        self.costs = cost_table(slope)
        devices = {str(number): sizes for number, sizes in enumerate(self.device_sizes)}
        self.scheduler = Scheduler(self.costs, self.limits, devices)
        self.now = 0.0
        self.running: dict[str, tuple[DevicePlan, float]] = {}
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
        for size, steps, count, priority, slack, client in requests:
            deadline = math.inf
            if slack is not None:
                alone = count * (self.costs.image(size, True, steps) + self.costs.encode(size))
                deadline = self.now + 1.1 * (alone + slack * self.scheduler.backlog())
            self.submit(
                [Job(size, tuple(range(steps)), priority, deadline, client, payload=None) for _ in range(count)]
            )
        self.assign()

    def submit(self, jobs: list[Job]) -> None:
        queued, backlog = self.scheduler.queued(), self.scheduler.backlog()
        try:
            self.scheduler.admit(jobs, self.now)
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
        if self.scheduler.cancel(job):
            self.end(job, "cancelled")

    @rule(seconds=st.sampled_from([0.1, 0.7, 1.0, 3.0, 10.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass; devices complete their plans."""
        until = self.now + seconds
        while self.running and min(self.running.values(), key=lambda work: work[1])[1] <= until:
            self.finish_next()
        self.now = until
        self.assign()

    @precondition(lambda self: self.running)
    @rule()
    def finish_next(self) -> None:
        device = min(self.running, key=lambda name: self.running[name][1])
        plan, self.now = self.running.pop(device)
        for job in self.scheduler.stepped(plan.batch, self.now):
            self.now += self.costs.finish(job.size)
            assert job.steps_left == 0
            if job in self.guaranteed:
                in_time = self.now + self.costs.encode(job.size) <= job.deadline + EPSILON
                assert in_time or not self.exact(), "a job admitted with a deadline was made late"
            self.end(job, "done")
        self.idle.add(device)
        self.assign()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail_a_step(self, data: st.DataObject) -> None:
        """One job of a batch fails; the others must repeat the step."""
        device = data.draw(st.sampled_from(sorted(self.running)))
        plan, until = self.running.pop(device)
        self.now = max(self.now, until)
        self.scheduler.fail(plan.batch[0])
        self.end(plan.batch[0], "failed")
        self.guaranteed -= set(plan.batch)
        self.idle.add(device)
        self.guaranteed.clear()  # the lost step was part of every prediction
        self.assign()

    def assign(self) -> None:
        """Plan for the idle devices, as workers do after every change."""
        for job in self.scheduler.expire(self.now):
            self.end(job, "expired")
        for device in sorted(self.idle):
            plan = self.scheduler.plan(device, self.now)
            for job in plan.drop:
                assert job in self.cancelled or job.deadline < self.now
                self.end(job, "dropped")
            if plan.batch:
                self.check(device, plan)
                self.idle.remove(device)
                step = self.costs.step(plan.batch[0].size, len(plan.batch))
                seconds = step + sum(self.costs.condition(job.size) for job in plan.start)
                self.running[device] = (plan, self.now + seconds)

    def check(self, device: str, plan: DevicePlan) -> None:
        assert len(set(plan.batch)) == len(plan.batch) <= self.limits.max_batch
        assert len({job.size for job in plan.batch}) == 1
        assert set(plan.start) <= set(plan.batch)
        others = itertools.chain.from_iterable(work.batch for work, _ in self.running.values())
        assert not set(plan.batch) & set(others), "a job on two devices"
        for job in plan.batch:
            assert job.size in self.device_sizes[int(device)]
            assert job.device == device, "a job changed its device"
            assert job not in self.ends
            assert job not in self.cancelled, "work on a cancelled job"
            assert job.steps_left > 0

    def exact(self) -> bool:
        return len(self.device_sizes) == 1

    # Invariants

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        live = [job for job in self.admitted if job not in self.ends]
        assert self.scheduler.queued() == sum(job.state is JobState.QUEUED for job in live) <= self.limits.queue_images
        running = [job for job in live if job.state is JobState.RUNNING]
        assert self.scheduler.running() == len(running)
        for priority in Priority:
            for pool in self.limits.pools(priority):
                waiting = sum(job.state is JobState.QUEUED and job.priority in pool.classes for job in live)
                assert waiting <= max(1, int(pool.share * self.limits.queue_images)), "a class exceeds its share"
        for device in range(len(self.device_sizes)):
            assert sum(job.device == str(device) for job in running) <= self.limits.slots
        assert not (self.idle and self.running == {} and live), "jobs wait although all devices are idle"

    def teardown(self) -> None:
        """Let all devices finish and check how every job ended."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(200):
            if not self.running:
                break
            self.finish_next()
        assert set(self.ends) == set(self.admitted), "a job was lost"
        for job, how in self.ends.items():
            dropped = how not in ("done", "failed")
            assert not dropped or job in self.cancelled or job.deadline < math.inf, "dropped without a reason"
        assert self.scheduler.queued() == self.scheduler.running() == 0
        assert self.scheduler.backlog() == pytest.approx(0)


class TwoDeviceSchedules(Schedules):
    """Two devices, one of which decodes small images only."""

    device_sizes = (frozenset({SMALL, LARGE}), frozenset({SMALL}))


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
