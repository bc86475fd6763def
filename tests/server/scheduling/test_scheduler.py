"""The scheduler on a manual clock, with given costs and imaginary devices."""

import contextlib
import math
import re

import pytest

from engines.size import Size
from server.errors import DeadlineTooShortError, QueueFullError, TooManyImagesError, UnavailableError
from server.scheduling.batches import CAP_SECONDS
from server.scheduling.costs import PNG_FAST, CostTable, Output
from server.scheduling.jobs import Job, JobState, Limits, Priority
from server.scheduling.scheduler import Scheduler

SMALL, LARGE = Output("flux", Size(2048, 2048)), Output("flux", Size(4096, 4096))
BOTH = {SMALL: 1, LARGE: 1}


def costs(batch_slope: float = 1.0) -> CostTable:
    """Return costs of steps: 1 s at SMALL and 10 s at LARGE; for a batch of b, 1 + (b − 1)·slope times as much."""
    table = CostTable()
    for size, step in ((SMALL, 1.0), (LARGE, 10.0)):
        for stage in ("condition", "finish"):
            table.measure(stage, size, 0.0)
        table.measure("encode", size, 0.0, encoding=PNG_FAST)
        for batch in range(1, 9):
            table.measure("step", size, step * (1 + (batch - 1) * batch_slope), batch)
    return table


def scheduler(batch_slope: float = 1.0, max_batch: int = 1, **limits) -> Scheduler:
    chosen = Limits(**{"queue_seconds": 1e9, "prediction_margin": 0, **limits})
    return Scheduler(costs(batch_slope), chosen, {"gpu": dict.fromkeys(BOTH, max_batch)})


def job(size=SMALL, deadline=math.inf, priority=Priority.STANDARD) -> Job:
    return Job(size, (0, 1, 2, 3), priority, deadline, payload=None)


def run(scheduler: Scheduler, now: float = 0.0) -> list[Job]:
    """Run one device until no job is left; return the jobs in the order in which they finished.

    Their encoding takes no time.
    """
    finished = []
    while (plan := scheduler.plan("gpu", now)).batch:
        now += scheduler.costs.step(plan.batch[0].output, len(plan.batch))
        for one in scheduler.stepped(plan.batch, now):
            scheduler.encoded(one)
            finished.append(one)
    return finished


def test_jobs_without_deadlines_finish_in_the_order_of_arrival():
    s = scheduler()
    jobs = [job() for _ in range(3)]
    for one in jobs:
        s.admit([one], 0.0)
    assert run(s) == jobs
    assert all(one.state is JobState.ENDED for one in jobs)
    assert s.queued() == s.running() == 0


def test_priority_comes_before_deadline_and_deadline_before_arrival():
    s = scheduler(slots=1)
    late, early, urgent = job(deadline=50), job(deadline=40), job(deadline=60, priority=Priority.INTERACTIVE)
    for one in (late, early, urgent):
        s.admit([one], 0.0)
    assert run(s) == [urgent, early, late]


def test_a_waiting_low_priority_job_ages_past_new_urgent_ones():
    s = scheduler(slots=1, aging=10)
    old, new = job(priority=Priority.BATCH, deadline=100), job(priority=Priority.INTERACTIVE, deadline=200)
    s.admit([old], 0.0)
    s.admit([new], 25.0)
    assert s.plan("gpu", 25.0).batch == (old,)


def test_the_queue_limit_is_exact_and_a_request_is_admitted_as_a_whole():
    s = scheduler(queue_images=3)
    s.admit([job(), job()], 0.0)
    with pytest.raises(QueueFullError) as rejected:
        s.admit([job(), job()], 0.0)
    assert s.queued() == 2
    assert rejected.value.retry_after >= 4  # one image of four steps has to end first
    s.admit([job()], 0.0)
    assert s.queued() == 3


def test_the_queue_limit_in_seconds_counts_predicted_work():
    s = scheduler(queue_seconds=7.9)
    s.admit([job()], 0.0)
    s.admit([job()], 0.0)
    with pytest.raises(QueueFullError, match=r"8\.0 s of work") as rejected:
        s.admit([job()], 0.0)
    assert rejected.value.retry_after == pytest.approx(0.1)


