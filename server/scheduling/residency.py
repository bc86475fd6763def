"""Which decoders have their weights on a device, if not all do (`Limits.resident`): the last ones that were used."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from server.scheduling.costs import Costs, Loaded

Resident = list[Loaded]  # on one device, least recently used first

KEEP_FACTOR = 4.0  # after weights were moved to a device: multiple of that time for which resident ones are preferred


def use(resident: Resident, loaded: Loaded, limit: int) -> bool:
    """Make `loaded` the decoder that was used last; return whether its weights were in host memory.

    The least recently used decoders make room for it, so that at most `limit` are resident.
    """
    missing = loaded not in resident
    if not missing:
        resident.remove(loaded)
    resident.append(loaded)
    del resident[:-limit]
    return missing


class Residency:
    """Decides which weights move to a device and which leave it."""

    def __init__(self, resident: Mapping[str, Resident], costs: Costs, limit: int | None) -> None:
        """Take over `resident`, by device, which others only read; `limit` is None if no weights move."""
        self._resident, self._costs, self._limit = resident, costs, limit
        self._kept_until = dict.fromkeys(resident, -math.inf)

    def seconds(self, device: str, loaded: Loaded) -> float:
        """Return the predicted time to move the weights of a decoder to `device`; 0 if they are there."""
        away = self._limit is not None and loaded not in self._resident[device]
        return self._costs.restore(loaded) if away else 0.0

    def moves(self, device: str, loaded: Loaded) -> int:
        """Return how many decoders' weights would have to move to use a decoder on `device`: in, or in and out."""
        if self._limit is None or loaded in self._resident[device]:
            return 0
        return 1 if len(self._resident[device]) < self._limit else 2

    def kept(self, device: str, now: float) -> Collection[Loaded]:
        """Return the decoders whose images are preferred, so that moving weights takes only a part of the time."""
        return self._resident[device] if now < self._kept_until[device] else ()

    def move(self, device: str, loaded: Loaded, now: float) -> tuple[tuple[Loaded, ...], Loaded | None]:
        """Use a decoder; return those whose weights have to leave `device` for it, and itself if its own have to move.

        Weights are recorded as moved at once.
        """
        if self._limit is None:
            return (), None
        before = tuple(self._resident[device])
        if not use(self._resident[device], loaded, self._limit):
            return (), None
        self._kept_until[device] = now + (1 + KEEP_FACTOR) * self._costs.restore(loaded)
        return tuple(other for other in before if other not in self._resident[device]), loaded

    def remove(self, device: str, loaded: Loaded) -> None:
        """Record that the weights of a decoder are not on `device`, because it was unloaded or they did not fit."""
        if loaded in self._resident[device]:
            self._resident[device].remove(loaded)
