"""Fair shares of clients and classes, on a manual clock with given costs and one imaginary device."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.size import Size
from server.errors import ClientShareError, QueueFullError
from server.scheduling.clients import MAX_CLIENTS, Clients
from server.scheduling.costs import PNG_FAST, CostTable, Output
from server.scheduling.jobs import Job, Limits, Priority
from server.scheduling.scheduler import Scheduler

SIZE, LARGE = Output("flux", Size(2048, 2048)), Output("flux", Size(4096, 4096))
SECONDS = {SIZE: 4.0, LARGE: 40.0}  # device time of an image
GREEDY, SMALL = "greedy", "small"


def scheduler(**limits) -> Scheduler:
    table = CostTable()
    for size, seconds in SECONDS.items():
        table.measure("step", size, seconds / 4)
        table.measure("encode", size, 0.0, encoding=PNG_FAST)
    defaults = {"queue_images": 1000, "queue_seconds": 1e9, "prediction_margin": 0, "default_deadline": 1e9}
    return Scheduler(table, Limits(**{**defaults, **limits}), {"gpu": dict.fromkeys(SECONDS, 1)})


def job(client="", deadline=math.inf, priority=Priority.STANDARD, size=SIZE) -> Job:
    return Job(size, (0, 1, 2, 3), priority, deadline, client, payload=None)


def fill(s: Scheduler, make: Callable[[], Job], now: float = 0.0) -> int:
    """Admit jobs until one is rejected; return their number."""
    for count in itertools.count():
        try:
            s.admit([make()], now)
        except QueueFullError:
            return count
    raise AssertionError


def step(s: Scheduler, now: float) -> tuple[float, list[Job]]:
    """Run one step; return the time at its end and the jobs that finished."""
    batch = s.plan("gpu", now).batch
    now += s.costs.step(batch[0].output, len(batch))
    return now, s.stepped(batch, now)


class TestQueue:
    def test_a_single_client_may_use_the_whole_queue(self):
        s = scheduler(queue_images=10)
        assert fill(s, lambda: job(GREEDY)) == 10

    def test_a_client_leaves_room_for_each_other_active_one(self):
        s = scheduler(queue_images=12)
        for client in "ab":
            s.admit([job(client)], 0.0)
        assert fill(s, lambda: job(GREEDY)) == 5  # 7 are used, and 5 free
        with pytest.raises(ClientShareError):
            s.admit([job(GREEDY)], 0.0)
        assert [fill(s, lambda c=client: job(c)) for client in "ab"] == [3, 2]  # each has its third of the queue now

    def test_a_client_without_a_waiting_image_may_have_one_request_whatever_its_share(self):
        s = scheduler(queue_images=8)
        for client in "abcd":
            s.admit([job(client)], 0.0)
        s.admit([job("e"), job("e"), job("e")], 0.0)
        with pytest.raises(ClientShareError):
            s.admit([job("e")], 0.0)

    def test_a_client_is_active_for_a_while_after_its_last_request(self):
        s, cancelled = scheduler(queue_images=10, client_window=10), job(SMALL)
        s.admit([cancelled], 0.0)
        s.cancel(cancelled)
        assert fill(s, lambda: job(GREEDY), 9.0) == 5
        assert fill(s, lambda: job(GREEDY), 11.0) == 5

    def test_a_rejected_client_is_active_until_it_has_had_time_to_retry(self):
        s = scheduler(queue_images=10, client_window=10)
        fill(s, lambda: job(GREEDY, size=LARGE))
        with pytest.raises(QueueFullError) as rejected:
            s.admit([job(SMALL)], 0.0)
        assert rejected.value.retry_after == pytest.approx(40.0)
        s.plan("gpu", 45.0)
        with pytest.raises(QueueFullError):
            s.admit([job(GREEDY)], 45.0)
        s.admit([job(GREEDY)], 51.0)

    def test_the_next_free_place_is_for_the_client_that_was_rejected(self):
        s = scheduler(queue_images=10)
        fill(s, lambda: job(GREEDY))
        for client in (SMALL, "later"):
            with pytest.raises(QueueFullError):
                s.admit([job(client)], 0.0)
        s.plan("gpu", 0.0)  # one leaves the queue
        for client in (GREEDY, "later", "new"):
            with pytest.raises(QueueFullError):
                s.admit([job(client)], 0.0)
        s.admit([job(SMALL)], 0.0)

    def test_the_predicted_work_is_shared_as_well(self):
        s = scheduler(queue_seconds=40)
        s.admit([job(SMALL)], 0.0)
        assert fill(s, lambda: job(GREEDY)) == 5

    def test_requests_without_a_client_share_everything(self):
        s = scheduler(queue_images=10)
        assert fill(s, job) == 10


class TestTimeUntilTheDeadline:
    def test_a_client_leaves_half_of_the_time_while_another_is_active(self):
        s = scheduler()
        s.admit([job(SMALL, deadline=4.0)], 0.0)
        assert fill(s, lambda: job(GREEDY, deadline=80.0)) == 10
        assert fill(s, lambda: job(SMALL, deadline=80.0)) == 9

    def test_work_due_later_does_not_count(self):
        s = scheduler()
        s.admit([job(SMALL, deadline=4.0)], 0.0)
        for _ in range(10):
            s.admit([job(GREEDY, deadline=1000.0)], 0.0)
        s.admit([job(GREEDY, deadline=20.0)], 0.0)

    def test_long_deadlines_give_no_larger_share(self):
        """Images without a deadline, or with a late one, rank by the default deadline."""
        s = scheduler(default_deadline=80.0)
        s.admit([job(SMALL, deadline=4.0)], 0.0)
        assert fill(s, lambda: job(GREEDY, deadline=10_000.0)) == 10
        s.admit([job(SMALL, deadline=80.0)], 0.0)

    def test_work_due_earlier_does_not_exceed_the_share_of_later_deadlines(self):
        s = scheduler()
        s.admit([job(SMALL, deadline=4.0)], 0.0)
        for deadline in (80.0, 40.0, 20.0):
            fill(s, lambda d=deadline: job(GREEDY, deadline=d))
        assert fill(s, lambda: job(SMALL, deadline=80.0)) >= 9

    def test_an_occasional_client_is_not_starved_by_one_that_asks_all_the_time(self):
        """With a deadline of less than two decodes, there is room for a request only while the device finishes one."""
        s, now, retry_at, admitted = scheduler(), 0.0, 0.0, Counter()
        while now < 400.0:
            for client in (GREEDY, SMALL) if now >= retry_at else (GREEDY,):
                try:
                    s.admit([job(client, deadline=now + 7.0)], now)
                    admitted[client] += 1
                except QueueFullError as error:
                    retry_at = now + error.retry_after if client == SMALL else retry_at
            now, _ = step(s, now)
        assert admitted[SMALL] >= 0.4 * admitted.total()


class TestInteractive:
    def test_interactive_requests_leave_room_for_the_others(self):
        s = scheduler(queue_images=10, shares=(0.8, 1.0, 1.0))
        assert fill(s, lambda: job(priority=Priority.INTERACTIVE)) == 8
        assert fill(s, job) == 2

    def test_interactive_requests_leave_time_for_the_others(self):
        s = scheduler(shares=(0.8, 0.9, 0.5))
        assert fill(s, lambda: job(deadline=80.0, priority=Priority.INTERACTIVE)) == 16
        assert fill(s, lambda: job(deadline=80.0)) >= 2

    def test_other_classes_do_not_use_the_interactive_share(self):
        s = scheduler(queue_images=10, shares=(0.5, 0.5, 0.5))
        assert fill(s, job) == 5
        assert fill(s, lambda: job(priority=Priority.INTERACTIVE)) == 5

    def test_one_interactive_request_is_accepted_whatever_its_deadline(self):
        s = scheduler(shares=(0.5, 1.0, 1.0))
        s.admit([job(deadline=4.0, priority=Priority.INTERACTIVE)], 0.0)


class TestOrder:
    def test_a_client_that_used_the_device_less_goes_first_if_all_deadlines_are_met(self):
        s = scheduler(slots=1)
        for _ in range(10):
            s.admit([job(GREEDY, deadline=100.0)], 0.0)
        now, done = 0.0, []
        for _ in range(5):
            now, finished = step(s, now)
            done += finished
        s.admit([job(SMALL, deadline=now + 100.0)], now)
        while s.queued() or s.running():
            now, finished = step(s, now)
            done += finished
        assert [one.client for one in done].index(SMALL) == 2  # after the image that was running
        assert len(done) == 11

    def test_a_client_that_used_the_device_less_waits_if_a_deadline_would_be_missed(self):
        s = scheduler(slots=1)
        for _ in range(5):
            s.admit([job(GREEDY, deadline=20.0)], 0.0)
        s.admit([job(SMALL, deadline=50.0)], 0.0)
        now, done = 0.0, []
        while s.queued() or s.running():
            now, finished = step(s, now)
            done += [(one.client, now) for one in finished]
        assert done[-1] == (SMALL, 24.0)

    def test_busy_clients_share_the_device_equally(self):
        s, now, done = scheduler(queue_images=20), 0.0, Counter()
        for _ in range(400):
            for client in ("a", "a", "a", "b"):
                fill(s, lambda c=client, d=now: job(c, deadline=d + 1000.0), now)
            now, finished = step(s, now)
            done.update(one.client for one in finished)
        assert abs(done["a"] - done["b"]) <= 2

    def test_a_client_owes_nothing_for_using_an_idle_device(self):
        clients = Clients(10)
        for _ in range(100):
            clients.served("alone", 4.0)
        clients.served("new", 4.0)
        assert clients.turn("alone") - clients.turn("new") <= 4.0

    def test_an_idle_client_saves_up_no_turns(self):
        clients = Clients(10)
        clients.served("idle", 4.0)
        for _ in range(100):
            clients.served("busy", 4.0)
        assert clients.turn("busy") - clients.turn("idle") <= 4.0


@pytest.mark.parametrize("priority", [Priority.INTERACTIVE, Priority.STANDARD])
def test_one_client_with_many_connections_does_not_delay_another(priority: Priority):
    """A client keeps 64 requests in flight, each due in 50 times its own duration; another sends one at a time."""
    s, now = scheduler(queue_images=64, slots=1, shares=(0.8, 0.9, 0.5)), 0.0
    wanted, latencies, waiting, greedy_done = math.inf, [], None, 0
    while len(latencies) < 20:
        with contextlib.suppress(QueueFullError):
            while s.queued() + s.running() < 64:
                s.admit([job(GREEDY, now + 200.0, priority)], now)
        if waiting is None and now > 100.0:
            wanted = min(wanted, now)
            with contextlib.suppress(QueueFullError):
                s.admit([candidate := job(SMALL, now + 200.0)], now)
                waiting = candidate
        now, finished = step(s, now)
        greedy_done += sum(one.client == GREEDY for one in finished)
        if waiting in finished:
            latencies.append(now - wanted)  # including the time during which it was rejected
            waiting, wanted = None, math.inf
    assert max(latencies) < 200.0
    # The work that was accepted while the other client was alone is done by now.
    assert max(latencies[12:]) <= 2 * SECONDS[SIZE]
    assert greedy_done + len(latencies) >= now / SECONDS[SIZE] - 1, "the device was idle"


def test_requests_from_ever_new_clients_are_not_all_remembered():
    clients = Clients(10)
    for number in range(10 * MAX_CLIENTS):
        clients.seen([str(number)], 0.0)
        clients.served(str(number), 1.0)
    assert clients.active(0.0) == MAX_CLIENTS
    assert clients.turn("0") == clients.turn("another")
    assert clients.active(10.1) == 0


REQUESTS = st.tuples(
    st.sampled_from([SIZE, SIZE, LARGE]),
    st.sampled_from([1, 1, 2]),
    st.sampled_from(list(Priority)),
    st.sampled_from([1.0, 2.0, 10.0]),  # deadline as a multiple of the small client's
)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=6),
    greedy=st.integers(1, 4),
    priority=st.sampled_from([Priority.INTERACTIVE, Priority.STANDARD]),
    slots=st.integers(1, 3),
    queue_images=st.sampled_from([12, 30]),
    before=st.sampled_from([0.0, 50.0, 500.0]),
    default_deadline=st.sampled_from([60.0, 1e9]),
)
def test_no_requests_of_others_keep_a_small_client_out(
    requests, greedy, priority, slots, queue_images, before, default_deadline
):
    """Greedy clients send all that is accepted after every step; one that follows Retry-After is accepted soon."""
    s = scheduler(slots=slots, queue_images=queue_images, shares=(0.8, 0.9, 0.5), default_deadline=default_deadline)
    deadline, now = 20 * SECONDS[LARGE], 0.0

    def flood() -> None:
        for client, (size, images, kind, multiple) in itertools.product(map(str, range(greedy)), requests):
            with contextlib.suppress(QueueFullError):
                while True:
                    s.admit([job(client, now + multiple * deadline, kind, size) for _ in range(images)], now)

    retry_at, limit = before, math.inf
    while True:
        flood()
        if now >= retry_at:
            try:
                s.admit([job(SMALL, now + deadline, priority)], now)
                break
            except QueueFullError as error:
                retry_at, limit = now + error.retry_after, min(limit, now + 5 * s.backlog())
            assert now < limit, "rejected for longer than the work takes that was admitted before"
        now, _ = step(s, now)
