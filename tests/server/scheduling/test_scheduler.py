"""The scheduler as plain arithmetic: a clock held by hand, costs given, devices imagined."""

import math

import pytest

from engines.size import Size
from server.errors import QueueFullError, UnavailableError
from server.scheduling.costs import CostTable
from server.scheduling.jobs import Job, JobState, Limits, Priority
from server.scheduling.scheduler import Scheduler

SMALL, LARGE = Size(2048, 2048), Size(4096, 4096)
BOTH = frozenset({SMALL, LARGE})


def costs(batch_slope: float = 1.0) -> CostTable:
    """1 s a step at SMALL and 10 s at LARGE, nothing else costs; b images take 1 + (b − 1)·slope."""
    table = CostTable()
    for size, step in ((SMALL, 1.0), (LARGE, 10.0)):
        for stage in ("condition", "finish", "encode"):
            table.observe(stage, size, 0.0)
        for batch in range(1, 9):
            table.observe("step", size, step * (1 + (batch - 1) * batch_slope), batch)
    return table


def scheduler(batch_slope: float = 1.0, **limits) -> Scheduler:
    return Scheduler(
        costs(batch_slope), Limits(**{"queue_seconds": 1e9, "prediction_margin": 0, **limits}), {"gpu": BOTH}
    )


def job(size=SMALL, deadline=math.inf, priority=Priority.STANDARD) -> Job:
    return Job(size, (0, 1, 2, 3), priority, deadline, payload=None)


def run(scheduler: Scheduler, now: float = 0.0) -> list[Job]:
    """Drive one device until nothing is left; the jobs in the order in which they finished."""
    finished = []
    while (plan := scheduler.plan("gpu", now)).batch:
        now += scheduler.costs.step(plan.batch[0].size, len(plan.batch))
        finished += scheduler.stepped(plan.batch, now)
    return finished


def test_jobs_without_deadlines_finish_in_the_order_of_arrival():
    s = scheduler()
    jobs = [job() for _ in range(3)]
    for one in jobs:
        s.admit([one], 0.0)
    assert run(s) == jobs
    assert all(one.state is JobState.ENDED for one in jobs)
    assert s.queued() == s.running() == 0


def test_the_earliest_deadline_goes_first_within_a_class_and_the_higher_class_before_it():
    s = scheduler(slots=1)
    late, early, urgent = job(deadline=50), job(deadline=40), job(deadline=60, priority=Priority.INTERACTIVE)
    for one in (late, early, urgent):
        s.admit([one], 0.0)
    assert run(s) == [urgent, early, late]


def test_a_waiting_image_of_a_lower_class_ages_past_newcomers_of_higher_ones():
    s = scheduler(slots=1, aging=10)
    old, new = job(priority=Priority.BATCH, deadline=100), job(priority=Priority.INTERACTIVE, deadline=200)
    s.admit([old], 0.0)
    s.admit([new], 25.0)
    assert s.plan("gpu", 25.0).batch == (old,)


def test_the_queue_limit_is_exact_and_a_request_is_admitted_whole_or_not_at_all():
    s = scheduler(queue_images=3)
    s.admit([job(), job()], 0.0)
    with pytest.raises(QueueFullError) as refused:
        s.admit([job(), job()], 0.0)
    assert s.queued() == 2
    assert refused.value.retry_after >= 4  # one image of four steps has to leave first
    s.admit([job()], 0.0)
    assert s.queued() == 3


def test_the_queue_limit_in_seconds_counts_predicted_work():
    s = scheduler(queue_seconds=7.9)
    s.admit([job()], 0.0)
    s.admit([job()], 0.0)
    with pytest.raises(QueueFullError, match=r"8\.0 s of work") as refused:
        s.admit([job()], 0.0)
    assert refused.value.retry_after == pytest.approx(0.1)


def test_lower_classes_leave_room_in_the_queue_for_higher_ones():
    s = scheduler(queue_images=10, shares=(1.0, 0.8, 0.5))
    for priority, most in ((Priority.BATCH, 5), (Priority.STANDARD, 8), (Priority.INTERACTIVE, 10)):
        while s.queued() < most:
            s.admit([job(priority=priority)], 0.0)
        for lower in list(Priority)[priority:]:
            with pytest.raises(QueueFullError, match="is full"):
                s.admit([job(priority=lower)], 0.0)
    assert s.queued() == 10


def test_what_a_class_does_not_take_of_its_share_is_open_to_those_above_it():
    s = scheduler(queue_images=4, shares=(1.0, 0.75, 0.5))
    s.admit([job(priority=Priority.INTERACTIVE) for _ in range(4)], 0.0)
    s.plan("gpu", 0.0)
    s.admit([job(priority=Priority.BATCH)], 0.0)  # one has left the queue, and no other of this class waits
    assert s.queued() == 4


