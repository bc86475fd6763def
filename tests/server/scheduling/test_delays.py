"""A step took longer than predicted: a job needs a part of its margin, or misses its deadline anyway."""

from __future__ import annotations

import pytest

from server.errors import QueueFullError
from server.scheduling.jobs import Job, Priority
from server.scheduling.scheduler import Scheduler
from tests.server.scheduling.test_scheduler import LARGE, job, scheduler

MARGIN = 0.1


def delayed(jobs: list[Job], now: float) -> Scheduler:
    """Return a scheduler whose first step, of 10 s, took until `now`."""
    s = scheduler(slots=2, prediction_margin=MARGIN, aging=1000)
    for one in jobs:
        s.admit([one], 0.0)
    s.stepped(s.plan("gpu", 0.0).batch, now)
    return s


def urgent(deadline: float) -> Job:
    return job(deadline=deadline, priority=Priority.INTERACTIVE)


class TestAJobThatNeedsItsMargin:
    """It ends at 43 s, in 30 s, and has 2 s left."""

    @pytest.fixture
    def slow(self) -> Job:
        return job(LARGE, deadline=45)

    def test_is_not_overtaken(self, slow: Job):
        s = delayed([slow], 13.0)
        s.admit([urgent(1000)], 13.0)
        assert s.plan("gpu", 13.0).batch == (slow,)

    @pytest.mark.parametrize("now", [13.0, 16.0, 20.0])
    def test_is_not_delayed_by_jobs_that_arrive_later(self, slow: Job, now: float):
        s = delayed([slow], 13.0)
        s.plan("gpu", 13.0)
        with pytest.raises(QueueFullError, match="deadline would be missed"):
            s.admit([urgent(40)], now)


class TestAJobThatIsLateAnyway:
    """The first one ends at 55 s, and the second one at 95 s, after its deadline."""

    @pytest.fixture
    def s(self) -> Scheduler:
        return delayed([job(LARGE, deadline=60), job(LARGE, deadline=90)], 25.0)

    def test_is_overtaken(self, s: Scheduler):
        one = urgent(1000)
        s.admit([one], 25.0)
        assert s.plan("gpu", 25.0).batch == (one,)

    def test_does_not_increase_the_time_until_a_retry(self, s: Scheduler):
        with pytest.raises(QueueFullError) as rejected:
            s.admit([urgent(50)], 25.0)
        assert rejected.value.retry_after == pytest.approx(25 + (1 + MARGIN) * 34 - 60)  # for the first job
