"""Replacement of decoders while the server runs: load and warm up the new one, switch, then unload the old one."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from engines.errors import ConfigError, DeviceLostError, DeviceMemoryError, PidError
from engines.runtime.cuda_graphs import return_unused_memory
from engines.runtime.memory_plan import MemoryItem, MemoryPlan
from engines.runtime.protocol import Runtime
from server.decoders import Runtimes
from server.lifecycle import State
from server.service import DecodeService

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 2.0  # between checks of the symbolic links
START_POLL_SECONDS = 0.2
UNLOAD_POLL_SECONDS = 0.05


class Candidate(Protocol):
    """A decoder that can be loaded. `str()` says where it comes from."""

    @property
    def identity(self) -> str:
        """Text that differs between decoders that differ."""

    def memory(self) -> Mapping[str, MemoryPlan]:
        """Return the planned memory by device, including shared parts."""

    def lack(self, freed: Mapping[str, int]) -> str | None:
        """Return why it cannot be opened alone with the free memory of its devices and these bytes more, by device.

        None if nothing is known that prevents it.
        """

    def alone(self) -> Candidate:
        """Return a copy whose runtimes share no memory with others, so that it can be opened while they are in use."""

    def open(self) -> Mapping[str, Runtime]:
        """Open it on each device; return the runtimes by device, not warmed up. Raises PidError."""


class DecoderSource(Protocol):
    """Where the decoders come from. Methods are called from one thread at a time."""

    def find_all(self) -> Mapping[str, Candidate]:
        """Return all decoders by name. Raises PidError."""

    def find(self, name: str) -> Candidate:
        """Return the current candidate of a decoder, with separate memory. Raises PidError."""

    def is_moved(self, name: str) -> bool:
        """Return whether the source of a decoder has been pointed to something else since the last `find`."""


@dataclass(frozen=True)
class FixedDecoder:
    """Runtimes by device that are never replaced; implements `Candidate`."""

    runtimes: Mapping[str, Runtime]
    identity: str = ""

    def memory(self) -> Mapping[str, MemoryPlan]:
        """Return nothing: what it needs is not known."""
        return {}

    def lack(self, freed: Mapping[str, int]) -> str | None:
        """Return None."""
        return None

    def alone(self) -> FixedDecoder:
        """Return the decoder itself."""
        return self

    def open(self) -> Mapping[str, Runtime]:
        """Return the runtimes."""
        return self.runtimes


class FixedDecoders:
    """Decoders that are never replaced; implements `DecoderSource`."""

    def __init__(self, runtimes: Runtimes) -> None:
        """Create a source of the decoders with these runtimes."""
        self._decoders = {name: FixedDecoder(by_device) for name, by_device in runtimes.items()}

    def find_all(self) -> Mapping[str, Candidate]:
        """Return all decoders."""
        return self._decoders

    def find(self, name: str) -> Candidate:
        """Return the decoder."""
        return self._decoders[name]

    def is_moved(self, name: str) -> bool:
        """Return False."""
        return False


class _EndingError(Exception):
    """The server shuts down during a replacement."""


class Swaps:
    """Thread that replaces decoders on request, and those whose source moves.

    The new decoder is loaded and warmed up beside the old one, which serves meanwhile. From the switch on, requests are
    admitted for the new one; the old one is unloaded when its last image is done. If the memory of a device does not
    suffice for both, the old one is unloaded first, and the server is not ready until the new one is warm. A decoder
    that cannot be used changes nothing.
    """

    def __init__(self, service: DecodeService, source: DecoderSource, used: Mapping[str, Candidate]) -> None:
        """Create the thread for the decoders of `service`, which come from `source` and are `used` at the start."""
        self._service, self._source, self._used = service, source, dict(used)
        self._requested, self._stopping = threading.Event(), threading.Event()
        self._current: tuple[str, float] | None = None  # decoder that the thread checks or replaces, since when
        for name in used:
            service.metrics.swap_seconds.labels(name).set_function(partial(self._seconds, name))
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="bundle swaps", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; `loop` is the event loop of the service."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current work, without waiting for it."""
        self._stopping.set()
        self._requested.set()

    def request(self) -> None:
        """Check the sources of all decoders, and replace those that changed. May be called from any thread."""
        self._requested.set()

    def memory(self) -> list[tuple[str, MemoryItem]]:
        """Return the device and the size of each part of the memory of the decoders in use, with shared ones once."""
        plans = self._planned(list(self._used.values()))
        return [(device, item) for device, plan in plans.items() for item in plan.items]

    def _planned(self, candidates: Iterable[Candidate]) -> dict[str, MemoryPlan]:
        """Return what decoders need together, by device."""
        items: dict[str, dict[MemoryItem, None]] = {}
        for candidate in candidates:
            for device, plan in candidate.memory().items():
                items.setdefault(device, {}).update(dict.fromkeys(plan.items))
        resident = self._service.decoders.resident
        return {device: MemoryPlan(tuple(each), resident) for device, each in items.items()}

    def _freed_without(self, name: str) -> dict[str, int]:
        """Return the bytes that are free once a decoder is unloaded, by device."""
        others = self._planned(used for other, used in self._used.items() if other != name)
        with_it = self._planned(self._used.values())
        return {
            device: plan.nbytes - others[device].nbytes if device in others else plan.nbytes
            for device, plan in with_it.items()
        }

    def _run(self) -> None:
        while self._service.lifecycle.state is State.STARTING and not self._stopping.wait(START_POLL_SECONDS):
            pass
        while not self._is_ending():
            requested = self._requested.wait(POLL_SECONDS)
            self._requested.clear()
            for name in self._service.decoders:
                if not self._is_ending():
                    self._check(name, requested)

    def _check(self, name: str, requested: bool) -> None:
        """Replace a decoder if its source has moved or, on request, if it has changed."""
        self._current = name, time.monotonic()
        try:
            if requested or self._is_moved(name):
                self._swap(name)
        finally:
            self._current = None

    def _seconds(self, name: str) -> float:
        """Return how long the thread has been busy with a decoder; called on other threads, also while it hangs."""
        current = self._current
        return time.monotonic() - current[1] if current is not None and current[0] == name else 0.0

    def _is_ending(self) -> bool:
        return self._stopping.is_set() or self._service.lifecycle.state in (State.DRAINING, State.FAILED)

    def _is_moved(self, name: str) -> bool:
        try:
            return self._source.is_moved(name)
        except OSError:  # such as a symbolic link that points to itself
            return False

    def _swap(self, name: str) -> None:
        """Replace a decoder if its source has changed; log and count a failure."""
        try:
            candidate = self._source.find(name)
            if candidate.identity == self._used[name].identity:
                log.info("%s: the bundle has not changed", name)
                return
            self._wait_until_unloaded()
            log.info("%s: loading %s", name, candidate)
            if not self._replace_beside(name, candidate):
                self._replace_in_place(name, candidate)
            self._used[name] = candidate
        except _EndingError:
            log.info("%s: the bundle is not replaced, because the server shuts down", name)
        except DeviceLostError as error:
            self._service.device_lost(str(error))
        except PidError as error:
            self._service.metrics.swaps.labels(name, "failed").inc()
            log.error("%s: the bundle cannot be used; the old one stays in use: %s", name, error)
        except Exception:
            if self._is_ending():
                return
            self._service.metrics.swaps.labels(name, "failed").inc()
            log.exception("%s: the bundle could not be replaced; the old one stays in use", name)
        else:
            self._service.metrics.swaps.labels(name, "done").inc()
            log.info("%s: now uses %s", name, candidate)

    def _replace(self, name: str, candidate: Candidate) -> None:
        """Load and warm up `candidate`, switch to it, and let the old decoder be unloaded."""
        decoder = self._service.switch.prepare(name, candidate.open())
        self._on_loop(lambda: self._service.switch.replace(decoder))

    def _replace_beside(self, name: str, candidate: Candidate) -> bool:
        """Replace a decoder as `_replace` does; return False if the memory of a device does not suffice for both.

        By then, the error refers to no runtime any more, so that the memory is free again.
        """
        try:
            self._replace(name, candidate)
        except DeviceMemoryError as error:
            log.warning("%s: no memory for both bundles; the old one is unloaded first: %s", name, error)
        else:
            return True
        return_unused_memory()
        return False

    def _replace_in_place(self, name: str, candidate: Candidate) -> None:
        """Unload the old decoder, then load `candidate`, or the old one again if that fails.

        Nothing is unloaded if the memory would not suffice for one of them even then: what decoders share is in use by
        the others, so that a decoder that is loaded later needs more than one of the start.
        """
        freed = self._freed_without(name)
        for each in (candidate, self._used[name]):
            if (reason := each.lack(freed)) is not None:
                raise DeviceMemoryError(reason)
        self._on_loop(lambda: self._service.switch.suspend(name))
        self._wait_until_unloaded()
        reason = self._attempt(name, candidate)
        if reason is None:
            return
        return_unused_memory()
        log.warning("%s: loading the old bundle again", name)
        self._used[name] = old = self._used[name].alone()
        again = self._attempt(name, old)
        if again is not None:
            raise DeviceLostError(f"Neither bundle of {name} can be loaded. The new one: {reason} The old one: {again}")
        raise ConfigError(reason)

    def _attempt(self, name: str, candidate: Candidate) -> str | None:
        """Replace a decoder as `_replace` does; return why that failed, without an error that refers to runtimes."""
        try:
            self._replace(name, candidate)
        except DeviceLostError:
            raise
        except PidError as error:
            return str(error)
        except Exception as error:
            log.exception("%s: %s could not be loaded", name, candidate)
            return f"{type(error).__name__}."
        return None

    def _wait_until_unloaded(self) -> None:
        """Wait until the devices have unloaded what was replaced or suspended, so that its memory is free."""
        while self._service.switch.is_unloading():
            if self._stopping.wait(UNLOAD_POLL_SECONDS):
                raise _EndingError

    def _on_loop(self, work: Callable[[], T]) -> T:
        """Call `work` on the event loop and return its result: submissions do not overlap with it there."""
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        return future.result()
