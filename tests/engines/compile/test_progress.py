"""The progress of a build: lines in a file, and a bar below them on a terminal."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import pytest

import build_engines
from engines.compile import build, quantise
from engines.compile.duration import Phase
from engines.compile.export import ExportedGraph, file_name, onnx_files
from engines.compile.inputs.calibrate import Ranges
from engines.compile.planning import targets
from engines.compile.planning.layer_rules import rule_for
from engines.compile.progress import Bar, Display, Estimate, Lines, format_duration, format_remaining, shown_on
from engines.compile.results import EngineResult
from engines.compile.verify_onnx import DTYPES
from engines.pid.graphs import Graph
from tests.engines.compile.conftest import Build


class Clock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """Pseudo-terminal, and what its screen would show after the output so far."""

    def __init__(self, columns: int = 80) -> None:
        self._master, slave = os.openpty()
        tty.setraw(slave)  # otherwise the kernel rewrites line feeds
        os.set_blocking(self._master, False)
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        self.resize(columns)
        self._rows: list[list[str]] = [[]]
        self._row = self._column = 0

    def resize(self, columns: int) -> None:
        self._columns = columns
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def reflow(self, columns: int) -> None:
        """Become narrower as most terminals do: they wrap the rows that no longer fit."""
        self.resize(columns)
        self._rows = [row[i : i + columns] for row in self._rows for i in range(0, max(1, len(row)), columns)]
        self._row, self._column = len(self._rows) - 1, len(self._rows[-1])

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)

    def screen(self) -> list[str]:
        """Return the rows, including the one with the cursor."""
        for token in re.findall(r"\x1b\[\w|.", self._output(), re.DOTALL):
            self._apply(token)
        return ["".join(row).rstrip() for row in self._rows]

    def _output(self) -> str:
        parts = []
        while True:
            try:
                parts.append(os.read(self._master, 65536))
            except BlockingIOError:
                return b"".join(parts).decode()

    def _apply(self, token: str) -> None:
        row = self._rows[self._row]
        match token:
            case "\r":
                self._column = 0
            case "\n":
                self._row, self._column = self._row + 1, 0
                self._rows += [[]] * (self._row == len(self._rows))
            case "\x1b[A":
                self._row = max(0, self._row - 1)
            case "\x1b[J":
                del row[self._column :], self._rows[self._row + 1 :]
            case _:
                assert not token.startswith("\x1b"), f"unknown sequence {token!r}"
                if self._column == self._columns:  # wraps
                    self._apply("\n")
                    row = self._rows[self._row]
                self._rows[self._row] = [*row[: self._column], token, *row[self._column + 1 :]]
                self._column += 1


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    yield terminal
    terminal.close()


def ignore() -> None:
    """Accept every phase."""


PHASES = [Phase("load", 10), Phase("check", 30), Phase("check", 30), Phase("export", 30)]


class TestEstimate:
    def test_nothing_is_estimated_from_too_little(self):
        estimate = Estimate([Phase("load", 1), Phase("check", 99)])
        assert estimate.remaining(0.0) is None
        estimate.begin("load", 0.0)
        assert estimate.remaining(5.0) is None
        assert estimate.done(5.0) == 0.0
        estimate.begin("check", 6.0)
        assert estimate.remaining(7.0) is None

    def test_the_pace_of_the_finished_phases_predicts_the_others(self):
        estimate = Estimate(PHASES)
        estimate.begin("load", 1000.0)
        estimate.begin("check", 1020.0)  # two seconds per unit of work
        assert estimate.remaining(1020.0) == pytest.approx(180.0)
        assert estimate.remaining(1050.0) == pytest.approx(150.0)
        assert estimate.done(1050.0) == pytest.approx(0.25)

    def test_a_phase_that_takes_longer_than_expected_counts_no_further(self):
        estimate = Estimate(PHASES)
        estimate.begin("load", 0.0)
        estimate.begin("check", 20.0)
        assert estimate.remaining(1000.0) == pytest.approx(120.0)
        assert estimate.done(1000.0) == pytest.approx(0.4)

    def test_phases_that_a_resumed_build_skips_are_no_work(self):
        estimate = Estimate(PHASES)
        estimate.begin("check", 0.0)
        estimate.begin("export", 30.0)
        assert estimate.remaining(30.0) == pytest.approx(30.0)
        assert estimate.done(30.0) == pytest.approx(0.5)

    def test_a_call_that_is_not_expected_belongs_to_the_current_phase(self):
        estimate = Estimate(PHASES)
        estimate.begin("load", 0.0)
        estimate.begin("check", 10.0)
        estimate.begin("check", 40.0)
        before = estimate.remaining(50.0)
        estimate.begin("check", 50.0)
        assert estimate.remaining(50.0) == before == pytest.approx(50.0)

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "less than a minute left"),
            (29, "less than a minute left"),
            (61, "about 1 min left"),
            (570, "about 10 min left"),
            (780, "about 15 min left"),
            (5340, "about 90 min left"),
            (7300, "about 2 h left"),
        ],
    )
    def test_a_remaining_time_has_no_false_precision(self, seconds: float, text: str):
        assert format_remaining(seconds) == text

    @pytest.mark.parametrize(("seconds", "text"), [(0.9, "0:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01")])
    def test_a_duration_has_minutes_and_seconds(self, seconds: float, text: str):
        assert format_duration(seconds) == text


class TestBar:
    def test_lines_stay_above_the_bar(self, terminal: Terminal):
        clock = Clock()
        bar = Bar(terminal.stream, ignore, clock)
        bar.expect(PHASES)
        bar("load", "the network")
        clock.now += 60
        bar("check", "float32 against PyTorch")
        clock.now += 90
        bar.draw()
        assert terminal.screen() == [
            "[    0.0 s] load      the network",
            "[   60.0 s] check     float32 against PyTorch",
            "check     [#######-----------------------] 2:30, about 8 min left",
        ]

    @pytest.mark.parametrize(
        ("columns", "expected"),
        [
            (200, "check     [#######-----------------------] 2:30, about 8 min left"),
            (48, "check     [###---------] 2:30, about 8 min left"),
            (40, "check     2:30, about 8 min left"),
            (30, "check     [###---------] 2:30"),
            (20, "check     2:30"),
            (8, "check"),
            (1, ""),
        ],
    )
    def test_the_bar_fits_into_the_terminal(self, terminal: Terminal, columns: int, expected: str):
        clock = Clock()
        bar = Bar(terminal.stream, ignore, clock)
        bar.expect(PHASES)
        bar("load", "")
        clock.now += 60
        bar("check", "")
        clock.now += 90
        terminal.screen()
        terminal.reflow(columns)
        for _ in range(3):
            bar.draw()
        rows = terminal.screen()
        assert rows[-1] == expected
        assert len(rows[-1]) < columns or columns == 1
        assert sum(row.startswith("check ") for row in rows) <= 1

    def test_a_terminal_that_becomes_narrower_shows_one_bar(self, terminal: Terminal):
        bar = Bar(terminal.stream, ignore, Clock())
        bar("load", "the network")
        assert len(terminal.screen()) == 2
        terminal.reflow(20)
        assert len(terminal.screen()) == 5
        bar.draw()
        assert terminal.screen() == ["[    0.0 s] load", "  the network", "load      0:00"]

    def test_an_unknown_duration_is_not_shown(self, terminal: Terminal):
        bar = Bar(terminal.stream, ignore, Clock())
        bar("load", "")
        assert terminal.screen()[-1] == f"load      [{'-' * 30}] 0:00"

    def test_other_messages_are_printed_above_the_bar(self, terminal: Terminal):
        with shown_on(terminal.stream, ignore) as bar:
            bar("load", "")
            print("a warning", file=sys.stderr)
            sys.stderr.write("two parts")
            assert terminal.screen()[1:] == ["a warning", "two parts"]
            sys.stderr.write(" of a line\nand another\n")
            assert terminal.screen()[1:4] == ["a warning", "two parts of a line", "and another"]
            assert terminal.screen()[4].startswith("load      [")
            sys.stderr.write("unfinished")
            bar("fold", "")
            rows = terminal.screen()
            assert rows[4] == "unfinished"
            assert rows[5].endswith("s] fold")
            assert rows[6].startswith("fold      [")
        assert sys.stderr is not terminal.stream

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_the_bar_is_removed_after_an_error(self, terminal: Terminal, error: type[BaseException]):
        def fail(bar: Display) -> None:
            bar("load", "")
            terminal.stream.write("^C")  # echo of the key
            raise error

        with pytest.raises(error), shown_on(terminal.stream, ignore) as bar:
            fail(bar)
        rows = terminal.screen()
        assert rows[0].endswith("s] load")
        assert rows[1:] == [""]

    def test_a_terminal_that_was_closed_is_no_error(self, terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
        def fail(_text: str) -> int:
            raise OSError

        bar = Bar(terminal.stream, ignore)
        monkeypatch.setattr(terminal.stream, "write", fail)
        bar("load", "")
        bar.draw()

    def test_a_build_on_a_terminal_ends_with_a_clean_screen(
        self, terminal: Terminal, build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        assert build_tiny("cpu") == 0
        rows = terminal.screen()
        assert rows[-1] == ""
        assert "".join(rows).endswith(f"] done      {tmp_path / 'out'}")
        assert not any("[---" in row or "[###" in row for row in rows)


class TestLines:
    def test_a_stream_that_is_not_a_terminal_gets_lines_only(self):
        stream = io.StringIO()
        with shown_on(stream, ignore) as progress:
            assert type(progress) is Lines
            progress.expect(PHASES)
            progress("load", "the network")
        assert re.fullmatch(r"\[ +\d\.\d s\] load      the network\n", stream.getvalue())

    def test_a_dumb_terminal_gets_lines_only(self, terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("TERM", "dumb")
        with shown_on(terminal.stream, ignore) as progress:
            progress("load", "the network")
            assert len(terminal.screen()) == 2

    def test_a_phase_may_end_the_build(self, terminal: Terminal):
        def stop() -> None:
            raise KeyboardInterrupt

        for stream in (io.StringIO(), terminal.stream):
            with pytest.raises(KeyboardInterrupt), shown_on(stream, stop) as progress:
                progress("load", "")


class Recorder(Lines):
    """Display that records its calls."""

    def __init__(self) -> None:
        super().__init__(io.StringIO(), ignore)
        self.planned: list[Phase] = []
        self.reported: list[str] = []

    def expect(self, phases: Sequence[Phase]) -> None:
        self.planned.extend(phases)

    def __call__(self, stage: str, detail: str) -> None:
        self.reported.append(stage)


@pytest.mark.parametrize(
    "options",
    [
        ["cpu"],
        ["cpu", "--precision", "fp8"],
        ["cpu", "--precision", "fp16"],
        ["rtx5090", "--precision", "bf16"],
        ["rtx5090", "--precision", "fp8", "--sizes", "64x128,96x96", "--keep", "*.w2"],
        ["rtx5090", "--precision", "fp8", "--attention", "16bit"],
        ["rtx5090", "--precision", "fp4"],
        ["rtx5090", "--compiler", "torch-tensorrt"],
        ["rtx5090", "--compiler", "torch-tensorrt", "--keep-onnx"],
    ],
)
def test_a_build_reports_the_phases_that_were_predicted(
    options: list[str], build_tiny: Build, monkeypatch: pytest.MonkeyPatch
):
    def verify_graphs(_network: object, _error: object, _folder: Path, progress: Callable[[str], None]) -> tuple[()]:
        for name in DTYPES:
            progress(name)
        return ()

    def verify_kinds(
        _network: object, ranges: Ranges, precisions: Sequence[str], _folder: Path, progress: Callable[[str], None]
    ) -> tuple[()]:
        for precision in precisions:
            attentions = ranges.attentions if precision == "fp8" else ()
            for pattern in {rule_for(name).pattern for name in (*ranges.inputs, *attentions)}:
                progress(f"{pattern} in {precision}")
        return ()

    def export(_network: object, graph: Graph, *arguments: object) -> ExportedGraph:
        folder = arguments[-1]
        assert isinstance(folder, Path)
        for name in onnx_files(graph):
            (folder / name).touch()
        return ExportedGraph(graph, folder / f"{graph}.onnx", {})

    def compile_engine(_compiler: object, _target: object, graph: Graph, *arguments: Any) -> EngineResult:
        (arguments[1] / file_name(graph, ".engine")).touch()
        return EngineResult(graph=graph, bytes=0, seconds=0.0)

    display = Recorder()
    monkeypatch.setattr(build_engines, "shown_on", lambda _stream, _check: nullcontext(display))
    monkeypatch.setattr(quantise, "verify_layer_kinds", verify_kinds)
    monkeypatch.setattr(targets, "cuda_problem", lambda: None)
    monkeypatch.setattr(targets, "installed_version", lambda _package: "2.13.0")
    for function in (verify_graphs, export, compile_engine):
        monkeypatch.setattr(build, function.__name__, function)
    assert build_tiny(*options) == 0
    assert [phase.stage for phase in display.planned] == display.reported[:-1]  # the last one is "done"
    assert all(phase.work > 0 for phase in display.planned)
