"""Threads that run devices: one that fails must not stop silently."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engines.errors import BundleError, ConfigError, DeviceMemoryError, PidError
from server.dispatch import Clock, Dispatcher
from server.metrics import Metrics

log = logging.getLogger(__name__)

_lost: list[object] = []  # kept until the process ends: freeing pinned memory after the loss of a device aborts it


@dataclass(frozen=True)
class ThreadContext:
    """Objects and callbacks that all these threads share."""

    dispatcher: Dispatcher
    metrics: Metrics
    on_ready: Callable[[], None]  # called after the warm-up of each device
    on_lost: Callable[[str], None]  # called with a reason if a thread ends unexpectedly
    on_start_error: Callable[[PidError], None]  # called if a device works but cannot be warmed up
    clock: Clock = time.monotonic
    cpu_threads: int = 1  # threads of PyTorch, per device


class DeviceThread(ABC):
    """Thread that warms a device up and then serves requests with it.

    An unexpected exception ends the thread and marks the device as lost, because its state is unknown afterwards.
    """

    def __init__(self, name: str, device: object, context: ThreadContext) -> None:
        """Create the thread `name` of `device`, whatever represents it."""
        self.name = name
        self._device = device
        self._dispatcher, self._metrics, self._clock = context.dispatcher, context.metrics, context.clock
        self._context = context
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for the thread to end; it does so once the dispatcher has stopped."""
        self._thread.join(timeout)

    @abstractmethod
    def _warm_up(self) -> None:
        """Prepare the device and measure its costs."""

    @abstractmethod
    def _serve(self) -> None:
        """Work until the dispatcher stops."""

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._context.cpu_threads)  # applies to this thread, which starts them in the warm-up
            if not self._warmed_up():
                return
            self._context.on_ready()
            self._serve()
        except BaseException as error:
            _lost.append(self._device)
            message = f": {error}" if isinstance(error, PidError) else "."
            self._context.on_lost(f"The thread of {self.name} ended: {type(error).__name__}{message}")
            log.critical("the thread of %s ended", self.name, exc_info=error)

    def _warmed_up(self) -> bool:
        """Warm up. Return False if that failed although the device works: for lack of memory, or of a compiler."""
        try:
            self._warm_up()
        except (BundleError, ConfigError, DeviceMemoryError) as error:
            self._context.on_start_error(error)
            # The message contains the remedy, so the traceback is logged for debugging only.
            traceback = error if log.isEnabledFor(logging.DEBUG) else None
            log.critical("%s cannot be used: %s", self.name, error, exc_info=traceback)
            return False
        return True
