"""Measured cost of each stage of a decode, in seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from engines.size import Size

CostStage = Literal["caption", "condition", "step", "preview", "finish", "encode"]

# Encodings that the warm-up measures.
PNG_FAST = "png-fast"
PREVIEW = "preview"

# Cost of the other encodings relative to PNG_FAST, until one is observed: CPU time for an image like a photograph
# (`simulated_image`, 1024x1024). The ratio of png-best depends on the content: 10 for a flat image, 140 for a photo.
RATIOS: Mapping[str, float] = {
    "png-none": 0.4,
    "png-best": 57.0,
    "webp": 7.1,
    "jpeg": 1.2,
    "avif": 23.0,
    "jxl": 1.2,
    "raw": 0.1,
    "planes": 0.9,
}

SMOOTHING = 0.1  # weight of an observation once there are many
OUTLIER_FACTOR = 2.0  # an observation counts as at most this multiple of the estimate ...
OUTLIER_SECONDS = 0.001  # ... plus this time, without which an estimate of zero could never grow
PATIENCE = 10.0  # multiples of the baseline for which an estimate is kept without observations
HALF_LIFE = 5.0  # seconds; after that, its difference from the baseline halves in this time
REFRESH = 0.1  # seconds between updates of the estimates


@dataclass(frozen=True)
class CostKey:
    """Stage, image size, batch size and, for the stage "encode", encoding that a cost was measured for."""

    stage: CostStage
    size: Size | None  # None for the stage "caption", which encodes prompts
    batch: int = 1
    encoding: str = ""  # such as "png-fast" or "webp"; empty for other stages


class Costs:
    """Seconds by stage, size, batch and encoding, derived from other keys for those that are missing.

    An unknown batch size is assumed to gain nothing: b times the cost of one image. The cost of an unknown size is
    scaled by area from the nearest known one.
    """

    def __init__(self) -> None:
        """Create an empty table."""
        self._seconds: dict[CostKey, float] = {}
        self._images: dict[tuple[Size, bool, int, bool], float] = {}  # cache of `image`, valid until the next change

    def set(self, key: CostKey, seconds: float) -> None:
        """Set the cost of `key`."""
        self._seconds[key] = seconds
        self._images.clear()

    def cost(self, key: CostKey) -> float:
        """Return the cost of `key`, or 0 if no similar one is known."""
        known = self._seconds.get(key)
        if known is not None:
            return known
        if key.batch > 1:
            return key.batch * self.cost(CostKey(key.stage, key.size, 1, key.encoding))
        if key.size is None:
            return 0.0
        wanted, area = (key.stage, 1, key.encoding), key.size.area
        others = {known.size.area: known for known in self._seconds if known.size and _kind(known) == wanted}
        if not others:
            return 0.0
        nearest = min(others, key=lambda other: abs(other - area))
        return self._seconds[others[nearest]] * area / nearest

    def caption(self, batch: int = 1) -> float:
        """Return the cost of encoding a batch of prompts."""
        return self.cost(CostKey("caption", None, batch))

    def condition(self, size: Size) -> float:
        """Return the cost of conditioning one image."""
        return self.cost(CostKey("condition", size))

    def step(self, size: Size, batch: int = 1) -> float:
        """Return the cost of one denoising step of a batch."""
        return self.cost(CostKey("step", size, batch))

    def preview(self, size: Size) -> float:
        """Return the cost of a preview of one image on the device, after a step."""
        return self.cost(CostKey("preview", size))

    def finish(self, size: Size) -> float:
        """Return the cost of converting one image to 8 bits and starting its copy to the host."""
        return self.cost(CostKey("finish", size))

    def encode(self, size: Size, encoding: str = PNG_FAST) -> float:
        """Return the cost of encoding one image on the host."""
        return self.cost(CostKey("encode", size, 1, encoding))

    def image(self, size: Size, to_start: bool, steps: int, previews: bool = False) -> float:
        """Return the device seconds that an image with `steps` remaining steps needs, run alone.

        `to_start` adds the cost of the conditioning, and `previews` that of a preview after each step.
        """
        key = (size, to_start, steps, previews)
        seconds = self._images.get(key)
        if seconds is None:
            step = self.step(size) + (self.preview(size) if previews else 0.0)
            seconds = steps * step + self.finish(size) + (self.condition(size) if to_start else 0.0)
            self._images[key] = seconds
        return seconds

    def decode(self, size: Size, encoding: str = PNG_FAST, previews: bool = False) -> float:
        """Return the seconds of a decode with four steps, from conditioning to the last byte, on an idle server."""
        encode = self.encode(size, encoding) + (4 * self.encode(size, PREVIEW) if previews else 0.0)
        return self.image(size, True, steps=4, previews=previews) + encode

    def table(self) -> Mapping[CostKey, float]:
        """Return a copy of all known costs."""
        return dict(self._seconds)


def _kind(key: CostKey) -> tuple[CostStage, int, str]:
    return key.stage, key.batch, key.encoding


class CostTable(Costs):
    """Estimates of the current costs: measured at the warm-up, then a running mean of the observations.

    Predictions decide which requests are accepted, and only accepted requests are observed. An estimate must therefore
    never stay wrong because of what it made the scheduler reject: outliers are clipped, and without observations the
    estimate returns to the baseline.

    Attributes:
        baseline: Costs on an undisturbed server, never above the estimates: those of the warm-up, or lower ones if
            observations are repeatedly lower.
    """

    def __init__(self) -> None:
        """Create an empty table."""
        super().__init__()
        self.baseline = Costs()
        self._records: dict[CostKey, _Record] = {}
        self._refreshed = -math.inf

    def measure(self, stage: CostStage, size: Size | None, seconds: float, batch: int = 1, encoding: str = "") -> None:
        """Record a measurement of the warm-up. The lowest one counts, because the first includes one-time work.

        The costs of other encodings are derived from that of PNG_FAST.
        """
        key = CostKey(stage, size, batch, encoding)
        lowest = min(seconds, self._records[key].measured) if key in self._records else seconds
        self._add(key, _Record(lowest, lowest))
        if encoding == PNG_FAST:
            for other, ratio in RATIOS.items():
                self._add(CostKey(stage, size, batch, other), _Record(ratio * lowest, ratio * lowest, count=0.0))

    def observe(
        self, stage: CostStage, size: Size | None, seconds: float, now: float, batch: int = 1, encoding: str = ""
    ) -> None:
        """Add the cost of a request's stage, for which there is a measurement of the warm-up, to the running mean."""
        key = CostKey(stage, size, batch, encoding)
        record = self._records[key]
        record.observe(seconds, now)
        self._publish(key, record, record.estimate(now))

    def advance(self, now: float) -> None:
        """Let the estimates without recent observations return towards their baseline."""
        if now - self._refreshed < REFRESH:
            return
        self._refreshed = now
        for key, record in self._records.items():
            if record.mean != record.baseline and record.memory(now) < 1:
                self._publish(key, record, record.estimate(now))

    def _add(self, key: CostKey, record: _Record) -> None:
        self._records[key] = record
        self._publish(key, record, record.measured)

    def _publish(self, key: CostKey, record: _Record, estimate: float) -> None:
        self.set(key, estimate)
        self.baseline.set(key, min(record.baseline, estimate))


