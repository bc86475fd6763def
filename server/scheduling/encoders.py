"""Simulation of the encoder threads: when the images that leave the devices are encoded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from typing import Any, NamedTuple

from server.scheduling.jobs import Job


class ReadyImage(NamedTuple):
    """An image that leaves its device to be encoded. Images are compared by `ready`, then `rank`, which is unique."""

    ready: float  # time at which the image leaves its device
    rank: tuple[float, int]
    work: float  # thread-seconds left
    width: int  # maximum number of threads that can encode it at once
    job: Job[Any]
    begun: bool = False


def encoded(images: Iterable[ReadyImage], threads: int) -> Iterator[tuple[Job[Any], float]]:
    """Yield the job of each image and the time at which it is encoded.

    Each image gets as many threads as it can use, in order of rank. An image of several strips is a fluid: it yields
    its threads to a more urgent one at once, although a thread really completes its strip first. An image of one strip
    keeps its thread.
    """
    arrivals = sorted(images)
    waiting: list[tuple[tuple[float, int], float, int, Job[Any]]] = []  # heap of rank, work left, width, job
    now, position = -math.inf, 0
    while waiting or position < len(arrivals):
        if not waiting:
            image = arrivals[position]
            now, end = max(now, image.ready), max(now, image.ready) + image.work / image.width
            if position + 1 == len(arrivals) or end <= arrivals[position + 1].ready:  # the encoder is idle until then
                position += 1
                yield image.job, end
                continue
        while position < len(arrivals) and arrivals[position].ready <= now:
            image = arrivals[position]
            heappush(waiting, (_held(image.rank) if image.begun else image.rank, image.work, image.width, image.job))
            position += 1
        until = arrivals[position].ready if position < len(arrivals) else math.inf
        active, free = [], threads
        while waiting and free:
            rank, work, width, job = heappop(waiting)
            rate = min(free, width)
            free -= rate
            end = now + work / rate
            active.append((end, rank, work, width, job, rate))
            until = min(until, end)
        for end, rank, work, width, job, rate in active:
            if end <= until:  # compared as rounded, since work that is too short to change the time must end as well
                yield job, until
            else:
                left = work - rate * (until - now)
                heappush(waiting, (_held(rank) if width == 1 else rank, left, width, job))
        now = until


def _held(rank: tuple[float, int]) -> tuple[float, int]:
    """Return a rank before all others, for an image that keeps its thread."""
    return -math.inf, rank[1]
