"""Clients that used the server recently, and the order in which devices serve them."""

from __future__ import annotations

from collections.abc import Iterable

MAX_CLIENTS = 1024  # remembered at once, so that requests from ever new addresses use no memory


class Clients:
    """Record of active clients and of their turns on the devices.

    A turn is a virtual time in device seconds (start-time fair queueing). The client with the lowest turn is served
    first, and serving it raises its turn. The turn of an idle client keeps up with that of the one served last, so that
    it neither saves up device time nor has to wait because it used an idle device before.
    """

    def __init__(self, window: float) -> None:
        """Start without clients; one stays active for `window` seconds after its last request or image."""
        self._window = window
        self._active: dict[str, float] = {}  # until when each client is active
        self._turns: dict[str, float] = {}  # of clients ahead of the current turn
        self._current = 0.0  # turn of the client served last

    def seen(self, clients: Iterable[str], now: float) -> None:
        """Record that each of `clients` sends a request, accepted or not, or has an admitted image."""
        for client in clients:
            self._extend(client, now + self._window)

    def rejected(self, client: str, now: float, retry_after: float) -> None:
        """Record that a request of `client` was rejected: the client stays active until it has had time to retry."""
        self._extend(client, now + retry_after + self._window)

    def active(self, now: float) -> int:
        """Return the number of active clients."""
        self._active = {client: until for client, until in self._active.items() if until >= now}
        return len(self._active)

    def turn(self, client: str) -> float:
        """Return the turn of `client`."""
        return max(self._current, self._turns.get(client, 0.0))

    def served(self, client: str, seconds: float) -> None:
        """Record that `client` used a device for `seconds`."""
        turn = self.turn(client)
        self._current = turn
        self._turns[client] = turn + seconds
        if len(self._turns) > MAX_CLIENTS:
            self._current = min(self._turns.values())
        self._turns = {other: turn for other, turn in self._turns.items() if turn > self._current}

    def _extend(self, client: str, until: float) -> None:
        self._active[client] = max(until, self._active.get(client, until))
        if len(self._active) > MAX_CLIENTS:
            del self._active[min(self._active, key=self._active.__getitem__)]
