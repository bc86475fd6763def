"""Errors between results: NaN is never taken for a small one."""

import math

import pytest
import torch

from engines.accuracy import largest, relative_error


@pytest.mark.parametrize("values", [(math.nan, 1.0, 2.0), (1.0, math.nan, 2.0), (1.0, 2.0, math.nan)])
def test_the_largest_of_errors_with_nan_is_nan(values: tuple[float, ...]):
    assert math.isnan(largest(values))


def test_the_largest_error_is_found():
    assert largest([1.0, 3.0, 2.0]) == 3.0
    assert largest({"a": math.inf, "b": 0.0}.values()) == math.inf


def test_a_relative_error_is_the_quotient_of_norms():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 1.0]), expected) == pytest.approx(0.2)
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), expected))
