"""Measured cost of each stage of a decode, in seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from engines.size import Size

CostStage = Literal["caption", "restore", "condition", "step", "preview", "finish", "encode"]

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


class Loaded(NamedTuple):
    """A decoder as it was loaded from its bundle; one that replaces it has the same name and a higher version."""

    decoder: str  # name
    version: int


class Tiling(NamedTuple):
    """Tiles in which an image is decoded: in each denoising step, one after the other."""

    tile: Size
    tiles: int


class Output(NamedTuple):
    """Decoder and size of an image. Only images with equal ones can share a step."""

    decoder: str  # name
    size: Size
    version: int = 0  # of the decoder
    tiling: Tiling | None = None

    @property
    def loaded(self) -> Loaded:
        """The decoder."""
        return Loaded(self.decoder, self.version)

    @property
    def units(self) -> int:
        """Number of units of a denoising step, each of which a device runs without interruption."""
        return 1 if self.tiling is None else self.tiling.tiles

    @property
    def unit(self) -> Output:
        """What a device runs at once: the output itself, or a tile of it."""
        return self if self.tiling is None else self._replace(size=self.tiling.tile, tiling=Tiling(self.tiling.tile, 1))

    def __str__(self) -> str:
        return f"{self.size} with {self.decoder}"


@dataclass(frozen=True)
class CostKey:
    """Key of a measured cost."""

    stage: CostStage
    subject: Output | Loaded | None  # a decoder for the stage "restore"; None for "caption", which encodes prompts
    batch: int = 1
    encoding: str = ""  # such as "png-fast" or "webp"; empty unless the stage is "encode"

    @property
    def loaded(self) -> Loaded | None:
        """The decoder; None for the stage "caption"."""
        return self.subject.loaded if isinstance(self.subject, Output) else self.subject

    @property
    def output(self) -> Output | None:
        """The output; None for the stages "caption" and "restore"."""
        return self.subject if isinstance(self.subject, Output) else None


class Costs:
    """Seconds by stage, output, batch and encoding, derived from other keys for those that are missing.

    An unknown batch size is assumed to gain nothing: b times the cost of one image. The cost of an unknown size is
    scaled by area from the nearest known one of the same decoder.
    """

    def __init__(self) -> None:
        """Create an empty table."""
        self._seconds: dict[CostKey, float] = {}
        self._images: dict[tuple[Output, bool, int, bool], float] = {}  # cache of `image`, valid until the next change

    def set(self, key: CostKey, seconds: float) -> None:
        """Set the cost of `key`."""
        self._seconds[key] = seconds
        self._images.clear()

    def remove(self, key: CostKey) -> None:
        """Remove the cost of `key`."""
        del self._seconds[key]
        self._images.clear()

    def cost(self, key: CostKey) -> float:
        """Return the cost of `key`, or 0 if no similar one is known."""
        known = self._seconds.get(key)
        if known is not None:
            return known
        if key.batch > 1:
            return key.batch * self.cost(CostKey(key.stage, key.subject, 1, key.encoding))
        nearest = self.nearest(key)
        return 0.0 if nearest is None else self._seconds[nearest] * _area(key) / _area(nearest)

    def nearest(self, key: CostKey) -> CostKey | None:
        """Return the known key that differs from `key` only in the size of the image, and least; None without one."""
        wanted = _kind(key)
        others = [known for known in self._seconds if isinstance(known.subject, Output) and _kind(known) == wanted]
        return min(others, key=lambda other: abs(_area(other) - _area(key)), default=None)

    def caption(self, batch: int = 1) -> float:
        """Return the cost of encoding a batch of prompts."""
        return self.cost(CostKey("caption", None, batch))

    def restore(self, loaded: Loaded) -> float:
        """Return the cost of moving the weights of a decoder from host memory to a device."""
        return self.cost(CostKey("restore", loaded))

    def condition(self, output: Output) -> float:
        """Return the cost of conditioning one image."""
        return self.cost(CostKey("condition", output))

    def step(self, output: Output, batch: int = 1) -> float:
        """Return the cost of one denoising step of a batch, or of one tile in it."""
        return self.cost(CostKey("step", output.unit, batch))

    def preview(self, output: Output) -> float:
        """Return the cost of a preview of one image on the device, after a step."""
        return self.cost(CostKey("preview", output))

    def finish(self, output: Output) -> float:
        """Return the cost of converting one image to 8 bits and starting its copy to the host."""
        return self.cost(CostKey("finish", output))

    def encode(self, output: Output, encoding: str = PNG_FAST) -> float:
        """Return the cost of encoding one image on the host."""
        return self.cost(CostKey("encode", output, 1, encoding))

    def image(self, output: Output, to_start: bool, steps: int, previews: bool = False) -> float:
        """Return the device seconds that an image with `steps` remaining units of steps needs, run alone.

        `to_start` adds the cost of the conditioning, and `previews` that of a preview after each step.
        """
        key = (output, to_start, steps, previews)
        seconds = self._images.get(key)
        if seconds is None:
            seconds = steps * self.step(output) + self.finish(output)
            seconds += self.condition(output) if to_start else 0.0
            seconds += math.ceil(steps / output.units) * self.preview(output) if previews else 0.0
            self._images[key] = seconds
        return seconds

    def decode(self, output: Output, encoding: str = PNG_FAST, previews: bool = False) -> float:
        """Return the seconds of a decode with four steps, from conditioning to the last byte, on an idle server."""
        encode = self.encode(output, encoding) + (4 * self.encode(output, PREVIEW) if previews else 0.0)
        return self.image(output, True, steps=4 * output.units, previews=previews) + encode

    def table(self) -> Mapping[CostKey, float]:
        """Return a copy of all known costs."""
        return dict(self._seconds)


def _kind(key: CostKey) -> tuple[CostStage, Loaded | None, bool, int, str]:
    """Return what has to be equal for a cost to be derived from another one."""
    tiled = isinstance(key.subject, Output) and key.subject.tiling is not None
    return key.stage, key.loaded, tiled, key.batch, key.encoding


def _area(key: CostKey) -> int:
    return key.subject.size.area if isinstance(key.subject, Output) else 1


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

    def measure(
        self, stage: CostStage, subject: Output | Loaded | None, seconds: float, batch: int = 1, encoding: str = ""
    ) -> None:
        """Record a measurement of the warm-up. The lowest one counts, because the first includes one-time work.

        The costs of other encodings are derived from that of PNG_FAST.
        """
        key = CostKey(stage, subject, batch, encoding)
        lowest = min(seconds, self._records[key].measured) if key in self._records else seconds
        self._add(key, _Record(lowest, lowest))
        if encoding == PNG_FAST:
            for other, ratio in RATIOS.items():
                self._add(CostKey(stage, subject, batch, other), _Record(ratio * lowest, ratio * lowest, count=0.0))

    def observe(
        self,
        stage: CostStage,
        subject: Output | Loaded | None,
        seconds: float,
        now: float,
        batch: int = 1,
        encoding: str = "",
    ) -> None:
        """Add the cost of a request's stage to the running mean, unless its decoder has been unloaded since.

        Images in tiles have any size, so their costs are recorded, per area, for the nearest size of the warm-up.
        """
        key = CostKey(stage, subject, batch, encoding)
        nearest = key if key in self._records else self.nearest(key)
        if nearest is None:
            return
        record = self._records[nearest]
        record.observe(seconds * _area(nearest) / _area(key), now)
        self._publish(nearest, record, record.estimate(now))

    def inherit(self, old: Loaded, new: Loaded) -> None:
        """Begin the estimates of `new` at the baselines of `old` if those are lower: it was measured beside other work.

        Observations raise them again.
        """
        for key, record in list(self._records.items()):
            if key.subject is not None and key.loaded == new and record.count:
                earlier = self._records.get(replace(key, subject=key.subject._replace(version=old.version)))
                if earlier is not None:
                    record.mean = record.baseline = min(record.measured, earlier.baseline)
                    self._publish(key, record, record.mean)

    def forget(self, loaded: Loaded) -> None:
        """Remove the costs of a decoder that has been unloaded."""
        for key in [key for key in self._records if key.loaded == loaded]:
            del self._records[key]
            self.remove(key)
            self.baseline.remove(key)

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
