"""Data types of the scheduler: jobs, limits, plans."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar

from server.scheduling.costs import PNG_FAST, Loaded, Output

Payload = TypeVar("Payload")

by_rank = attrgetter("rank")  # sort key: the order in which the forecast runs jobs


class Priority(enum.IntEnum):
    """Priority class of a job; a lower number is more urgent."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2


class JobState(enum.StrEnum):
    """State of a job in the scheduler."""

    QUEUED = "queued"
    RUNNING = "running"  # on a device, between condition and the last step
    ENCODING = "encoding"  # between the last step and the last byte
    ENDED = "ended"


@dataclass(eq=False)
class Job(Generic[Payload]):
    """One image to decode. The scheduler owns the fields below `payload`; the caller must not change them."""

    output: Output
    steps: tuple[int, ...]  # indices of all denoising steps, in order
    priority: Priority = Priority.STANDARD
    deadline: float = math.inf  # seconds, on the clock that `now` is read from
    client: str = ""  # who sent the request, for fair shares; "" if all clients count as one
    encoding: str = PNG_FAST  # how the image is encoded; a key of the cost table
    strips: int = 1  # pieces that several encoder threads can encode at once
    previews: bool = False  # whether a preview follows each step
    prompt: str | None = None  # what has to be encoded before the image can start
    payload: Payload = field(kw_only=True)
    loaded: Loaded = field(init=False)  # the decoder
    unit: Output = field(init=False)  # what a device runs at once
    units: int = field(init=False)  # of all steps
    bucket: str = field(init=False)  # size of a unit and decoder, for fair shares
    state: JobState = JobState.QUEUED
    device: str | None = None
    steps_done: int = 0  # in units: a step of an image in tiles counts once per tile
    admitted: float = 0.0
    rank: tuple[float, int] = (math.inf, 0)  # deadline or default deadline, then order of arrival
    cancelled: bool = False
    ready: float = 0.0  # predicted time at which an image in the state ENCODING leaves its device
    encode_began: float | None = None  # time of the first strip
    rows_begun: float = 0.0  # fraction of the rows that encoder threads have begun
    rows_encoded: float = 0.0  # fraction

    def __post_init__(self) -> None:
        self.loaded = self.output.loaded
        self.unit, self.units = self.output.unit, len(self.steps) * self.output.units
        self.bucket = str(self.unit)

    @property
    def steps_left(self) -> int:
        """Number of units of denoising steps still to run."""
        return self.units - self.steps_done

    @property
    def step_number(self) -> int:
        """Number of the next denoising step of this job, from 0."""
        return self.steps_done // self.output.units

    @property
    def next_step(self) -> int:
        """Index of the next denoising step."""
        return self.steps[self.step_number]

    @property
    def preview_follows(self) -> bool:
        """Whether a preview follows the next unit."""
        return self.previews and (self.steps_done + 1) % self.output.units == 0


@dataclass(frozen=True)
class Pool:
    """Part of the queue that the requests of some classes share."""

    classes: tuple[Priority, ...]
    share: float = 1.0

    @property
    def subject(self) -> str:
        """Beginning of a message about the pool."""
        return "The queue" if self.share == 1 else f"The queue's share for {self.classes[0].name.lower()} requests"


@dataclass(frozen=True)
class Limits:
    """Limits and tuning constants of a scheduler."""

    queue_images: int = 64  # queued images, not counting those on a device
    queue_seconds: float = 60.0  # predicted seconds of admitted work, per device
    slots: int = 2  # images on one device at once, running or paused
    encoder_threads: int = 1
    max_prompts: int = 1  # that the text encoder encodes at once
    aging: float = 10.0  # seconds of waiting that raise a job by one priority class
    default_deadline: float = 60.0  # seconds after admission; ranks jobs without a deadline or with a later one
    min_batch_gain: float = 1.05  # minimum throughput of a batch relative to single images
    prediction_margin: float = 0.05  # fraction by which the actual wait may exceed the predicted one
    fairness_window: float = 2.0  # seconds after Retry-After for which a rejected output or client keeps its claim
    client_window: float = 10.0  # seconds after its last request during which a client counts as active
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of queue and time: interactive, standard and batch, batch
    resident: int | None = None  # decoders whose weights are on a device at once; None: all

    def pools(self, priority: Priority) -> tuple[Pool, ...]:
        """Return the pools that a request of this class uses, beginning with the whole queue."""
        interactive, standard, batch = Priority
        parts = ((interactive,), (standard, batch), (batch,))
        pools = (Pool(classes, share) for classes, share in zip(parts, self.shares, strict=True))
        return Pool(tuple(Priority)), *(pool for pool in pools if pool.share < 1 and priority in pool.classes)

    def images(self, pool: Pool) -> int:
        """Maximum number of queued images of `pool`."""
        return max(1, math.floor(pool.share * self.queue_images))

    def seconds(self, pool: Pool) -> float:
        """Maximum predicted work of `pool`, in seconds per device."""
        return pool.share * self.queue_seconds


@dataclass(frozen=True)
class DevicePlan(Generic[Payload]):
    """Next work of a device, in the order of the fields.

    Release `drop`, unload decoders, move the weights of others to host memory and those of one back, start `start`, and
    run one step of `batch`.
    """

    drop: tuple[Job[Payload], ...] = ()
    unload: tuple[Loaded, ...] = ()
    offload: tuple[Loaded, ...] = ()
    restore: Loaded | None = None
    start: tuple[Job[Payload], ...] = ()
    batch: tuple[Job[Payload], ...] = ()
