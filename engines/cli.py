"""Command-line parsing shared by the programs of this project."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

_UNKNOWN = "unrecognized arguments: "  # how argparse begins its message


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that reports a wrong argument in one line, with a suggestion, and exits with status 2.

    The usage, which argparse prints before every error, is left to `--help`. Flags cannot be abbreviated, so that a
    new flag never changes the meaning of an existing command.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **arguments})

    def error(self, message: str) -> NoReturn:
        """Print `message` in one line on standard error and exit with status 2."""
        if message.startswith(_UNKNOWN):
            argument = message.removeprefix(_UNKNOWN).split()[0]
            message = f"unrecognised argument {argument}{self._suggestion(argument)}"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _suggestion(self, argument: str) -> str:
        name = argument.partition("=")[0]
        known = [flag for action in self._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]
        closest = difflib.get_close_matches(name, known, n=1)
        return f", did you mean {closest[0]}?" if closest else ""
