"""Several decoders on the same devices, on a manual clock: they share devices, queue and limits, but no batch."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.size import Size
from server.errors import DeadlineTooShortError, QueueFullError
from server.scheduling.costs import PNG_FAST, CostKey, CostTable, Output
from server.scheduling.jobs import Job, Limits, Priority
from server.scheduling.scheduler import Scheduler

SIZE, LARGE = Size(2048, 2048), Size(4096, 4096)
FAST, SLOW, SLOW_LARGE = Output("fast", SIZE), Output("slow", SIZE), Output("slow", LARGE)
STEPS = {FAST: 1.0, SLOW: 10.0, SLOW_LARGE: 30.0}  # seconds
ALL = dict.fromkeys(STEPS, 1)  # with the maximum batch


def cost_table(batch_slope: float = 0.0) -> CostTable:
    """Return costs of steps; for a batch of b, 1 + (b − 1)·slope times as much."""
    table = CostTable()
    for (output, seconds), batch in itertools.product(STEPS.items(), (1, 2, 3, 4)):
        table.measure("step", output, seconds * (1 + (batch - 1) * batch_slope), batch)
    for output in STEPS:
        table.measure("encode", output, 0.0, encoding=PNG_FAST)
    return table


def scheduler(devices=None, **limits) -> Scheduler:
    defaults = {"queue_images": 1000, "queue_seconds": 1e9, "prediction_margin": 0, "aging": 1e9}
    return Scheduler(cost_table(), Limits(**{**defaults, **limits}), devices or {"gpu": ALL})


def job(output: Output, deadline: float = math.inf, priority=Priority.STANDARD, client: str = "") -> Job:
    return Job(output, (0, 1, 2, 3), priority, deadline, client, payload=None)


def step(s: Scheduler, now: float) -> tuple[float, tuple[Job, ...], list[Job]]:
    """Run one step; return the time at its end, its batch, and the jobs that finished."""
    batch = s.plan("gpu", now).batch
    now += s.costs.step(batch[0].output, len(batch))
    done = s.stepped(batch, now)
    for one in done:
        s.encoded(one)
    return now, batch, done


def test_messages_name_size_and_decoder():
    assert str(FAST) == "2048x2048 with fast"


class TestCosts:
    def test_an_unknown_size_is_derived_from_the_same_decoder_even_if_another_knows_it(self):
        table = CostTable()
        table.measure("step", Output("a", SIZE), 1.0)
        table.measure("step", Output("b", LARGE), 100.0)
        assert table.step(Output("a", LARGE)) == 4.0
        assert table.step(Output("b", SIZE), 2) == 50.0

    def test_a_decoder_without_measurements_costs_nothing_whatever_the_others_cost(self):
        table = CostTable()
        table.measure("finish", Output("a", SIZE), 1.0)
        table.measure("encode", Output("a", SIZE), 1.0, encoding=PNG_FAST)
        assert table.decode(Output("b", SIZE)) == 0.0

    def test_observations_of_one_decoder_do_not_change_another(self):
        table = cost_table()
        before = {key: seconds for key, seconds in table.table().items() if key.output != FAST}
        for number in range(50):
            table.observe("step", FAST, 5.0, float(number))
            table.observe("encode", FAST, 5.0, float(number), encoding=PNG_FAST)
        table.advance(51.0)
        after = table.table()
        assert table.step(FAST) > 4.0
        assert {key: after[key] for key in before} == before
        assert table.baseline.cost(CostKey("step", SLOW)) == 10.0


class TestBatches:
    def test_images_of_two_decoders_never_share_a_step_even_if_their_sizes_are_equal(self):
        s = scheduler({"gpu": dict.fromkeys(ALL, 4)}, slots=8)
        fast, slow = [job(FAST) for _ in range(2)], [job(SLOW) for _ in range(2)]
        for one in (fast[0], slow[0], fast[1], slow[1]):
            s.admit([one], 0.0)
        now, first, done = step(s, 0.0)
        while len(done) < 2:
            now, batch, more = step(s, now)
            done += more
            assert batch == first
        assert set(first) == set(fast)
        assert set(s.plan("gpu", now).batch) == set(slow)

    def test_each_decoder_has_its_own_maximum_batch(self):
        for output, most in ((FAST, 3), (SLOW, 2), (SLOW_LARGE, 1)):
            s = scheduler({"gpu": {FAST: 3, SLOW: 2, SLOW_LARGE: 1}}, slots=8)
            s.admit([job(output) for _ in range(4)], 0.0)
            assert len(s.plan("gpu", 0.0).batch) == most

    def test_each_device_has_its_own_maximum_batch(self):
        s = scheduler({"small": {FAST: 1}, "big": {FAST: 4}}, slots=8)
        s.admit([job(FAST) for _ in range(8)], 0.0)
        assert [len(s.plan(device, 0.0).batch) for device in ("small", "big")] == [1, 4]

    def test_a_batch_that_did_not_fit_limits_its_decoder_only(self):
        s = scheduler({"gpu": dict.fromkeys(ALL, 4)}, slots=8)
        s.cap_batch(FAST, 2, 0.0)
        s.admit([job(SLOW) for _ in range(4)], 0.0)
        assert len(s.plan("gpu", 0.0).batch) == 4

    def test_a_lower_cap_than_the_last_one_holds_and_a_higher_one_does_not(self):
        for caps in ((3, 2), (2, 3)):
            s = scheduler({"gpu": dict.fromkeys(ALL, 4)}, slots=8)
            for cap in caps:
                s.cap_batch(FAST, cap, 0.0)
            s.admit([job(FAST) for _ in range(4)], 0.0)
            assert len(s.plan("gpu", 0.0).batch) == 2


class TestSharedDevice:
    def test_an_urgent_image_preempts_one_of_another_decoder_at_the_end_of_its_step(self):
        s = scheduler(slots=2)
        slow, urgent = job(SLOW_LARGE), job(FAST, 50.0, Priority.INTERACTIVE)
        s.admit([slow], 0.0)
        assert s.plan("gpu", 0.0).batch == (slow,)
        s.admit([urgent], 1.0)
        assert s.busy_until("gpu") == 30.0, "the step that is running is completed"
        s.stepped([slow], 30.0)
        now, order = 30.0, []
        for _ in range(5):
            now, batch, _ = step(s, now)
            order += batch
        assert order == [*4 * [urgent], slow]
        assert now == 64.0

    def test_an_urgent_image_does_not_preempt_one_of_another_decoder_that_has_no_time_left(self):
        s = scheduler(slots=2)
        slow, urgent = job(SLOW_LARGE, 120.5), job(FAST, 200.0, Priority.INTERACTIVE)
        s.admit([slow], 0.0)
        now, _, _ = step(s, 0.0)
        s.admit([urgent], now)
        with pytest.raises(QueueFullError, match="deadline would be missed"):
            s.admit([job(FAST, 40.0, Priority.INTERACTIVE)], now)
        while slow.steps_left:
            now, batch, _ = step(s, now)
            assert batch == (slow,)
        assert now == 120.0

    def test_the_images_of_all_decoders_share_the_slots_of_a_device(self):
        s = scheduler(slots=2)
        paused, running = job(SLOW), job(SLOW_LARGE, priority=Priority.INTERACTIVE)
        s.admit([paused], 0.0)
        now, _, _ = step(s, 0.0)
        s.admit([running], now)
        now, batch, _ = step(s, now)
        assert batch == (running,)
        urgent = job(FAST, priority=Priority.INTERACTIVE, client="another")  # whose turn is first
        s.admit([urgent], now)
        assert urgent not in s.plan("gpu", now).batch
        assert s.running() == 2

    def test_an_image_runs_on_a_device_with_its_decoder(self):
        s = scheduler({"a": {FAST: 1}, "b": {SLOW: 1}})
        fast, slow = job(FAST), job(SLOW)
        s.admit([slow], 0.0)
        s.admit([fast], 0.0)
        assert s.plan("a", 0.0).batch == (fast,)
        assert s.plan("b", 0.0).batch == (slow,)

    def test_a_plan_drops_images_of_several_decoders(self):
        s = scheduler(slots=2)
        paused, running = job(SLOW), job(FAST, priority=Priority.INTERACTIVE)
        s.admit([paused], 0.0)
        now, _, _ = step(s, 0.0)
        s.admit([running], now)
        now, _, _ = step(s, now)
        for one in (paused, running):
            s.cancel(one)
        plan = s.plan("gpu", now)
        assert (plan.drop, plan.batch) == ((paused, running), ())


class TestAdmission:
    def test_large_images_of_one_decoder_without_slack_reject_an_urgent_one_of_another(self):
        s = scheduler()
        for number in range(1, 4):
            s.admit([job(SLOW_LARGE, 120.0 * number)], 0.0)
        with pytest.raises(QueueFullError, match="deadline would be missed") as rejected:
            s.admit([job(FAST, 10.0)], 0.0)
        assert rejected.value.retry_after == pytest.approx(4.0), "it would make all three late by 4 s"
        with pytest.raises(QueueFullError):
            s.admit([job(FAST, 363.0)], 0.0)
        s.admit([job(FAST, 364.0)], 0.0)

    def test_large_images_of_one_decoder_with_slack_accept_an_urgent_one_of_another(self):
        s = scheduler()
        for number in range(1, 4):
            s.admit([job(SLOW_LARGE, 120.0 * number + 10)], 0.0)
        s.plan("gpu", 0.0)
        with pytest.raises(QueueFullError):
            s.admit([job(FAST, 33.0)], 0.0)  # after the step that has begun
        s.admit([job(FAST, 34.0)], 0.0)

    def test_a_deadline_that_suffices_for_one_decoder_only(self):
        s = scheduler()
        with pytest.raises(DeadlineTooShortError, match="at least 40000 ms"):
            s.admit([job(SLOW, 39.0)], 0.0)
        s.admit([job(FAST, 4.0)], 0.0)


class TestFairShares:
    def test_a_starved_decoder_gets_an_equal_share(self):
        """Room for an image of the fast decoder appears ten times as often as room for one of the slow decoder."""
        s, now, finished, messages = scheduler(), 0.0, [], set()
        rejected = {FAST: 0, SLOW: 0}
        for _ in range(400):
            for output in (FAST, FAST, SLOW):
                try:
                    s.admit([job(output, now + 120)], now)
                except QueueFullError as error:
                    rejected[output] += 1
                    messages.add(str(error))
            now, _, done = step(s, now)
            finished += done
        seconds = {output: sum(4 * STEPS[output] for one in finished if one.output == output) for output in rejected}
        assert all(rejected.values())
        assert 0.5 < seconds[FAST] / seconds[SLOW] < 2
        expected = "Requests for 2048x2048 with fast already use their share of the time until this deadline"
        assert any(message.startswith(expected) for message in messages)

    def test_the_device_time_of_a_client_counts_whichever_decoder_used_it(self):
        s = scheduler(slots=1)
        s.admit([job(SLOW, client="busy")], 0.0)
        s.admit([job(FAST, client="other")], 0.0)
        now, done = 0.0, []
        while len(done) < 2:
            now, _, more = step(s, now)
            done += more
        for client in ("busy", "other"):
            s.admit([job(FAST, client=client)], now)
        (first,) = s.plan("gpu", now).batch
        assert first.client == "other"


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([FAST, SLOW, SLOW_LARGE]),
        st.sampled_from([1.1, 2.0, 5.0, 20.0]),  # deadline as a multiple of the decode
        st.sampled_from(list(Priority)),
        st.sampled_from(["x", "y"]),
        st.integers(0, 3),  # steps that run before the next request
    ),
    min_size=1,
    max_size=12,
)


@given(REQUESTS, st.integers(1, 3), st.sampled_from([0.2, 1.0]))
@settings(deadline=None, max_examples=200)
def test_two_decoders_are_scheduled_like_two_sizes_of_one(requests, slots, batch_slope):
    """Only costs count: with the same costs, decisions are the same if the outputs are three sizes of one decoder."""

    def events(outputs: dict[Output, Output]) -> list[object]:
        table, seen, now = CostTable(), [], 0.0
        for key, seconds in cost_table(batch_slope).table().items():
            if key.output is not None:
                table.measure(key.stage, outputs[key.output], seconds, key.batch, key.encoding)
        limits = Limits(slots=slots, queue_seconds=400.0, shares=(0.8, 0.9, 0.5))
        s = Scheduler(table, limits, {"gpu": dict.fromkeys(outputs.values(), 2)})
        names: dict[Job, int] = {}
        for number, (output, factor, priority, client, steps) in enumerate(requests):
            one = job(outputs[output], now + factor * 4 * STEPS[output], priority, client)
            names[one] = number
            try:
                s.admit([one], now)
                seen.append("accepted")
            except (QueueFullError, DeadlineTooShortError) as error:
                seen.append(type(error))
            for _ in range(steps):
                s.expire(now)
                if s.queued() or s.running():
                    now, batch, _ = step(s, now)
                    seen.append((now, [names[member] for member in batch]))
        return seen

    sizes = {FAST: SIZE, SLOW: Size(4096, 2048), SLOW_LARGE: LARGE}
    assert events({output: output for output in ALL}) == events({x: Output("one", size) for x, size in sizes.items()})
