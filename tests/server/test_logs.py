"""Logs: JSON or text, limits on repeated lines, and a standard output that is not read."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.log_formats import TextFormatter
from server.logs import LogHandler, RepeatLimit

log = logging.getLogger("tests.logs")
access = logging.getLogger("server.requests")


class Log:
    """A handler on a file, with a clock that the test sets."""

    def __init__(self, path: Path) -> None:
        self.path, self.now = path, 0.0
        self.descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
        self.handler = LogHandler(self.descriptor, RepeatLimit(repeats=3, period=10), lambda: self.now)

    def lines(self) -> list[dict]:
        self.handler.flush()
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines()]


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Log]:
    output = Log(tmp_path / "log")
    for logger in (log, access):
        logger.addHandler(output.handler)
        logger.setLevel(logging.INFO)
    yield output
    for logger in (log, access):
        logger.removeHandler(output.handler)
        logger.setLevel(logging.NOTSET)
    output.handler.writer.flush(60)
    os.close(output.descriptor)


def repeat(count: int) -> None:
    for number in range(count):
        log.warning("line %d", number)


def test_a_line_is_one_json_object(output: Log):
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed %s", "once\n", extra={"fields": {"answer": 42, "path": Path("x")}})
    (line,) = output.lines()
    assert (line["level"], line["logger"], line["message"]) == ("error", "tests.logs", "failed once\n")
    assert (line["answer"], line["path"]) == (42, "x")
    assert "ValueError: two\nlines" in line["traceback"]


def test_arguments_are_formatted_when_they_are_logged(output: Log):
    value = [1]
    log.info("%s", value)
    value.append(2)
    assert output.messages() == ["[1]"]


def test_a_mistake_in_a_log_call_is_logged_and_not_raised(output: Log):
    output.handler.handle(logging.LogRecord("x", logging.INFO, "x.py", 1, "%d %d", ("one",), None))
    (line,) = output.lines()
    assert "%d %d" in line["message"]


class TestText:
    @staticmethod
    def format(message: str, *arguments: object, **fields: object) -> str:
        record = logging.LogRecord("server", logging.WARNING, "x.py", 1, message, arguments, None)
        record.created, record.msecs, record.fields = 0.0, 7.0, fields
        return TextFormatter().format(record)

    def test_a_line_has_the_fields_as_key_and_value(self):
        line = self.format("POST %s 200", "/decode", size="64x64", seed=7, ms=1.5, late=False, key=None)
        assert line == (
            "1970-01-01T00:00:00.007Z WARNING server: POST /decode 200 size=64x64 seed=7 ms=1.5 late=false key=null"
        )

    def test_values_with_spaces_are_quoted_and_nested_ones_are_json(self):
        line = self.format("done", key="a b", other='"', empty="", stages_ms={"queue": 1.5}, errors=["queue-full"])
        assert line.endswith(r'done key="a b" other="\"" empty="" stages_ms={"queue": 1.5} errors=["queue-full"]')

    @pytest.mark.parametrize("text", ["two\nlines", "a\rb", "\x1b[31mred", "a\u2028b", "\udc80"])
    def test_no_text_makes_a_second_line_or_controls_a_terminal(self, text: str):
        line = self.format("%s", text, path=text)
        assert line.isprintable()
        line.encode()

    def test_a_traceback_follows_indented(self, tmp_path: Path):
        with (tmp_path / "log").open("wb") as file:
            handler = LogHandler(file.fileno(), RepeatLimit(), formatter=TextFormatter())
            try:
                raise ValueError("bad\n2026-01-01T00:00:00.000Z INFO server: forged")
            except ValueError:
                exc_info = sys.exc_info()
            handler.handle(logging.LogRecord("server", logging.ERROR, "x.py", 1, "failed", (), exc_info))
            handler.handle(logging.LogRecord("x", logging.INFO, "x.py", 1, "%d %d", ("one",), None))
            handler.flush()
        first, *rest, last = (tmp_path / "log").read_text().splitlines()
        assert first.endswith(" ERROR server: failed")
        assert all(line.startswith("    ") for line in rest)
        assert "ValueError: bad" in "\n".join(rest)
        assert " ERROR x: '%d %d': TypeError" in last

    def test_a_process_logs_text_if_it_is_configured_to(self):
        code = (
            "logs.configure('info', 'text'); logging.getLogger('server').info('ready', extra={'fields': {'port': 1}})"
        )
        status, out, _ = in_a_new_process(code)
        assert (status, out.endswith("Z INFO server: ready port=1\n")) == (0, True)


class TestRepeats:
    def test_repeated_lines_are_suppressed_and_counted_at_the_end_of_the_period(self, output: Log):
        repeat(8)
        log.info("another line")
        output.now = 9.9
        repeat(1)
        output.now = 10
        repeat(2)
        summary = "suppressed 6 more lines like this one: line 0"
        assert output.messages() == ["line 0", "line 1", "line 2", "another line", summary, "line 0", "line 1"]
        assert output.lines()[4]["level"] == "warning"

    def test_any_line_reports_those_suppressed_earlier(self, output: Log):
        repeat(4)
        output.now = 11
        access.info("GET /info")
        assert output.messages()[3:] == ["suppressed 1 more lines like this one: line 3", "GET /info"]

    def test_the_end_reports_those_suppressed(self, output: Log):
        repeat(5)
        assert output.messages()[-1] == "suppressed 2 more lines like this one: line 4"

    def test_the_last_suppressed_message_is_shown_even_if_its_format_is_only_a_placeholder(self, output: Log):
        value: list[str] = []
        for number in range(5):
            value[:] = [f"product {number}"]
            log.info("%s", value)
        value.clear()
        assert output.messages()[-1] == "suppressed 2 more lines like this one: ['product 4']"

    def test_a_mistake_in_a_suppressed_call_is_not_raised(self, output: Log):
        for _ in range(5):
            output.handler.handle(logging.LogRecord("x", logging.INFO, "x.py", 1, "%d %d", ("one",), None))
        assert output.messages()[-1] == "suppressed 2 more lines like this one: %d %d"

    def test_messages_that_differ_only_in_text_count_as_repeated(self, output: Log):
        for number in range(6):
            log.warning(f"socket {number}")
        assert len(output.messages()) == 4

    def test_the_access_log_is_complete(self, output: Log):
        for number in range(50):
            access.info("GET %d", number)
        assert len(output.messages()) == 50


Read = Callable[[subprocess.Popen], None]


def in_a_new_process(code: str, read: Read = lambda process: None) -> tuple[int, str, str]:
    """Run code after `logs.configure`; return status, stdout and stderr."""
    prelude = "import logging, sys, threading; from server import logs; logs.configure('info')\n"
    command = [sys.executable, "-c", prelude + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        read(process)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


class TestProcess:
    def test_all_lines_are_written_before_the_end(self):
        code = "for number in range(1000): logging.getLogger('server.requests').info('line %d', number)"
        status, out, _ = in_a_new_process(code)
        assert (status, len(out.splitlines())) == (0, 1000)

    def test_a_standard_output_that_nobody_reads_stops_nothing_and_the_lines_dropped_are_counted(self):
        code = (
            "for number in range(1000): logging.getLogger('server.requests').info('x' * 10_000)\n"
            "print(logs.dropped_lines(), file=sys.stderr)"
        )

        def read(process: subprocess.Popen) -> None:
            assert process.wait(timeout=60) == 0

        _, _, err = in_a_new_process(code, read)
        assert 0 < int(err) < 1000

    @pytest.mark.parametrize("redirection", [">&-", "2>&-", "> /dev/full", "2> /dev/full", "| true"])
    def test_output_that_cannot_be_written_stops_nothing(self, tmp_path: Path, redirection: str):
        code = (
            "import logging, pathlib; from server import logs; logs.configure('info')\n"
            "for _ in range(9): logging.info('a line')\n"
            "logs.print_error('an error'); logging.shutdown(); pathlib.Path('done').touch()"
        )
        command = ["bash", "-c", f'"$@" {redirection}', "bash", sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        assert (tmp_path / "done").exists()

    def test_python_itself_reports_to_the_log(self):
        code = (
            "import warnings; warnings.warn('a warning')\n"
            "thread = threading.Thread(target=lambda: 1 / 0, name='divider'); thread.start(); thread.join()\n"
            "class Broken:\n    def __del__(self): raise KeyError('in del')\n"
            "Broken()"
        )
        status, out, err = in_a_new_process(code)
        lines = [json.loads(line) for line in out.splitlines()]
        assert (status, err) == (0, "")
        assert "a warning" in lines[0]["message"]
        assert "divider" in lines[1]["message"]
        assert "ZeroDivisionError" in lines[1]["traceback"]
        assert "in del" in lines[2]["traceback"]
