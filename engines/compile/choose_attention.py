"""Chooses the kinds of attention that are computed in FP8, by the images that each candidate decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engines.compile.planning.attention import AttentionKinds
from engines.compile.results import AttentionCandidate


def choose_attention(
    candidates: Sequence[AttentionKinds], minimum: float, measure: Callable[[AttentionKinds], AttentionCandidate]
) -> tuple[AttentionCandidate, ...]:
    """Measure candidates in their order until the images of one reach the minimum PSNR.

    Args:
        candidates: Kinds to compute in FP8, in order of preference; not empty.
        minimum: Minimum mean PSNR of the calibration images, in dB.
        measure: Decodes the calibration images with some kinds in FP8.

    Returns:
        The candidates that were measured. The last one is chosen: it reaches the minimum, or there are no others.
    """
    measured: list[AttentionCandidate] = []
    for kinds in candidates:
        measured.append(measure(kinds))
        if measured[-1].image_psnr >= minimum:
            break
    return tuple(measured)


def describe_attention(kinds: AttentionKinds) -> str:
    """Describe the precision of the attention."""
    return f"{' and '.join(kinds)} attention in FP8" if kinds else "attention in 16 bit"
