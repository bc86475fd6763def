"""Optimisation profiles of compiled engines: which output sizes each of them covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from engines.errors import ConfigError
from engines.pid.config import PidConfig
from engines.size import MAX_SIDE, Size


class SizeRange(BaseModel):
    """Range of output sizes: all whose sides are multiples of the latent cell and within the limits, in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    smallest_side: Annotated[int, Field(ge=1, le=MAX_SIDE)]
    largest_side: Annotated[int, Field(ge=1, le=MAX_SIDE)]

    def __str__(self) -> str:
        return f"{self.smallest_side}-{self.largest_side}"


@dataclass(frozen=True)
class SizeProfile:
    """Output sizes that one optimisation profile of the engines covers."""

    smallest: Size
    largest: Size

    def covers(self, size: Size) -> bool:
        """Return whether a size is within the profile."""
        lower, upper = self.smallest, self.largest
        return lower.height <= size.height <= upper.height and lower.width <= size.width <= upper.width

    def __str__(self) -> str:
        return str(self.smallest) if self.smallest == self.largest else f"{self.smallest} to {self.largest}"


def size_profiles(sizes: Sequence[Size], size_range: SizeRange | None) -> tuple[SizeProfile, ...]:
    """Return the optimisation profiles for sizes and a range of sizes, in this order."""
    profiles = [SizeProfile(size, size) for size in sizes]
    if size_range is not None:
        low, high = size_range.smallest_side, size_range.largest_side
        profiles.append(SizeProfile(Size(low, low), Size(high, high)))
    return tuple(profiles)


def check_size_range(size_range: SizeRange, config: PidConfig) -> None:
    """Check that a range is possible for a network.

    Raises:
        ValueError: It is not.
    """
    low, high = size_range.smallest_side, size_range.largest_side
    for side in (low, high):
        try:
            config.latent_size(Size(side, side))
        except ConfigError as error:
            raise ValueError(f"the size range {size_range} is not possible: {str(error).rstrip('.')}") from error
    if low >= high:
        raise ValueError(f"the size range {size_range} is empty: its first side must be smaller than its second")
