"""Structured logs on standard output, written by a thread of their own."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.log_formats import FORMATTERS, JsonFormatter, LogFormat
from server.process.descriptors import open_standard_streams
from server.process.writer import LineWriter

ACCESS_LOG = "server.requests"
REPEATS = 10  # lines per call site and period
PERIOD = 10.0  # seconds
FLUSH_SECONDS = 1.0
STDOUT, STDERR = 1, 2  # file descriptors

log = logging.getLogger(__name__)


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

    def __init__(
        self,
        descriptor: int,
        limit: RepeatLimit,
        clock: Callable[[], float] = time.monotonic,
        formatter: logging.Formatter | None = None,
    ) -> None:
        """Start the thread that writes to `descriptor`; the default format is JSON."""
        super().__init__()
        self.setFormatter(formatter or JsonFormatter())
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
            line = self.format(_record(logging.ERROR, record.name, "%r: %r", record.msg, error))
        self.writer.write(line.encode() + b"\n")

    def _report_dropped(self, count: int) -> bytes:
        message = "%d log lines were dropped because stdout was not read or could not be written"
        return self.format(_record(logging.WARNING, log.name, message, count)).encode() + b"\n"


def _record(level: int, logger: str, message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord(logger, level, __file__, 0, message, arguments, None)


def configure(level: str, log_format: LogFormat = "json") -> None:
    """Send records of at least `level` ("info", …) from all loggers, and Python's warnings, to standard output."""
    open_standard_streams()
    handler = LogHandler(STDOUT, RepeatLimit(), formatter=FORMATTERS[log_format]())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
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
