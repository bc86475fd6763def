"""Encoder threads in the forecast: images in order of rank, on as many threads as they have strips."""

from __future__ import annotations

import math

import pytest

from engines.size import Size
from server.errors import DeadlineTooShortError, QueueFullError
from server.scheduling.costs import CostTable, Output
from server.scheduling.encoders import ReadyImage, encoded
from server.scheduling.jobs import Job, JobState, Limits, Priority
from server.scheduling.scheduler import Scheduler

SIZE = Output("flux", Size(64, 64))


def image(ready: float, rank: float, work: float, strips: int = 8, threads: int = 2, begun: bool = False) -> ReadyImage:
    job = Job(SIZE, (0,), payload=None)
    return ReadyImage(ready, (rank, int(rank)), work, min(threads, strips), job, begun)


def ends(*images: ReadyImage, threads: int = 2) -> list[float]:
    found = dict(encoded(images, threads))
    return [found[image.job] for image in images]


def test_an_image_of_many_strips_uses_all_threads_and_one_of_one_strip_a_single_one():
    assert ends(image(1, 1, 6.0)) == [4.0]
    assert ends(image(1, 1, 6.0, strips=1)) == [7.0]


def test_an_urgent_image_interrupts_another_that_continues_afterwards():
    assert ends(image(0, 9, 6.0), image(1, 1, 2.0)) == [4.0, 2.0]


def test_images_of_one_rank_order_are_encoded_one_after_the_other():
    assert ends(image(0, 1, 2.0), image(0, 2, 2.0), image(0, 3, 2.0)) == [1.0, 2.0, 3.0]


def test_an_image_of_one_strip_keeps_its_thread():
    assert ends(image(0, 9, 6.0, strips=1), image(1, 1, 4.0)) == [6.0, 5.0]
    assert ends(image(0, 9, 6.0, strips=1, begun=True), image(0, 1, 4.0)) == [6.0, 4.0]
    assert ends(image(0, 9, 6.0, strips=1), image(0, 1, 4.0)) == [8.0, 2.0]


def test_threads_that_urgent_images_leave_free_encode_others():
    assert ends(image(0, 1, 4.0, strips=1), image(0, 2, 3.0), threads=3) == [4.0, 1.5]
    assert ends(*(image(0, rank, 2.0, strips=1) for rank in (1, 2, 3))) == [2.0, 2.0, 4.0]


def test_an_idle_encoder_waits_for_the_next_image():
    assert ends(image(5, 1, 2.0), image(0, 2, 2.0), image(7, 3, 0.0)) == [6.0, 1.0, 7.0]
    assert list(encoded([], 2)) == []


def test_work_too_short_to_change_a_large_time_ends():
    start = 4e7  # a machine that has run for more than a year; floats of this size are 7e-9 s apart
    images = [
        image(start + 1e-7 * number, -number, 1e-9 * (1 + number % 7), strips=1 + number % 3) for number in range(99)
    ]
    assert max(ends(*images)) == pytest.approx(start, abs=1e-4)


def test_the_encoder_is_busy_until_all_work_is_done():
    images = [image(0.1 * number, 100 - number, 0.7 + 0.1 * (number % 5)) for number in range(50)]
    assert max(ends(*images)) == pytest.approx(sum(image.work for image in images) / 2)
    assert math.inf not in ends(*images)