def test_a_full_share_tells_when_one_of_its_own_images_will_leave():
    s = scheduler(queue_images=4, shares=(1.0, 1.0, 0.25))
    s.admit([job(deadline=30), job(deadline=40)], 0.0)
    s.admit([job(priority=Priority.BATCH)], 0.0)
    with pytest.raises(QueueFullError, match=r"queue's share for batch requests is full \(limit: 1 images\)") as error:
        s.admit([job(priority=Priority.BATCH)], 0.0)
    assert error.value.retry_after == pytest.approx(12.0)


def test_the_share_of_a_class_holds_for_seconds_of_work_too():
    s = scheduler(queue_seconds=8, shares=(1.0, 1.0, 0.4))
    s.admit([job(priority=Priority.BATCH)], 0.0)
    with pytest.raises(QueueFullError, match=r"4\.0 s of work \(limit: 3\.2 s\)") as refused:
        s.admit([job(priority=Priority.BATCH)], 0.0)
    assert refused.value.retry_after == pytest.approx(0.8)
    s.admit([job()], 0.0)


def test_batch_work_is_not_admitted_up_to_its_deadline_so_that_urgent_requests_find_room():
    """Each admitted image must stay in time, so batch work due just in time would close the door to everybody."""
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


def test_a_request_that_would_wait_for_nobody_needs_no_slack():
    s = scheduler(shares=(1.0, 0.5, 0.5))
    s.admit([job(deadline=12.0) for _ in range(3)], 0.0)
    assert len(run(s)) == 3


def test_an_image_that_would_be_late_is_refused_at_once():
    s = scheduler()
    s.admit([job(deadline=6.0)], 0.0)
    with pytest.raises(QueueFullError, match="deadline would be missed") as refused:
        s.admit([job(deadline=7.0)], 0.0)
    assert refused.value.retry_after == pytest.approx(1.0)
    s.admit([job(deadline=8.5)], 0.0)


def test_an_urgent_image_is_refused_if_it_would_make_an_admitted_one_late():
    s = scheduler()
    promised = job(deadline=5.0)
    s.admit([promised], 0.0)
    with pytest.raises(QueueFullError):
        s.admit([job(deadline=4.5, priority=Priority.INTERACTIVE)], 0.0)
    urgent = job(deadline=9.0, priority=Priority.INTERACTIVE)
    s.admit([urgent], 0.0)  # it can wait
    assert run(s) == [promised, urgent]


def test_a_job_that_is_late_anyway_does_not_close_the_door_to_others():
    s = scheduler()
    hopeless = job(deadline=5.0)
    s.admit([hopeless], 0.0)
    s.admit([job(deadline=20.0)], 3.0)  # by now the first one cannot make it


def test_a_size_that_others_crowd_out_gets_an_equal_share():
    """Room for a small image appears ten times as often as room for a large one."""
    s = scheduler(queue_images=1000)
    now, refused = 0.0, {SMALL: 0, LARGE: 0}
    finished = []
    for _ in range(400):
        for size in (SMALL, SMALL, LARGE):
            try:
                s.admit([job(size, deadline=now + 120)], now)
            except QueueFullError:
                refused[size] += 1
        batch = s.plan("gpu", now).batch
        now += s.costs.step(batch[0].size)
        finished += s.stepped(batch, now)
    seconds = {size: sum(4 * s.costs.step(size) for one in finished if one.size == size) for size in BOTH}
    assert all(refused.values())
    assert 0.5 < seconds[SMALL] / seconds[LARGE] < 2


def test_a_large_image_waits_for_none_that_came_later_with_as_much_time():
    s = scheduler(slots=1)
    large, later = job(LARGE, deadline=100), job(deadline=101)
    s.admit([large], 0.0)
    s.admit([later], 1.0)
    assert run(s, 1.0) == [large, later]


def test_an_image_without_a_deadline_is_not_overtaken_for_ever():
    s = scheduler(slots=1, default_deadline=10)
    patient = job()
    s.admit([patient], 0.0)
    s.admit([job(deadline=1000, priority=Priority.INTERACTIVE)], 9.0)
    assert s.plan("gpu", 25.0).batch == (patient,)


def test_a_margin_is_kept_for_costs_that_turn_out_higher():
    s = scheduler(prediction_margin=0.1)
    with pytest.raises(QueueFullError):
        s.admit([job(deadline=4.3)], 0.0)
    s.admit([job(deadline=4.5)], 0.0)


def test_nothing_is_taken_while_not_accepting():
    s = scheduler()
    s.accepting = False
    with pytest.raises(UnavailableError):
        s.admit([job()], 0.0)


