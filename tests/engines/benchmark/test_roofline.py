"""The lower bound of a decode: counted operations and measured rates."""

import pytest

from engines.benchmark.roofline import Flops, Rates, count_flops, lower_bound_seconds
from engines.pid import released
from engines.size import Size


def test_operations_agree_with_the_counts_known_for_a_2048_step():
    """13.0 + 23.9 in the patch blocks, 3.4 + 2.5 in the pixel blocks, about 0.9 in the gates, in TFLOP."""
    flops = count_flops(released("flux-2k").config, Size(2048, 2048), 300, 1)
    assert 42e12 < flops.step < 45e12
    assert 0.2e12 < flops.condition < 1.5e12


@pytest.mark.parametrize(("weight_bytes", "seconds"), [(0, 0.5), (1_000, 0.5), (100_000, 40)])
def test_the_lower_bound_is_the_slower_of_arithmetic_and_memory(weight_bytes: int, seconds: float):
    """A copied byte is read and written, a weight is only read; it is read in each of the four steps."""
    rates = Rates(matmul_flops=100.0, copy_bytes=20_000.0)
    assert lower_bound_seconds(rates, Flops(condition=10, step=10), weight_bytes) == seconds
