"""Architectures of GPUs that the kernels have tile sizes for."""

from __future__ import annotations

from typing import Literal

Architecture = Literal["sm_90", "sm_100", "sm_120"]
Capability = tuple[int, int]

# Compute capabilities with the matrix instructions and about the shared memory of an architecture. 8.9 (RTX 40, L40S)
# has FP8 as well, but does not load tiles with TMA: attention would wait for each of them.
_SIMILAR: dict[Capability, Architecture] = {
    (9, 0): "sm_90",  # H100, H200
    (10, 0): "sm_100",  # B200, GB200
    (10, 3): "sm_100",  # B300, GB300
    (12, 0): "sm_120",  # RTX 50 series
    (12, 1): "sm_120",  # GB10
}


def architecture(capability: Capability) -> Architecture | None:
    """Return the architecture whose tile sizes to use for a compute capability, or None if it is not supported."""
    return _SIMILAR.get(capability)
