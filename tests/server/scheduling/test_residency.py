"""Decoders of which only some have their weights on a device at a time, on a manual clock."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.size import Size
from server.errors import DeadlineTooShortError, QueueFullError
from server.scheduling.costs import PNG_FAST, CostKey, CostTable, Loaded, Output
from server.scheduling.jobs import Job, Limits, Priority
from server.scheduling.residency import KEEP_FACTOR, use
from server.scheduling.scheduler import Scheduler

SIZE = Size(2048, 2048)
A, B, C = (Output(name, SIZE) for name in "abc")
STEP, RESTORE = 1.0, 3.0  # seconds
RELAXED = {"queue_images": 1000, "queue_seconds": 1e9, "prediction_margin": 0, "aging": 1e9}


def scheduler(resident: int | None = 1, outputs=(A, B, C), devices=("gpu",), **limits) -> Scheduler:
    costs = CostTable()
    for output in outputs:
        costs.measure("step", output, STEP)
        costs.measure("encode", output, 0.0, encoding=PNG_FAST)
        costs.measure("restore", output.loaded, RESTORE)
    able = {device: dict.fromkeys(outputs, 1) for device in devices}
    return Scheduler(costs, Limits(resident=resident, **{**RELAXED, **limits}), able)


def job(output: Output, deadline: float = math.inf, client: str = "", steps: int = 4, **fields: Any) -> Job:
    return Job(output, tuple(range(steps)), deadline=deadline, client=client, payload=None, **fields)


def run(s: Scheduler, jobs: int, now: float = 0.0) -> tuple[list[Job], list[Loaded], dict[Job, float]]:
    """Run until that many jobs are finished; return them in order, the decoders restored, and when each job ended."""
    done: list[Job] = []
    restored: list[Loaded] = []
    ends: dict[Job, float] = {}
    while len(done) < jobs:
        plan = s.plan("gpu", now)
        if plan.restore is not None:
            restored.append(plan.restore)
            now += RESTORE
        now += STEP
        for one in s.stepped(plan.batch, now):
            s.encoded(one)
            done.append(one)
            ends[one] = now
    return done, restored, ends


class TestUse:
    def test_the_least_recently_used_decoder_makes_room(self):
        resident: list[Loaded] = []
        restored = [use(resident, output.loaded, 2) for output in (A, B, A, C, A, B)]
        assert restored == [True, True, False, True, False, True]
        assert resident == [A.loaded, B.loaded]

    @given(st.lists(st.sampled_from([A.loaded, B.loaded, C.loaded])), st.integers(1, 3))
    def test_the_last_used_ones_are_resident(self, used, limit):
        resident: list[Loaded] = []
        for loaded in used:
            before = list(resident)
            assert use(resident, loaded, limit) is (loaded not in before)
        assert resident == [*dict.fromkeys(reversed(used))][:limit][::-1]


class TestPlans:
    def test_without_a_limit_no_weights_move(self):
        s = scheduler(resident=None)
        s.admit([job(A)], 0.0)
        s.admit([job(B)], 0.0)
        _, restored, _ = run(s, 2)
        assert restored == []

    def test_weights_are_moved_before_the_first_step_and_not_again(self):
        s = scheduler()
        s.admit([job(A)], 0.0)
        s.admit([job(A)], 0.0)
        _, restored, ends = run(s, 2)
        assert restored == [A.loaded]
        assert list(ends.values()) == [RESTORE + 4, RESTORE + 8]

    def test_a_plan_says_whose_weights_have_to_leave(self):
        s = scheduler(resident=2)
        for output in (A, B, C):
            s.admit([job(output, steps=1)], 0.0)
        plans, now = [], 0.0
        for _ in range(3):
            plans.append(s.plan("gpu", now))
            now += RESTORE + STEP
            s.stepped(plans[-1].batch, now)
        assert [plan.restore for plan in plans] == [A.loaded, B.loaded, C.loaded]
        assert [plan.offload for plan in plans] == [(), (), (A.loaded,)]

    def test_the_predicted_end_of_a_plan_includes_the_restore(self):
        s = scheduler()
        s.admit([job(A)], 0.0)
        s.plan("gpu", 10.0)
        assert s.busy_until("gpu") == 10.0 + RESTORE + STEP

    def test_weights_that_could_not_be_moved_are_moved_by_the_next_plan(self):
        s = scheduler()
        s.admit([job(A)], 0.0)
        s.admit([job(A)], 0.0)
        plan = s.plan("gpu", 0.0)
        s.offloaded("gpu", A.loaded)
        s.fail(plan.batch[0])
        assert s.plan("gpu", 1.0).restore == A.loaded

    def test_an_unloaded_decoder_leaves_its_place_to_the_others(self):
        s = scheduler(resident=2)
        for output in (A, B):
            s.admit([job(output)], 0.0)
        run(s, 2)
        s.retire(A.loaded)
        assert s.plan("gpu", 20.0).unload == (A.loaded,)
        s.admit([job(C)], 20.0)
        plan = s.plan("gpu", 20.0)
        assert (plan.restore, plan.offload) == (C.loaded, ())


class TestOrder:
    def test_images_whose_weights_are_there_come_first_for_a_while(self):
        """Without this, alternating arrivals would move weights for each image."""
        s = scheduler()
        for output in (A, B) * 12:
            s.admit([job(output)], 0.0)
        _, restored, _ = run(s, 24)
        alternating = 24
        assert len(restored) <= 2 + alternating * 4 * STEP / (KEEP_FACTOR * RESTORE)

    def test_they_come_first_even_if_others_are_more_urgent(self):
        s = scheduler()
        for _ in range(3):
            s.admit([job(A)], 0.0)
        s.stepped(s.plan("gpu", 0.0).batch, now := RESTORE + STEP)
        s.admit([job(B, priority=Priority.INTERACTIVE)], now)
        assert s.plan("gpu", now).batch[0].output == A
        now += KEEP_FACTOR * RESTORE
        assert s.plan("gpu", now).batch[0].output == B

    def test_the_others_wait_no_longer_than_that(self):
        s = scheduler()
        for _ in range(12):
            s.admit([job(A)], 0.0)
        s.admit([waiting := job(B, client="other")], 0.0)
        _, _, ends = run(s, 13)
        kept = RESTORE + KEEP_FACTOR * RESTORE
        image = 4 * STEP
        assert ends[waiting] <= kept + STEP + RESTORE + image

    def test_a_deadline_is_met_even_if_it_needs_other_weights(self):
        s = scheduler()
        for _ in range(12):
            s.admit([job(A)], 0.0)
        deadline = RESTORE + STEP + RESTORE + 4 * STEP
        now = 0.0
        plan = s.plan("gpu", now)
        s.admit([urgent := job(B, deadline=deadline)], now)
        now += RESTORE + STEP
        s.stepped(plan.batch, now)
        _, restored, ends = run(s, 13, now)
        assert restored[0] == B.loaded
        assert ends[urgent] <= deadline


class TestTwoDevices:
    def test_an_image_runs_on_the_idle_device_that_has_its_weights(self):
        s = scheduler(devices=("gpu", "other"))
        now, restores = 0.0, 0
        for output in (A, B) * 10:
            s.admit([one := job(output, steps=1)], now)
            plans = [s.plan(device, now) for device in ("gpu", "other")]
            (batch,) = [plan.batch for plan in plans if plan.batch]
            restores += sum(plan.restore is not None for plan in plans)
            now += RESTORE + STEP
            for done in s.stepped(batch, now):
                s.encoded(done)
            assert one.steps_left == 0
        assert restores == 2

    def test_an_image_does_not_wait_for_a_busy_device_that_has_its_weights(self):
        s = scheduler(devices=("gpu", "other"))
        s.admit([job(A)], 0.0)
        assert s.plan("gpu", 0.0).restore == A.loaded
        s.admit([job(A)], 1.0)
        assert s.plan("other", 1.0).restore == A.loaded


class TestAdmission:
    def test_a_deadline_that_leaves_no_time_for_the_weights_is_rejected_while_they_are_in_host_memory(self):
        s = scheduler()
        with pytest.raises(QueueFullError, match=r"missed by 0\.50 s; retry later"):
            s.admit([job(A, deadline=RESTORE + 4 * STEP - 0.5)], 0.0)
        s.admit([job(A, deadline=RESTORE + 4 * STEP)], 0.0)
        _, _, ends = run(s, 1)
        now = max(ends.values())
        s.admit([job(A, deadline=now + 4 * STEP)], now)
        with pytest.raises(DeadlineTooShortError):
            s.admit([job(A, deadline=now + 4 * STEP - 0.5)], now)

    def test_an_image_with_a_prompt_needs_no_more_time_than_its_weights_and_the_decode(self):
        s = scheduler()
        s.costs.measure("caption", None, 0.1)
        s.admit([Job(A, (0, 1, 2, 3), deadline=0.1 + STEP + RESTORE + 4 * STEP, prompt="a cat", payload=None)], 0.0)

    def test_moving_the_weights_back_and_forth_counts(self):
        """b runs from 5 to 12, and a then needs its weights again for its last two steps: until 12 + 3 + 2 = 17."""
        for deadline, accepted in ((16.9, False), (17.1, True)):
            s = scheduler()
            s.admit([job(A, deadline=deadline)], 0.0)
            s.stepped(s.plan("gpu", 0.0).batch, 4.0)
            s.plan("gpu", 4.0)
            with pytest.raises(QueueFullError) if not accepted else contextlib.nullcontext():
                s.admit([job(B, deadline=13.5)], 4.0)

    def test_a_lower_observed_time_counts_from_then_on(self):
        s = scheduler()
        for number in range(200):
            s.costs.observe("restore", A.loaded, 1.0, float(number))
        assert s.costs.restore(A.loaded) == pytest.approx(1.0, abs=0.01)
        assert s.costs.restore(B.loaded) == RESTORE


def test_the_cost_of_moving_weights_belongs_to_a_decoder_and_has_no_size():
    s = scheduler()
    key = CostKey("restore", A.loaded)
    assert s.costs.table()[key] == RESTORE
    assert (key.loaded, key.output) == (A.loaded, None)
    s.costs.inherit(A.loaded, A.loaded._replace(version=1))
    s.costs.forget(A.loaded)
    assert s.costs.restore(A.loaded) == 0.0
    assert s.costs.restore(B.loaded) == RESTORE