@dataclass
class _Record:
    """History of one cost, in seconds."""

    measured: float  # at the warm-up, or derived from other costs
    mean: float  # running mean of the observations, as of the last one
    baseline: float = field(init=False)  # running mean of the observations, each counted as at most `measured`
    count: float = 1.0  # observations that the mean represents; 0 if `measured` was derived
    seen: float = -math.inf  # time of the last observation

    def __post_init__(self) -> None:
        self.baseline = self.measured

    def memory(self, now: float) -> float:
        """Return the weight of earlier observations: 1 while there are new ones, then falling towards 0."""
        silence = now - self.seen - PATIENCE * self.baseline
        return 1.0 if silence <= 0 else 0.5 ** (silence / HALF_LIFE)

    def estimate(self, now: float) -> float:
        return self.baseline + (self.mean - self.baseline) * self.memory(now)

    def observe(self, seconds: float, now: float) -> None:
        estimate = self.estimate(now)
        if self.count:
            count = max(1.0, self.count * self.memory(now))
            clipped = min(seconds, OUTLIER_FACTOR * estimate + OUTLIER_SECONDS)
            self.mean = estimate + max(SMOOTHING, 1 / (count + 1)) * (clipped - estimate)
            self.count = count + 1
        else:  # a derived cost may be far off
            self.mean, self.count = seconds, 1.0
        self.baseline += SMOOTHING * (min(seconds, self.measured) - self.baseline)
        self.seen = max(self.seen, now)
