"""What is scheduled, and within which limits: plain data."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

from engines.size import Size


class Priority(enum.IntEnum):
    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2


class JobState(enum.StrEnum):
    QUEUED = "queued"
    RUNNING = "running"  # on a device, between condition and finish
    ENDED = "ended"


@dataclass(eq=False)
class Job:
    """One image. The scheduler owns everything below `payload`."""

    size: Size
    steps: tuple[int, ...]  # step indices still to be taken, in order, when it is admitted
    priority: Priority = Priority.STANDARD
    deadline: float = math.inf  # on the scheduler's clock, seconds
    payload: Any = None
    state: JobState = JobState.QUEUED
    device: str | None = None
    steps_done: int = 0
    admitted: float = 0.0
    rank: tuple[float, int] = (math.inf, 0)  # when it is due, then the order of arrival
    cancelled: bool = False

    @property
    def steps_left(self) -> int:
        return len(self.steps) - self.steps_done

    @property
    def next_step(self) -> int:
        return self.steps[self.steps_done]


@dataclass(frozen=True)
class Limits:
    queue_images: int = 64  # waiting, not counting those on a device
    queue_seconds: float = 60.0  # predicted work waiting, per device
    slots: int = 2  # images on one device at once, running or paused
    max_batch: int = 1
    aging: float = 10.0  # seconds of waiting that raise an image by one class
    default_deadline: float = 60.0  # seconds after which an image without a deadline is due all the same
    min_batch_gain: float = 1.05  # images per second, against one by one, from which a batch pays
    prediction_margin: float = 0.05  # share of a predicted wait by which it may turn out longer
    fairness_window: float = 2.0  # seconds for which a size that was crowded out keeps its claim to an equal share
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of the queue, for each class together with those below it

    def images(self, priority: Priority) -> int:
        """How many images of this class and those below it may wait."""
        return max(1, math.floor(self.shares[priority] * self.queue_images))


@dataclass(frozen=True)
class DevicePlan:
    """What a device does next: let go of `drop`, then start `start`, then one step for all of `batch`."""

    drop: tuple[Job, ...] = ()
    start: tuple[Job, ...] = ()
    batch: tuple[Job, ...] = ()
