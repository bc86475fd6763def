"""The tables that the evaluation prints."""

from __future__ import annotations

import math

import pytest

from engines.size import Size
from engines.training import tables
from engines.training.metrics import Measurement
from engines.training.tables import Key


@pytest.fixture
def results() -> dict[Key, Measurement]:
    return {
        Key(0, tables.ORIGINAL): Measurement(math.inf, 1, 1, 1, 1.01),
        Key(0, tables.BICUBIC): Measurement(27, 0.6, 0.2, 0.4, 1.26),
        Key(0, tables.ESRGAN): Measurement(27.25, 0.61, 0.3, 0.9, 1.4),
        Key(0, tables.student(4)): Measurement(26.75, 0.625, 0.64, 1.13, 1.04),
        Key(0.4, tables.student(4)): Measurement(21, 0.4, 0.3, 5, 1.1),
        Key(0.4, tables.student(4, given_zero=True)): Measurement(16.5, 0.2, 0.3, 90, 1.5),
    }


def test_measurements_have_one_row_each(results: dict[Key, Measurement]) -> None:
    lines = tables.measurements(results).splitlines()
    assert len(lines) == 2 + len(results)
    assert lines[2] == "| 0 | original |  | 1.000 | 1.00 | 1.00 | 1.01 |"
    assert lines[4] == "| 0 | ESRGAN | 27.25 | 0.610 | 0.30 | 0.90 | 1.40 |"
    assert lines[-1] == "| 0.4 | student, 4 steps, given sigma 0 | 16.50 | 0.200 | 0.30 | 90.00 | 1.50 |"


def test_targets_compare_the_student_in_four_steps(results: dict[Key, Measurement]) -> None:
    lines = tables.targets({Size(256, 256): results, Size(384, 256): results}).splitlines()
    assert lines[0] == "| | target | 256×256 | 384×256 |"
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [(target, first) for _, target, first, second in cells if first == second] == [
        ("≥ 50 %", "55 %"),
        ("≥ -0.5 dB", "-0.25 dB"),
        ("≥ 0", "+0.025"),
        ("≤ 1.2", "1.13"),
        ("within 5 % of 1", "1.04"),
        ("≥ 0 dB", "-0.50 dB"),
        ("≥ +3 dB", "+4.5 dB"),
    ]


def test_targets_without_esrgan_do_not_mention_it(results: dict[Key, Measurement]) -> None:
    del results[Key(0, tables.ESRGAN)]
    assert "ESRGAN" not in tables.targets({Size(256, 256): results})