def test_batches_form_only_where_they_pay():
    gains, loses = scheduler(batch_slope=0.2, max_batch=4, slots=4), scheduler(batch_slope=1.0, max_batch=4, slots=4)
    for s in (gains, loses):
        s.admit([job() for _ in range(4)], 0.0)
    assert len(gains.plan("gpu", 0.0).batch) == 4
    assert len(loses.plan("gpu", 0.0).batch) == 1


def test_a_batch_is_only_as_large_as_its_tightest_deadline_allows():
    s = scheduler(batch_slope=0.5, max_batch=4, slots=4)  # steps of 1, 1.5, 2 and 2.5 s
    tight = job(deadline=6.5)
    s.admit([tight], 0.0)
    s.admit([job(deadline=100) for _ in range(3)], 0.0)
    batch = s.plan("gpu", 0.0).batch
    assert tight in batch
    assert len(batch) == 2


def test_a_newcomer_joins_images_at_other_steps_and_sizes_never_mix():
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


def test_an_urgent_image_overtakes_a_running_one_that_has_slack():
    s = scheduler(slots=2)
    slow, urgent = job(LARGE), job(priority=Priority.INTERACTIVE, deadline=30)
    s.admit([slow], 0.0)
    s.stepped(s.plan("gpu", 0.0).batch, 0.0)
    s.admit([urgent], 10.0)
    assert run(s, 10.0) == [urgent, slow]


def test_an_urgent_image_waits_for_a_running_one_without_slack():
    s = scheduler(slots=2)
    slow = job(LARGE, deadline=42)
    s.admit([slow], 0.0)
    s.stepped(s.plan("gpu", 0.0).batch, 0.0)
    urgent = job(priority=Priority.INTERACTIVE)
    s.admit([urgent], 10.0)
    assert s.plan("gpu", 10.0).batch == (slow,)


def test_no_more_images_are_started_than_there_are_slots():
    s = scheduler(batch_slope=0.1, max_batch=8, slots=3)
    s.admit([job() for _ in range(8)], 0.0)
    for _ in range(20):
        s.stepped(s.plan("gpu", 0.0).batch, 0.0)
        assert s.running() <= 3


def test_cancelled_images_leave_at_once_or_before_their_next_step():
    s = scheduler(slots=1)
    running, waiting = job(), job()
    s.admit([running, waiting], 0.0)
    s.stepped(s.plan("gpu", 0.0).batch, 0.0)
    assert s.cancel(waiting)
    assert not s.cancel(running)
    plan = s.plan("gpu", 1.0)
    assert plan.drop == (running,)
    assert plan.batch == ()
    assert running.steps_done == 1


def test_images_past_their_deadline_stop_waiting_or_running():
    s = scheduler(slots=1)
    running, waiting = job(deadline=5.0), job(deadline=10.0)
    s.admit([running, waiting], 0.0)
    s.plan("gpu", 0.0)
    assert s.expire(9.0) == []
    assert s.expire(11.0) == [waiting]
    assert s.plan("gpu", 11.0).drop == (running,)
    assert s.queued() == s.running() == 0


def test_two_devices_share_one_queue_and_never_one_image():
    s = Scheduler(costs(), Limits(slots=1), {"a": BOTH, "b": BOTH})
    jobs = [job() for _ in range(3)]
    s.admit(jobs, 0.0)
    first, second = s.plan("a", 0.0).batch, s.plan("b", 0.0).batch
    assert {*first, *second} == set(jobs[:2])


def test_a_device_gets_only_sizes_that_it_has():
    s = Scheduler(costs(), Limits(), {"small": frozenset({SMALL}), "both": BOTH})
    large = job(LARGE)
    s.admit([large], 0.0)
    assert s.plan("small", 0.0).batch == ()
    assert s.plan("both", 0.0).batch == (large,)


def test_a_lowered_batch_cap_holds():
    s = scheduler(batch_slope=0.1, max_batch=4, slots=4)
    s.cap_batch(SMALL, 2)
    s.admit([job() for _ in range(4)], 0.0)
    assert len(s.plan("gpu", 0.0).batch) == 2


class TestCosts:
    def test_the_running_estimate_follows_measurements(self):
        table = CostTable(smoothing=0.5)
        for seconds in (4.0, 1.0, 1.0, 1.0):
            table.observe("step", SMALL, seconds)
        assert table.step(SMALL) == pytest.approx(1.0)
        for _ in range(50):
            table.observe("step", SMALL, 1.5)
        assert table.step(SMALL) == pytest.approx(1.5, rel=0.01)

    def test_a_batch_never_measured_is_assumed_to_gain_nothing(self):
        table = CostTable()
        table.observe("step", SMALL, 2.0)
        assert table.step(SMALL, 3) == 6.0

    def test_an_unknown_size_is_scaled_by_area_from_the_nearest_known(self):
        table = CostTable()
        table.observe("finish", SMALL, 1.0)
        assert table.finish(LARGE) == 4.0
        assert CostTable().finish(LARGE) == 0.0
