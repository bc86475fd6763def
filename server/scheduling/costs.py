"""What each piece of work costs, in seconds: measured at warm-up, kept current by a running estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from engines.size import Size

CostStage = Literal["condition", "step", "finish", "encode"]


@dataclass(frozen=True)
class CostKey:
    stage: CostStage
    size: Size
    batch: int = 1


class CostTable:
    """Costs by stage, size and batch.

    A batch that was never measured is assumed to gain nothing: b times one image. Unknown sizes are scaled by area
    from the nearest known one, so that a prediction is never without a basis once anything was measured.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        self._smoothing = smoothing
        self._seconds: dict[CostKey, float] = {}
        self._counts: dict[CostKey, int] = {}
        self._images: dict[tuple[Size, bool, int], float] = {}  # what `image` was asked for since the last measurement

    def observe(self, stage: CostStage, size: Size, seconds: float, batch: int = 1) -> None:
        """Take a measurement into the running estimate.

        Early ones count for more, as in a plain mean, and one far below the estimate replaces it: the first run of
        anything pays for what later ones find ready.
        """
        key = CostKey(stage, size, batch)
        known, count = self._seconds.get(key, 0.0), self._counts.get(key, 0)
        weight = 1.0 if seconds < known / 2 else max(self._smoothing, 1 / (count + 1))
        self._seconds[key] = known + weight * (seconds - known)
        self._counts[key] = count + 1
        self._images.clear()

    def condition(self, size: Size) -> float:
        return self._single("condition", size)

    def step(self, size: Size, batch: int = 1) -> float:
        known = self._seconds.get(CostKey("step", size, batch))
        return batch * self._single("step", size) if known is None else known

    def finish(self, size: Size) -> float:
        return self._single("finish", size)

    def encode(self, size: Size) -> float:
        return self._single("encode", size)

    def image(self, size: Size, to_start: bool, steps: int) -> float:
        """Device seconds from here to the last row for an image that has this many steps to go, alone."""
        kind = (size, to_start, steps)
        seconds = self._images.get(kind)
        if seconds is None:
            seconds = steps * self.step(size) + self.finish(size) + (self.condition(size) if to_start else 0.0)
            self._images[kind] = seconds
        return seconds

    def table(self) -> Mapping[CostKey, float]:
        return dict(self._seconds)

    def _single(self, stage: CostStage, size: Size) -> float:
        known = self._seconds.get(CostKey(stage, size))
        if known is not None:
            return known
        others = [(key.size, cost) for key, cost in self._seconds.items() if key.stage == stage and key.batch == 1]
        if not others:
            return 0.0
        area = size[0] * size[1]
        (height, width), cost = min(others, key=lambda other: abs(other[0][0] * other[0][1] - area))
        return cost * area / (height * width)