def test_lower_classes_leave_queue_room_for_higher_ones():
    s = scheduler(queue_images=10, shares=(1.0, 0.8, 0.5))
    for priority, most in ((Priority.BATCH, 5), (Priority.STANDARD, 8), (Priority.INTERACTIVE, 10)):
        while s.queued() < most:
            s.admit([job(priority=priority)], 0.0)
        for lower in list(Priority)[priority:]:
            with pytest.raises(QueueFullError, match="is full"):
                s.admit([job(priority=lower)], 0.0)
    assert s.queued() == 10


def test_an_unused_share_is_available_to_higher_classes():
    s = scheduler(queue_images=4, shares=(1.0, 0.75, 0.5))
    s.admit([job(priority=Priority.INTERACTIVE) for _ in range(4)], 0.0)
    s.plan("gpu", 0.0)
    s.admit([job(priority=Priority.BATCH)], 0.0)  # one has left the queue, and no other of this class waits
    assert s.queued() == 4


def test_retry_after_of_a_full_share_is_when_one_of_its_jobs_ends():
    s = scheduler(queue_images=4, shares=(1.0, 1.0, 0.25))
    s.admit([job(deadline=30), job(deadline=40)], 0.0)
    s.admit([job(priority=Priority.BATCH)], 0.0)
    with pytest.raises(QueueFullError, match=r"queue's share for batch requests is full \(limit: 1 image\)") as error:
        s.admit([job(priority=Priority.BATCH)], 0.0)
    assert error.value.retry_after == pytest.approx(12.0)


def test_a_share_limits_seconds_of_work_as_well():
    s = scheduler(queue_seconds=8, shares=(1.0, 1.0, 0.4))
    s.admit([job(priority=Priority.BATCH)], 0.0)
    with pytest.raises(QueueFullError, match=r"4\.0 s of work \(limit: 3\.2 s\)") as rejected:
        s.admit([job(priority=Priority.BATCH)], 0.0)
    assert rejected.value.retry_after == pytest.approx(0.8)
    s.admit([job()], 0.0)


def test_batch_jobs_may_use_only_part_of_their_slack_so_that_urgent_ones_fit():
    """Admitted jobs must stay in time, so batch jobs with no slack left would block all later requests."""
    admitted = {}
    for share in (1.0, 0.5):
        s = scheduler(queue_images=1000, shares=(1.0, 1.0, share))
        admitted[share] = 0
        with pytest.raises(QueueFullError):  # noqa: PT012
            while True:
                s.admit([job(deadline=104.0, priority=Priority.BATCH)], 0.0)
                admitted[share] += 1
        urgent = job(deadline=20.0, priority=Priority.INTERACTIVE)
        if share == 1.0:
            with pytest.raises(QueueFullError):
                s.admit([urgent], 0.0)
        else:
            s.admit([urgent], 0.0)
            assert run(s)[0] is urgent
    assert admitted == {1.0: 26, 0.5: 13}


def test_a_job_that_need_not_wait_needs_no_slack():
    s = scheduler(shares=(1.0, 0.5, 0.5))
    s.admit([job(deadline=12.0) for _ in range(3)], 0.0)
    assert len(run(s)) == 3


def test_a_job_that_would_be_late_is_rejected_at_admission():
    s = scheduler()
    s.admit([job(deadline=6.0)], 0.0)
    with pytest.raises(QueueFullError, match="deadline would be missed") as rejected:
        s.admit([job(deadline=7.0)], 0.0)
    assert rejected.value.retry_after == pytest.approx(1.0)
    s.admit([job(deadline=8.5)], 0.0)


def test_an_urgent_job_is_rejected_if_it_would_make_an_admitted_one_late():
    s = scheduler()
    admitted = job(deadline=5.0)
    s.admit([admitted], 0.0)
    with pytest.raises(QueueFullError):
        s.admit([job(deadline=4.5, priority=Priority.INTERACTIVE)], 0.0)
    urgent = job(deadline=9.0, priority=Priority.INTERACTIVE)
    s.admit([urgent], 0.0)  # it can wait
    assert run(s) == [admitted, urgent]


def test_a_job_that_is_late_anyway_does_not_block_others():
    s = scheduler()
    hopeless = job(deadline=5.0)
    s.admit([hopeless], 0.0)
    s.admit([job(deadline=20.0)], 3.0)  # by now the first one cannot make it


