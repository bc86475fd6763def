"""Images that wait for a prompt: the order of the text encoder, and the forecast."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.size import Size
from server.errors import DeadlineTooShortError, QueueFullError
from server.scheduling.costs import CostTable, Output
from server.scheduling.jobs import Job, JobState, Limits, Priority
from server.scheduling.prompts import PromptBatch, encoded_at, next_batch
from server.scheduling.scheduler import Scheduler
from server.scheduling.timeline import Timeline

SIZE = Output("flux", Size(64, 64))
DECODE = 5.0  # seconds
STEP = 1.5  # seconds of a step and of the conditioning before it


def costs(*captions: float) -> CostTable:
    """Return the costs of one prompt, two, and so on; a decode takes `DECODE` seconds."""
    table = CostTable()
    for batch, seconds in enumerate(captions, 1):
        table.measure("caption", None, seconds, batch)
    for stage, seconds in (("condition", 0.5), ("step", 1.0), ("finish", 0.5), ("encode", 0.0)):
        table.measure(stage, SIZE, seconds, encoding="png-fast" if stage == "encode" else "")  # type: ignore[arg-type]
    return table


def make(prompt: str | None = None, deadline: float = 1000.0, **changes: object) -> Job[str]:
    return Job(SIZE, (0, 1, 2, 3), deadline=deadline, prompt=prompt, payload="", **changes)  # type: ignore[arg-type]


def scheduler(*captions: float, max_prompts: int = 1, slots: int = 2) -> Scheduler[str]:
    limits = Limits(slots=slots, max_prompts=max_prompts, prediction_margin=0.0)
    return Scheduler(costs(*captions), limits, {"device": {SIZE: 1}})


def run(scheduler: Scheduler[str], now: float) -> list[Job[str]]:
    """Run the device's next step; return its batch."""
    plan = scheduler.plan("device", now)
    scheduler.stepped(plan.batch, now)
    return list(plan.batch)


class TestBatches:
    @pytest.mark.parametrize(
        ("captions", "expected"),
        [
            ((1.0,), 1),  # not measured: assumed not to help
            ((1.0, 1.2, 1.4), 3),
            ((1.0, 1.2, 3.0), 2),
            ((1.0, 2.0, 3.0), 1),
        ],
    )
    def test_a_batch_is_as_large_as_it_is_faster_than_single_prompts(self, captions, expected):
        assert next_batch("abc", costs(*captions), Limits(max_prompts=3)) == tuple("abc")[:expected]

    def test_the_limit_of_a_batch_holds(self):
        assert next_batch("abc", costs(1.0, 1.1, 1.2), Limits(max_prompts=2)) == ("a", "b")

    def test_the_times_add_up_after_the_batch_that_is_running(self):
        jobs = [make(prompt) for prompt in "abcd"]
        running = PromptBatch(("a",), 3.0)
        times = encoded_at(2.0, jobs, running, costs(1.0, 1.5), Limits(max_prompts=2))
        assert times == {"a": 3.0, "b": 4.5, "c": 4.5, "d": 5.5}

    def test_a_batch_that_is_overdue_ends_now(self):
        assert encoded_at(9.0, [make("a")], PromptBatch(("a",), 3.0), costs(1.0), Limits()) == {"a": 9.0}


class TestScheduler:
    def test_the_most_urgent_prompt_is_encoded_first(self):
        subject = scheduler(1.0)
        subject.admit([make("later", 50.0)], 0.0)
        subject.admit([make("sooner", 40.0)], 0.0)
        assert subject.plan_prompts(0.0) == ("sooner",)
        assert subject.waiting_prompts() == 1

    def test_an_image_starts_only_after_its_prompt_is_encoded(self):
        subject = scheduler(1.0)
        waiting, ready = make("a", 40.0), make(None, 50.0)
        subject.admit([waiting], 0.0)
        subject.admit([ready], 0.0)
        assert subject.plan_prompts(0.0) == ("a",)
        assert run(subject, 0.0) == [ready]
        assert subject.encoded_prompts({"a"}) == {waiting: "a"}
        assert run(subject, 1.0) == [waiting], "the more urgent image preempts the other one"

    def test_a_cancelled_image_needs_no_prompt(self):
        subject = scheduler(1.0)
        job = make("a")
        subject.admit([job], 0.0)
        subject.cancel(job)
        assert subject.plan_prompts(0.0) == ()
        assert job.state is JobState.ENDED

    def test_a_prompt_that_is_being_encoded_is_not_encoded_again(self):
        subject = scheduler(1.0)
        subject.admit([make("a")], 0.0)
        assert subject.plan_prompts(0.0) == ("a",)
        subject.admit([make("a")], 0.5)
        assert subject.waiting_prompts() == 0
        assert len(subject.encoded_prompts({"a"})) == 2
        assert subject.plan_prompts(1.0) == ()


