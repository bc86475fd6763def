"""Previews in forecasts: they cost what was measured, and nothing for requests without them."""

from __future__ import annotations

import math

import pytest

from engines.size import Size
from server.errors import DeadlineTooShortError, QueueFullError
from server.scheduling.costs import PNG_FAST, PREVIEW, CostTable, Output
from server.scheduling.jobs import Job, Limits
from server.scheduling.scheduler import Scheduler

SIZE = Output("flux", Size(2048, 2048))
SECONDS = 4 * 1.0 + 0.25  # of a decode without previews, and its encoding
PREVIEWS = 4 * (0.1 + 0.02)  # on the device, and on one encoder thread


@pytest.fixture
def scheduler() -> Scheduler:
    table = CostTable()
    table.measure("condition", SIZE, 0.0)
    table.measure("finish", SIZE, 0.0)
    table.measure("preview", SIZE, 0.1)
    for batch in (1, 2):
        table.measure("step", SIZE, 1.0 + 0.2 * (batch - 1), batch)
    table.measure("encode", SIZE, 0.25, encoding=PNG_FAST)
    table.measure("encode", SIZE, 0.02, encoding=PREVIEW)
    limits = Limits(queue_seconds=1e9, prediction_margin=0, slots=3)
    return Scheduler(table, limits, {"gpu": {SIZE: 2}})


def job(deadline: float = math.inf, previews: bool = False) -> Job:
    return Job(SIZE, (0, 1, 2, 3), deadline=deadline, previews=previews, payload=None)


@pytest.mark.parametrize(("previews", "seconds"), [(False, SECONDS), (True, SECONDS + PREVIEWS)])
def test_an_idle_server_accepts_the_deadline_that_it_can_meet(scheduler: Scheduler, previews: bool, seconds: float):
    with pytest.raises(DeadlineTooShortError):
        scheduler.admit([job(seconds - 0.001, previews)], 0.0)
    one = job(seconds + 0.001, previews)
    scheduler.admit([one], 0.0)
    assert scheduler.ends(0.0)[one] == pytest.approx(seconds)


@pytest.mark.parametrize(("previews", "backlog"), [(False, 4.0), (True, 4.4)])
def test_the_backlog_includes_the_previews_on_the_device(scheduler: Scheduler, previews: bool, backlog: float):
    scheduler.admit([job(previews=previews)], 0.0)
    assert scheduler.backlog() == pytest.approx(backlog)


def test_a_request_waits_for_the_previews_of_those_before_it(scheduler: Scheduler):
    scheduler.admit([job(deadline=SECONDS + PREVIEWS, previews=True)], 0.0)
    scheduler.plan("gpu", 0.0)
    with pytest.raises(QueueFullError):
        scheduler.admit([job(deadline=8.3)], 0.0)
    scheduler.admit([job(deadline=4.4 + SECONDS + 0.01)], 0.0)


def test_a_step_includes_the_previews_of_its_batch(scheduler: Scheduler):
    for previews in (True, False):
        scheduler.admit([job(previews=previews)], 0.0)
    assert len(scheduler.plan("gpu", 0.0).batch) == 2
    assert scheduler.busy_until("gpu") == pytest.approx(1.2 + 0.1)


def test_previews_count_in_the_share_of_their_client(scheduler: Scheduler):
    greedy, modest = (
        Job(SIZE, (0,), client=name, previews=name == "greedy", payload=None) for name in ("greedy", "modest")
    )
    for job in (greedy, modest):
        scheduler.admit([job], 0.0)
    now = 0.0
    while (plan := scheduler.plan("gpu", now)).batch:
        now = scheduler.busy_until("gpu")
        for job in scheduler.stepped(plan.batch, now):
            scheduler.encoded(job)
    more = [Job(SIZE, (0,), client=name, payload=None) for name in ("greedy", "modest")]
    for job in more:
        scheduler.admit([job], now)
    scheduler.cap_batch(SIZE, 1, now)
    assert scheduler.plan("gpu", now).batch == (more[1],)