def test_a_starved_size_gets_an_equal_share():
    """Room for a small image appears ten times as often as room for a large one."""
    s = scheduler(queue_images=1000)
    now, rejected = 0.0, {SMALL: 0, LARGE: 0}
    finished = []
    for _ in range(400):
        for size in (SMALL, SMALL, LARGE):
            try:
                s.admit([job(size, deadline=now + 120)], now)
            except QueueFullError:
                rejected[size] += 1
        batch = s.plan("gpu", now).batch
        now += s.costs.step(batch[0].output)
        finished += s.stepped(batch, now)
    seconds = {size: sum(4 * s.costs.step(size) for one in finished if one.output == size) for size in BOTH}
    assert all(rejected.values())
    assert 0.5 < seconds[SMALL] / seconds[LARGE] < 2


def test_a_large_job_does_not_wait_for_later_ones_with_the_same_slack():
    s = scheduler(slots=1)
    large, later = job(LARGE, deadline=100), job(deadline=101)
    s.admit([large], 0.0)
    s.admit([later], 1.0)
    assert run(s, 1.0) == [large, later]


def test_a_job_without_a_deadline_is_not_overtaken_forever():
    s = scheduler(slots=1, default_deadline=10)
    patient = job()
    s.admit([patient], 0.0)
    s.admit([job(deadline=1000, priority=Priority.INTERACTIVE)], 9.0)
    assert s.plan("gpu", 25.0).batch == (patient,)


def test_a_margin_allows_for_higher_costs():
    s = scheduler(prediction_margin=0.1)
    with pytest.raises(DeadlineTooShortError):
        s.admit([job(deadline=4.3)], 0.0)
    s.admit([job(deadline=4.5)], 0.0)


@pytest.mark.parametrize("limits", [{"queue_images": 4}, {"queue_images": 1000, "queue_seconds": 17}])
def test_what_check_rejects_is_rejected_by_admit_for_the_same_reason(limits: dict):
    s = scheduler(shares=(1.0, 0.75, 0.5), **limits)
    rejected = 0
    for number in range(20):
        for priority in Priority:
            try:
                s.check("", priority, 0.0)
            except QueueFullError as error:
                rejected += 1
                with pytest.raises(QueueFullError, match=re.escape(str(error))):
                    s.admit([job(priority=priority)], 0.0)
        if number % 3 == 2:
            s.plan("gpu", 0.0)
        with contextlib.suppress(QueueFullError):
            s.admit([job(priority=list(Priority)[number % 3])], 0.0)
    assert 0 < rejected < 60
    s.accepting = False
    with pytest.raises(UnavailableError):
        s.check("", Priority.INTERACTIVE, 0.0)


def test_a_deadline_that_an_idle_server_would_miss_is_rejected_for_good():
    s = scheduler()
    with pytest.raises(DeadlineTooShortError, match="at least 8000 ms"):
        s.admit([job(deadline=7.9), job(deadline=7.9)], 0.0)
    s.admit([job(deadline=8.0), job(deadline=8.0)], 0.0)


def test_several_devices_share_the_images_of_a_request_with_a_short_deadline():
    s = Scheduler(costs(), Limits(slots=1, prediction_margin=0), {"a": BOTH, "b": BOTH})
    with pytest.raises(DeadlineTooShortError, match="at least 4000 ms"):
        s.admit([job(deadline=3.9), job(deadline=3.9)], 0.0)
    s.admit([job(deadline=4.0), job(deadline=4.0)], 0.0)


def test_a_request_that_an_empty_queue_could_not_hold_is_rejected_for_good():
    s = scheduler(queue_images=4, shares=(1.0, 0.75, 0.5))
    for priority, most in ((Priority.BATCH, 2), (Priority.STANDARD, 3), (Priority.INTERACTIVE, 4)):
        with pytest.raises(TooManyImagesError, match=f"at most {most} images"):
            s.admit([job(priority=priority) for _ in range(most + 1)], 0.0)


def test_an_idle_server_accepts_more_work_than_the_limit_in_seconds():
    s = scheduler(queue_seconds=1, shares=(1.0, 0.5, 0.1))
    for priority in Priority:
        s.admit([job(LARGE, priority=priority), job(LARGE, priority=priority)], 0.0)
        assert len(run(s)) == 2


def test_nothing_is_admitted_while_not_accepting():
    s = scheduler()
    s.accepting = False
    with pytest.raises(UnavailableError):
        s.admit([job()], 0.0)


def test_batches_form_only_if_they_raise_throughput():
    gains, loses = scheduler(batch_slope=0.2, max_batch=4, slots=4), scheduler(batch_slope=1.0, max_batch=4, slots=4)
    for s in (gains, loses):
        s.admit([job() for _ in range(4)], 0.0)
    assert len(gains.plan("gpu", 0.0).batch) == 4
    assert len(loses.plan("gpu", 0.0).batch) == 1


