"""Time that a device spends on images, some of which can start only later."""

from __future__ import annotations

from bisect import insort


class Timeline:
    """Busy intervals of a device that runs images in the order in which they are added, the first one foremost.

    An image runs from the time at which it can start, in the time that earlier ones leave free, with interruptions.
    """

    def __init__(self, free: float) -> None:
        """Create the timeline of a device that is busy until `free`."""
        self._free = free
        self._busy: list[tuple[float, float]] = []  # after `_free`, disjoint, in order

    def add(self, start: float, seconds: float) -> float:
        """Add an image that can start at `start` and needs `seconds`; return when it ends."""
        now, left = max(start, self._free), seconds
        pieces = []
        for begin, end in self._busy:
            if now + left <= begin:
                break
            if now < begin:
                pieces.append((now, begin))
                left -= begin - now
            now = max(now, end)
        pieces.append((now, now + left))
        for piece in pieces:
            insort(self._busy, piece)
        while self._busy and self._busy[0][0] <= self._free:
            self._free = max(self._free, self._busy.pop(0)[1])
        return now + left
