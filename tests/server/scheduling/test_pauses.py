"""Pauses of the process on a manual clock."""

from __future__ import annotations

import pytest

from server.scheduling.pauses import TOLERANCE, Pauses


def woken(*times: float) -> Pauses:
    pauses = Pauses(interval=0.25)
    for now in times:
        pauses.wake(now)
    return pauses


def test_regular_and_slightly_late_calls_are_no_pause():
    assert woken(10.0, 10.25, 10.5, 11.5).seconds(0.0, 11.6) == 0


def test_before_the_first_call_there_is_no_pause():
    assert woken().seconds(0.0, 1000.0) == 0
    assert woken(1000.0).seconds(0.0, 1000.0) == 0


def test_a_late_call_is_a_pause_from_when_it_was_expected():
    pauses = woken(10.0, 10.25, 22.5, 22.75)
    assert pauses.seconds(0.0, 23.0) == pytest.approx(12.0)
    assert pauses.seconds(10.4, 23.0) == pytest.approx(12.0, abs=0.25)


def test_only_the_part_inside_the_period_counts():
    pauses = woken(10.0, 22.25)
    assert pauses.seconds(12.25, 15.25) == pytest.approx(3.0)
    assert pauses.seconds(0.0, 10.2) == 0
    assert pauses.seconds(22.3, 23.0) == 0


def test_a_pause_counts_before_the_first_call_after_it():
    """A device thread may end its step before the watchdog wakes up."""
    pauses = woken(10.0)
    assert pauses.seconds(9.9, 22.0) == pytest.approx(11.75)
    pauses.wake(22.01)
    assert pauses.seconds(9.9, 22.0) == pytest.approx(11.75)


def test_several_pauses_add_up():
    assert woken(0.0, 5.25, 10.5).seconds(0.0, 10.5) == pytest.approx(10.0)


def test_the_tolerance_is_not_a_pause_at_its_limit():
    assert woken(0.0, 0.25 + TOLERANCE).seconds(0.0, 0.25 + TOLERANCE) == 0