def test_the_tightest_deadline_limits_the_batch_size():
    s = scheduler(batch_slope=0.5, max_batch=4, slots=4)  # steps of 1, 1.5, 2 and 2.5 s
    tight = job(deadline=6.5)
    s.admit([tight], 0.0)
    s.admit([job(deadline=100) for _ in range(3)], 0.0)
    batch = s.plan("gpu", 0.0).batch
    assert tight in batch
    assert len(batch) == 2


def test_a_new_job_joins_others_at_different_steps_but_never_another_size():
    s = scheduler(batch_slope=0.2, max_batch=4, slots=4)
    first, large, second = job(), job(LARGE), job()
    s.admit([first], 0.0)
    s.stepped(s.plan("gpu", 0.0).batch, 0.0)
    s.admit([large], 1.0)
    s.admit([second], 1.0)
    plan = s.plan("gpu", 1.0)
    assert set(plan.batch) == {first, second}
    assert plan.start == (second,)
    assert (first.next_step, second.next_step) == (1, 0)


def test_an_urgent_job_preempts_a_running_one_that_has_slack():
    s = scheduler(slots=2)
    slow, urgent = job(LARGE), job(priority=Priority.INTERACTIVE, deadline=30)
    s.admit([slow], 0.0)
    s.stepped(s.plan("gpu", 0.0).batch, 0.0)
    s.admit([urgent], 10.0)
    assert run(s, 10.0) == [urgent, slow]


def test_an_urgent_job_waits_for_a_running_one_without_slack():
    s = scheduler(slots=2)
    slow = job(LARGE, deadline=42)
    s.admit([slow], 0.0)
    s.stepped(s.plan("gpu", 0.0).batch, 0.0)
    urgent = job(priority=Priority.INTERACTIVE)
    s.admit([urgent], 10.0)
    assert s.plan("gpu", 10.0).batch == (slow,)


def test_slots_limit_the_started_jobs():
    s = scheduler(batch_slope=0.1, max_batch=8, slots=3)
    s.admit([job() for _ in range(8)], 0.0)
    for _ in range(20):
        s.stepped(s.plan("gpu", 0.0).batch, 0.0)
        assert s.running() <= 3


def test_a_cancelled_job_ends_at_once_or_before_its_next_step():
    s = scheduler(slots=1)
    running, waiting = job(), job()
    s.admit([running, waiting], 0.0)
    s.stepped(s.plan("gpu", 0.0).batch, 0.0)
    s.cancel(waiting)
    s.cancel(running)
    assert (s.queued(), s.running()) == (0, 1)
    plan = s.plan("gpu", 1.0)
    assert plan.drop == (running,)
    assert plan.batch == ()
    assert running.steps_done == 1


def test_jobs_past_their_deadline_are_removed():
    s = scheduler(slots=1)
    running, waiting = job(deadline=5.0), job(deadline=10.0)
    s.admit([running, waiting], 0.0)
    s.plan("gpu", 0.0)
    assert s.expire(4.0) == []
    assert s.expire(9.0) == [running]
    assert s.expire(11.0) == [waiting]
    assert s.plan("gpu", 11.0).drop == (running,)
    assert s.queued() == s.running() == 0


def test_two_devices_share_a_queue_but_never_a_job():
    s = Scheduler(costs(), Limits(slots=1), {"a": BOTH, "b": BOTH})
    jobs = [job() for _ in range(3)]
    s.admit(jobs, 0.0)
    first, second = s.plan("a", 0.0).batch, s.plan("b", 0.0).batch
    assert {*first, *second} == set(jobs[:2])


def test_a_device_gets_only_its_own_sizes():
    s = Scheduler(costs(), Limits(), {"small": {SMALL: 1}, "both": BOTH})
    large = job(LARGE)
    s.admit([large], 0.0)
    assert s.plan("small", 0.0).batch == ()
    assert s.plan("both", 0.0).batch == (large,)


def test_a_lowered_batch_cap_holds_for_a_while():
    for now, batch in ((0.0, 2), (CAP_SECONDS - 1, 2), (CAP_SECONDS + 1, 4)):
        s = scheduler(batch_slope=0.1, max_batch=4, slots=4)
        s.cap_batch(SMALL, 2, 0.0)
        s.admit([job() for _ in range(4)], now)
        assert len(s.plan("gpu", now).batch) == batch
