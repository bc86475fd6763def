"""Shows the progress of a build: a line for each phase and, on a terminal, a bar with the time below the lines."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TextIO

from engines.compile.duration import Phase

_TICK = 1.0  # seconds between updates of the bar
_LONGEST_BAR, _SHORTEST_BAR = 30, 8  # columns
_KNOWN = 0.1  # part of the work from which the duration of the rest is estimated
_DEFAULT_COLUMNS = 80
_ERASE = "\r\x1b[J"  # to the beginning of the line; erase to the end of the screen
_UP = "\x1b[A"


class Display(Protocol):
    """Reports what a build does."""

    def expect(self, phases: Sequence[Phase]) -> None:
        """Announce all phases of the build, of which a resumed one skips some."""

    def __call__(self, stage: str, detail: str) -> None:
        """Report that a phase begins."""


@contextlib.contextmanager
def shown_on(stream: TextIO, check: Callable[[], None]) -> Iterator[Display]:
    """Return a display on a stream: lines, and a bar if it is a terminal. The bar is removed at the end of the block.

    Args:
        stream: Stream to write to. Errors of writing are ignored, since it may be a closed pipe or on a full disk.
        check: Called when a phase begins; may raise to end the build.
    """
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield Lines(stream, check)
        return
    bar = Bar(stream, check)
    with contextlib.redirect_stderr(Above(bar)), bar.refreshed():
        yield bar


class Lines:
    """Display that prints one line per phase."""

    def __init__(self, stream: TextIO, check: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock; the arguments are those of `shown_on`."""
        self._stream, self._check, self._clock = stream, check, clock
        self._start = clock()

    def expect(self, phases: Sequence[Phase]) -> None:
        """Ignore the phases."""

    def __call__(self, stage: str, detail: str) -> None:
        """Print a line."""
        self._check()
        self._write(self._line(stage, detail))

    def _line(self, stage: str, detail: str) -> str:
        return f"[{self._clock() - self._start:7.1f} s] {stage:<9} {detail}\n"

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


class Bar(Lines):
    """Display that also draws a bar on the last line of a terminal: stage, progress, elapsed and remaining time."""

    def __init__(self, stream: TextIO, check: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Draw nothing yet; the arguments are those of `shown_on`."""
        super().__init__(stream, check, clock)
        self._lock = threading.RLock()
        self._estimate = Estimate([])
        self._stage = ""  # empty: no bar
        self._drawn = 0  # columns of the bar on the screen
        self._line_is_open = False  # a message above the bar does not end with a line feed yet

    def expect(self, phases: Sequence[Phase]) -> None:
        """Estimate the remaining time from these phases."""
        self._estimate = Estimate(phases)

    def __call__(self, stage: str, detail: str) -> None:
        """Print a line above the bar and show the new stage."""
        self._check()
        with self._lock:
            self._stage = stage
            self._estimate.begin(stage, self._clock())
            self.print_above(("\n" if self._line_is_open else "") + self._line(stage, detail))

    def print_above(self, text: str) -> None:
        """Print a message where the bar is, and the bar again below it."""
        with self._lock:
            if text:
                self._write(self._erased() + text)
                self._line_is_open = not text.endswith("\n")
                self.draw()

    def draw(self) -> None:
        """Draw the bar with the current time."""
        with self._lock:
            if not self._stage or self._line_is_open:
                return
            erased = self._erased()
            text = self._text(self._columns() - 1)  # a full line could wrap
            self._drawn = len(text)
            self._write(erased + text)

    @contextlib.contextmanager
    def refreshed(self) -> Iterator[None]:
        """Draw the bar every second, also while native code runs, and remove it at the end of the block."""
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(_TICK):
                self.draw()

        thread = threading.Thread(target=tick, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._write(self._erased())
            self._stage = ""

    def _erased(self) -> str:
        """Return the text that erases the bar, which has several rows if the terminal has become narrower."""
        rows = -(-self._drawn // self._columns())
        self._drawn = 0
        return (_UP * (rows - 1) + _ERASE) if rows else ""

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _DEFAULT_COLUMNS
        except (OSError, ValueError):  # closed, or not the descriptor of a terminal
            return _DEFAULT_COLUMNS

    def _text(self, width: int) -> str:
        """Return the bar in at most `width` columns. If there is little space, the less important parts are omitted."""
        now = self._clock()
        stage, times = f"{self._stage:<9}", format_duration(now - self._start)
        remaining = self._estimate.remaining(now)
        if remaining is not None and len(both := f"{times}, {format_remaining(remaining)}") < width - len(stage):
            times = both
        space = min(_LONGEST_BAR, width - len(f"{stage} [] {times}"))
        if space < _SHORTEST_BAR:
            return f"{stage} {times}"[:width]
        filled = int(space * self._estimate.done(now))
        return f"{stage} [{'#' * filled}{'-' * (space - filled)}] {times}"


class Above(io.TextIOBase):
    """Text stream that prints above a bar, for warnings and logs during the build."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def write(self, text: str) -> int:
        """Print above the bar."""
        self._bar.print_above(text)
        return len(text)

    def isatty(self) -> bool:
        """Return True: there is only a bar on a terminal."""
        return True


class Estimate:
    """Estimates when a build ends, from the time that its phases have needed so far."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self._phases = phases
        self._current = -1  # index of the phase that runs
        self._start = self._began = 0.0  # when the first phase and the current one began
        self._finished = 0.0  # work of the phases that have run

    def begin(self, stage: str, now: float) -> None:
        """Record that the next phase of a stage begins. A call that is not expected belongs to the current phase."""
        following = (i for i in range(self._current + 1, len(self._phases)) if self._phases[i].stage == stage)
        index = next(following, None)
        if index is None:
            return
        if self._current < 0:
            self._start = now
        else:
            self._finished += self._phases[self._current].work
        self._current, self._began = index, now

    def remaining(self, now: float) -> float | None:
        """Return the seconds until the end, or None if too little has been done to know."""
        current, following = self._ahead()
        if not self._finished or self._finished < _KNOWN * (self._finished + current + following):
            return None
        pace = (self._began - self._start) / self._finished
        return max(0.0, pace * current - (now - self._began)) + pace * following

    def done(self, now: float) -> float:
        """Return the part of the work that is done, from 0 to 1."""
        current, following = self._ahead()
        total = self._finished + current + following
        if not total:
            return 0.0
        pace = (self._began - self._start) / self._finished if self._finished else 0.0
        part = min(current, (now - self._began) / pace) if pace else 0.0
        return (self._finished + part) / total

    def _ahead(self) -> tuple[float, float]:
        """Return the work of the current phase and of all later ones."""
        current = self._phases[self._current].work if self._current >= 0 else 0.0
        return current, sum(phase.work for phase in self._phases[self._current + 1 :])


def format_duration(seconds: float) -> str:
    """Format a duration as minutes and seconds, or as hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_remaining(seconds: float) -> str:
    """Format an estimate, without more precision than it has."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute left"
    if minutes < 10:
        return f"about {minutes} min left"
    return f"about {5 * round(minutes / 5)} min left" if minutes < 90 else f"about {round(minutes / 60)} h left"
