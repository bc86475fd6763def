"""Comparison of paired measurements: percentiles of two quantities, and of their difference with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000  # of the bootstrap


def difference_interval(pairs: np.ndarray, percentiles: Sequence[float]) -> NDArray[Any]:
    """Return the 95 % interval of the difference between the percentiles of two columns, second minus first.

    The bootstrap resamples pairs, so that what both measurements of a pair have in common does not widen the interval.

    Args:
        pairs: Measurements [n, 2].
        percentiles: Percentiles to compare.

    Returns:
        Lower and upper limits [2, len(percentiles)].
    """
    generator = np.random.default_rng(0)
    differences = []
    for _ in range(_RESAMPLES):
        sample = np.percentile(pairs[generator.integers(len(pairs), size=len(pairs))], percentiles, axis=0)
        differences.append(sample[:, 1] - sample[:, 0])
    return np.percentile(differences, (2.5, 97.5), axis=0)
