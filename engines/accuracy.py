"""Differences between results that should be equal."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖, computed in float32; NaN if either contains NaN."""
    actual, expected = actual.float(), expected.float()
    return ((actual - expected).norm() / expected.norm()).item()


def largest(errors: Iterable[float]) -> float:
    """Return the largest of one or more errors; NaN if one is NaN, which `max` ignores unless it comes first."""
    values = list(errors)
    return math.nan if any(map(math.isnan, values)) else max(values)