class TestScheduler:
    """Decodes take 4 s. Encoding takes 4 thread-seconds as "slow" in 8 strips, and 2 as "webp" in one."""

    def make(self, **limits) -> Scheduler:
        table = CostTable()
        table.measure("step", SIZE, 1.0)
        table.measure("encode", SIZE, 4.0, encoding="slow")
        table.measure("encode", SIZE, 2.0, encoding="webp")
        return Scheduler(table, Limits(queue_seconds=1e9, prediction_margin=0, **limits), {"gpu": {SIZE: 1}})

    def slow(self, deadline=math.inf, **fields) -> Job:
        return Job(SIZE, (0, 1, 2, 3), Priority.STANDARD, deadline, encoding="slow", strips=8, payload=None, **fields)

    def webp(self, deadline=math.inf) -> Job:
        return Job(SIZE, (0, 1, 2, 3), Priority.STANDARD, deadline, encoding="webp", payload=None)

    def decode(self, s: Scheduler, now: float, *jobs: Job) -> None:
        """Admit `jobs` and decode them in no time."""
        for one in jobs:
            s.admit([one], now)
            while (plan := s.plan("gpu", now)).batch:
                s.stepped(plan.batch, now)

    def test_strips_are_encoded_in_parallel_and_a_whole_image_by_one_thread(self):
        for threads, slow, webp in ((1, 4.0, 2.0), (2, 2.0, 2.0), (8, 0.5, 2.0), (16, 0.5, 2.0)):
            for one, encode in ((self.slow, slow), (self.webp, webp)):
                with pytest.raises(DeadlineTooShortError):
                    self.make(encoder_threads=threads).admit([one(deadline=4.0 + encode - 0.01)], 0.0)
                self.make(encoder_threads=threads).admit([one(deadline=4.0 + encode + 0.01)], 0.0)

    def test_a_busy_encoder_rejects_what_would_be_late(self):
        s = self.make(encoder_threads=2)
        self.decode(s, 0.0, *(self.slow(deadline=11.0) for _ in range(5)))  # 10 s of encoding
        assert s.encoding_images() == 5
        assert s.encoder_backlog(0.0) == pytest.approx(10.0)
        with pytest.raises(QueueFullError, match="deadline would be missed") as rejected:
            s.admit([self.slow(deadline=11.9)], 0.0)
        assert rejected.value.retry_after == pytest.approx(0.1)
        s.admit([self.slow(deadline=12.1)], 0.0)

    def test_an_urgent_image_overtakes_in_the_encoder_unless_that_makes_another_late(self):
        for deadline, admitted in ((30.0, True), (10.5, False)):
            s = self.make(encoder_threads=2)
            self.decode(s, 0.0, *(self.slow(deadline=deadline) for _ in range(5)))
            if admitted:
                s.admit([self.slow(deadline=6.0)], 0.0)
            else:
                with pytest.raises(QueueFullError):
                    s.admit([self.slow(deadline=6.0)], 0.0)

    def test_rows_that_are_encoded_count_no_longer(self):
        s = self.make(encoder_threads=2)
        one = self.slow()
        self.decode(s, 0.0, one)
        s.record_encoding(one, 0.5, 0.25, 0.5)
        assert s.encoder_backlog(1.0) == pytest.approx(1.5)
        s.encoded(one)
        assert (s.encoder_backlog(1.0), s.encoding_images(), one.state) == (0.0, 0, JobState.ENDED)
        s.encoded(one)

    def test_the_time_that_an_image_of_one_strip_has_been_encoded_for_counts_no_longer(self):
        s = self.make(encoder_threads=1)
        one = self.webp()
        self.decode(s, 0.0, one)
        assert s.encoder_backlog(0.5) == 2.0
        s.record_encoding(one, 1.0, 0.0, 1.0)
        assert s.encoder_backlog(1.5) == 1.5
        assert s.encoder_backlog(9.0) == 0.0

    def test_an_image_cancelled_in_the_encoder_counts_until_its_threads_are_free(self):
        s = self.make(encoder_threads=1)
        one, other = self.slow(deadline=8.0), self.slow(deadline=100.0)
        self.decode(s, 0.0, one, other)
        s.record_encoding(one, 0.5, 0.25, 0.0)
        s.cancel(one)
        assert s.encoder_backlog(0.0) == pytest.approx(1.0 + 4.0)
        assert s.expire(9.0) == []  # it has ended
        s.encoded(one)
        assert s.encoding_images() == 1

    def test_an_image_in_the_encoder_expires_at_its_deadline(self):
        s = self.make(encoder_threads=1)
        one = self.slow(deadline=8.0)
        self.decode(s, 0.0, one)
        assert s.next_deadline() == 8.0
        assert s.expire(8.1) == [one]
        assert (s.expire(8.2), s.next_deadline()) == ([], math.inf)

    def test_an_image_cancelled_during_its_last_step_is_not_encoded(self):
        s = self.make(encoder_threads=1)
        gone, late = self.slow(), self.slow(deadline=20.0)
        for one in (gone, late):
            s.admit([one], 0.0)
            for _ in range(3):
                s.stepped(s.plan("gpu", 0.0).batch, 0.0)
            assert s.plan("gpu", 0.0).batch == (one,)
            if one is gone:
                s.cancel(one)
            now = 1.0 if one is gone else 21.0
            assert s.stepped([one], now) == []
            assert s.plan("gpu", now).drop == (one,)
        assert s.encoding_images() == s.running() == 0

    def test_a_request_of_several_images_that_is_alone_does_not_wait(self):
        """Its images wait for each other in the encoder, which is not a reason to reject a low class."""
        s = self.make(encoder_threads=1, shares=(1.0, 0.5, 0.5))
        s.admit([self.webp(deadline=18.1) for _ in range(4)], 0.0)

    def test_all_images_leave_the_encoder_when_the_scheduler_is_cleared(self):
        s = self.make()
        one = self.slow()
        self.decode(s, 0.0, one)
        assert s.clear() == [one]
        assert s.encoding_images() == 0
