"""Structured logs: one JSON object per line on standard output, written by a thread of their own."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from server.process.descriptors import open_standard_streams
from server.process.writer import LineWriter

ACCESS_LOG = "server.requests"
REPEATS = 10  # lines per call site and period
PERIOD = 10.0  # seconds
FLUSH_SECONDS = 1.0
STDOUT, STDERR = 1, 2  # file descriptors

log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """Formatter that writes a record as one JSON object; `extra={"fields": {...}}` adds members to it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON text of `record`, with the traceback of an exception."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@dataclass
class _Site:
    """A call site that logs, in the current period."""

    began: float
    name: str
    level: int
    count: int = 0
    suppressed: str = ""  # the last message that was suppressed


def _message(record: logging.LogRecord) -> str:
    """Return the message of a record, or its format if the arguments do not match it."""
    try:
        return record.getMessage()
    except Exception:  # a mistake in a log call must not harm the caller
        return str(record.msg)


class RepeatLimit:
    """Limit on the lines that each call site may log per period. The access log is exempt."""

    def __init__(self, repeats: int = REPEATS, period: float = PERIOD) -> None:
        self._repeats, self._period = repeats, period
        self._sites: dict[tuple[str, int], _Site] = {}

    def accept(self, record: logging.LogRecord, now: float) -> bool:
        """Count a record at the time `now` in seconds; return whether it may be logged."""
        if record.name == ACCESS_LOG:
            return True
        key = record.pathname, record.lineno
        if key not in self._sites:
            self._sites[key] = _Site(now, record.name, record.levelno)
        site = self._sites[key]
        site.count += 1
        if site.count <= self._repeats:
            return True
        site.suppressed = _message(record)[:200]
        return False

    def ended(self, now: float = math.inf) -> Iterator[logging.LogRecord]:
        """Forget the periods that have ended at `now`; yield a record for each that had lines suppressed."""
        for key in [key for key, site in self._sites.items() if now - site.began >= self._period]:
            site = self._sites.pop(key)
            suppressed = site.count - self._repeats
            if suppressed > 0:
                message, arguments = "suppressed %d more lines like this one: %s", (suppressed, site.suppressed)
                yield logging.LogRecord(site.name, site.level, *key, message, arguments, None)


class LogHandler(logging.Handler):
    """Handler that formats records on the thread that logs, because arguments may change, and never waits."""

    def __init__(self, descriptor: int, limit: RepeatLimit, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the thread that writes to `descriptor`."""
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._limit, self._clock = limit, clock
        self.writer = LineWriter(descriptor, self._report_dropped)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record as a line, unless its call site has reached the limit."""
        now = self._clock()
        for summary in self._limit.ended(now):
            self._write(summary)
        if self._limit.accept(record, now):
            self._write(record)

    def flush(self) -> None:
        """Log the numbers of suppressed lines and wait a second at most until all lines are written.

        `logging.shutdown` calls it before the process ends.
        """
        for summary in self._limit.ended():
            self._write(summary)
        self.writer.flush(FLUSH_SECONDS)

    def _write(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # a mistake in a log call must not harm the caller
            line = json.dumps({"level": "error", "logger": record.name, "message": f"{record.msg!r}: {error!r}"})
        self.writer.write(line.encode() + b"\n")

    def _report_dropped(self, count: int) -> bytes:
        message = "%d log lines were dropped because stdout was not read or could not be written"
        record = logging.LogRecord(log.name, logging.WARNING, __file__, 0, message, (count,), None)
        return self.format(record).encode() + b"\n"


def configure(level: str) -> None:
    """Send records of at least `level` ("info", …) from all loggers, and Python's warnings, to standard output."""
    open_standard_streams()
    logging.basicConfig(level=level.upper(), handlers=[LogHandler(STDOUT, RepeatLimit())], force=True)
    # Everything that Python itself would print to stderr, which may be a pipe that nobody reads.
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_exception
    sys.unraisablehook = _log_unraisable
    logging.getLogger("numba").setLevel(logging.ERROR)  # logs every compiler pass


def dropped_lines() -> int:
    """Return the number of lines that were dropped because nobody read standard output."""
    return sum(handler.writer.dropped for handler in logging.getLogger().handlers if isinstance(handler, LogHandler))


def print_error(message: str) -> None:
    """Print a message to stderr, unless it is closed, or has been full for a second."""
    with contextlib.suppress(OSError):
        if select.select((), (STDERR,), (), FLUSH_SECONDS)[1]:
            os.write(STDERR, f"{message}\n".encode(errors="replace"))


def _log_thread_exception(arguments: threading.ExceptHookArgs) -> None:
    name = arguments.thread.name if arguments.thread else "unknown"
    log.error("the thread %s ended", name, exc_info=arguments.exc_value)


def _log_unraisable(arguments: sys.UnraisableHookArgs) -> None:
    log.error("ignored an exception in %r", arguments.object, exc_info=arguments.exc_value)