class TestForecast:
    def test_a_miss_costs_its_encoding_and_a_hit_nothing(self):
        subject = scheduler(3.0)
        miss = make("a")
        subject.admit([miss], 0.0)
        assert subject.ends(0.0)[miss] == pytest.approx(3.0 + STEP + DECODE), "a step of another image may be running"
        hit = make()
        subject = scheduler(3.0)
        subject.admit([hit], 0.0)
        assert subject.ends(0.0)[hit] == pytest.approx(DECODE)

    def test_equal_prompts_cost_one_encoding(self):
        subject = scheduler(3.0)
        jobs = [make("a"), make("a")]
        subject.admit(jobs, 0.0)
        assert max(subject.ends(0.0).values()) == pytest.approx(3.0 + STEP + 2 * DECODE)

    def test_a_deadline_that_only_a_hit_meets_is_rejected_for_a_miss(self):
        subject = scheduler(3.0)
        with pytest.raises(DeadlineTooShortError, match="allow at least 9500 ms"):
            subject.admit([make("a", DECODE + 1)], 0.0)
        subject.admit([make(None, DECODE + 1)], 0.0)

    def test_prompts_ahead_of_a_request_count(self):
        subject = scheduler(3.0)
        subject.admit([make("a", 9.5)], 0.0)
        subject.plan_prompts(0.0)
        with pytest.raises(QueueFullError):  # the text encoder is free at 3.0, the device at 9.5
            subject.admit([make("b", 10.0)], 0.0)
        subject.admit([make("b", 14.5)], 0.0)

    def test_less_urgent_images_that_arrive_later_do_not_change_the_forecast(self):
        subject = scheduler(3.0)
        miss = make("a", 40.0)
        subject.admit([miss], 0.0)
        before = subject.ends(0.0)[miss]
        subject.admit([make(None, 50.0)], 0.0)
        subject.admit([make("b", 50.0)], 0.0)
        assert subject.ends(0.0)[miss] == before

    def test_a_slot_is_kept_for_an_image_that_waits(self):
        subject = scheduler(3.0)
        miss, first = make("a", 40.0), make(None, 50.0)
        urgent = make(None, 50.0, priority=Priority.INTERACTIVE)
        subject.admit([miss], 0.0)
        subject.admit([first], 0.0)
        assert run(subject, 0.0) == [first]
        subject.admit([urgent], 0.5)
        assert run(subject, 1.0) == [first], "the urgent image would use the last slot"

    def test_a_prompt_is_no_reason_to_admit_a_request_that_would_be_rejected_without_one(self):
        """With a share below 1, a request may wait for a part of its time only; its prompt counts as waiting."""
        limits = Limits(max_prompts=1, prediction_margin=0.0, shares=(1.0, 0.5, 0.5))
        subject = Scheduler(costs(3.0), limits, {"device": {SIZE: 1}})
        for _ in range(3):
            subject.admit([make(None, 29.0)], 0.0)
        deadline = 30.0  # a decode may wait until 0.5 * (30 + 5) = 17.5, and would end at 20
        for prompt in (None, "a"):
            with pytest.raises(QueueFullError, match=r"may wait 12\.50 s; it would wait 15\.00 s"):
                subject.admit([make(prompt, deadline)], 0.0)
        idle = Scheduler(costs(30.0), limits, {"device": {SIZE: 1}})
        idle.admit([make("a", 40.0)], 0.0)  # nothing else is to be done

    def test_a_busy_text_encoder_does_not_delay_images_without_a_prompt(self):
        subject = scheduler(100.0)
        subject.admit([make("a")], 0.0)
        subject.plan_prompts(0.0)
        ready = make(None, 2 * DECODE)
        subject.admit([ready], 0.0)
        assert subject.ends(0.0)[ready] <= 2 * DECODE

    def test_a_request_may_wait_for_an_idle_text_encoder_only(self):
        """The rule that admits a request to an idle device although its estimate is too high."""
        subject = scheduler(1.0)
        abandoned = make("a")
        subject.admit([abandoned], 0.0)
        subject.plan_prompts(0.0)
        subject.cancel(abandoned)
        with pytest.raises(QueueFullError):
            subject.admit([make("b", 1.0 + STEP + DECODE)], 0.0)  # the text encoder is busy until 1.0


class TestTimeline:
    def test_work_that_can_start_later_leaves_its_time_to_others(self):
        timeline = Timeline(0.0)
        assert timeline.add(4.0, 2.0) == 6.0
        assert timeline.add(0.0, 3.0) == 3.0
        assert timeline.add(0.0, 2.0) == 7.0, "one second before the first image, and one after it"

    def test_nothing_starts_before_the_device_is_free(self):
        assert Timeline(2.0).add(1.0, 1.0) == 3.0

    @given(st.floats(0, 10), st.lists(st.tuples(st.floats(0, 20), st.floats(0.01, 5)), min_size=1, max_size=12))
    def test_no_image_is_faster_than_its_work_and_the_device_does_one_thing_at_a_time(self, free, images):
        timeline = Timeline(free)
        ends = [timeline.add(start, seconds) for start, seconds in images]
        for (start, seconds), end in zip(images, ends, strict=True):
            assert end >= max(start, free) + seconds - 1e-9
        # All work fits between the first start and the last end.
        first = max(free, min(start for start, _ in images))
        assert max(ends) >= first + sum(seconds for _, seconds in images) - 1e-6 or any(
            start > first for start, _ in images
        )
        if all(start <= free for start, _ in images):
            assert ends == pytest.approx([free + sum(s for _, s in images[: n + 1]) for n in range(len(images))])
