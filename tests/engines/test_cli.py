"""Errors of the command lines: one line with the problem, the closest option, and where to find help."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from engines.cli import ArgumentParser

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--precision", choices=("fp32", "fp8"))
    parser.add_argument("--presicion", help=argparse.SUPPRESS)
    return parser


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--precison", "fp8"], "unrecognized arguments: --precison fp8. Did you mean --precision? See --help"),
        (["fp8", "--precison=fp8"], "Did you mean --precision?"),
        (["--zzz"], "tool: unrecognized arguments: --zzz. See --help for all options.\n"),
        (["--precision", "fp9"], "invalid choice: 'fp9' (choose from 'fp32', 'fp8'). See --help"),
        (["--precision"], "argument --precision: expected one argument. See --help"),
    ],
)
def test_an_error_is_one_line_and_exits_with_status_2(
    parser: ArgumentParser, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(arguments)
    error = capsys.readouterr().err
    assert expected in error
    assert error.startswith("tool: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ouput", "x"], "required: --output. --ouput is unknown; did you mean --output? See --help"),
        (["--ouput=x"], "--ouput is unknown; did you mean --output?"),
        (["--precision", "fp8", "--prec=fp8", "-x"], "required: --output. See --help"),
        ([], "required: --output. See --help"),
    ],
)
def test_a_misspelt_required_option_is_recognised(
    parser: ArgumentParser, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    parser.add_argument("--output", required=True)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(arguments)
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_every_program_uses_this_parser():
    folders = ("docker", "engines", "loadtest", "server")
    files = [ROOT / "build_engines.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert [path.name for path in files if "argparse.ArgumentParser(" in path.read_text()] == []
