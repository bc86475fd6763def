"""Measured cost of each stage of a decode, in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from engines.size import Size

CostStage = Literal["condition", "step", "finish", "encode"]

PNG_FAST = "png-fast"  # the encoding that the warm-up measures


@dataclass(frozen=True)
class CostKey:
    """Stage, image size, batch size and, for the stage "encode", encoding that a cost was measured for."""

    stage: CostStage
    size: Size
    batch: int = 1
    encoding: str = ""  # such as "png-fast" or "webp"; empty for other stages


class CostTable:
    """Cost estimates by stage, size, batch and encoding, measured at warm-up and updated by a running mean.

    A batch size that was never measured is assumed to gain nothing: b times the cost of one image. The cost of an
    unknown size is scaled by area from the nearest known one. An unknown encoding costs as much as a fast PNG.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        """Create an empty table; `smoothing` is the weight of a new measurement once there are many."""
        self._smoothing = smoothing
        self._seconds: dict[CostKey, float] = {}
        self._counts: dict[CostKey, int] = {}
        self._encodings: set[str] = set()  # that were measured
        self._images: dict[tuple[Size, bool, int], float] = {}  # cache of `image`, valid until the next measurement

    def observe(self, stage: CostStage, size: Size, seconds: float, batch: int = 1, encoding: str = "") -> None:
        """Add a measurement to the running mean.

        Early measurements weigh as in a plain mean. One far below the estimate replaces it, because the first run of
        a stage includes one-time work such as kernel selection.
        """
        key = CostKey(stage, size, batch, encoding)
        known, count = self._seconds.get(key, 0.0), self._counts.get(key, 0)
        weight = 1.0 if seconds < known / 2 else max(self._smoothing, 1 / (count + 1))
        self._seconds[key] = known + weight * (seconds - known)
        self._counts[key] = count + 1
        self._encodings.add(encoding)
        self._images.clear()

    def condition(self, size: Size) -> float:
        """Return the cost of conditioning one image."""
        return self._single("condition", size)

    def step(self, size: Size, batch: int = 1) -> float:
        """Return the cost of one denoising step of a batch."""
        known = self._seconds.get(CostKey("step", size, batch))
        return batch * self._single("step", size) if known is None else known

    def finish(self, size: Size) -> float:
        """Return the cost of converting one image to 8 bits and starting its copy to the host."""
        return self._single("finish", size)

    def encode(self, size: Size, encoding: str = PNG_FAST) -> float:
        """Return the cost of encoding one image on the host."""
        return self._single("encode", size, encoding if encoding in self._encodings else PNG_FAST)

    def image(self, size: Size, to_start: bool, steps: int) -> float:
        """Return the device seconds that an image with `steps` remaining steps needs, run alone.

        `to_start` adds the cost of the conditioning.
        """
        key = (size, to_start, steps)
        seconds = self._images.get(key)
        if seconds is None:
            seconds = steps * self.step(size) + self.finish(size) + (self.condition(size) if to_start else 0.0)
            self._images[key] = seconds
        return seconds

    def decode(self, size: Size) -> float:
        """Return the seconds of a decode with four steps, from conditioning to a fast PNG, on an idle server."""
        return self.image(size, True, steps=4) + self.encode(size)

    def table(self) -> Mapping[CostKey, float]:
        """Return a copy of all estimates."""
        return dict(self._seconds)

    def _single(self, stage: CostStage, size: Size, encoding: str = "") -> float:
        known = self._seconds.get(CostKey(stage, size, 1, encoding))
        if known is not None:
            return known
        others = [
            (key.size, cost)
            for key, cost in self._seconds.items()
            if (key.stage, key.batch, key.encoding) == (stage, 1, encoding)
        ]
        if not others:
            return 0.0
        nearest, cost = min(others, key=lambda other: abs(other[0].area - size.area))
        return cost * size.area / nearest.area
