"""Argument parser of the command lines: one layout for --help, and errors on one line."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

_UNKNOWN = "unrecognized arguments: "  # argparse's prefix
_HELP_COLUMN = 32  # where the descriptions of options begin, unless an option is longer


def program_name(script: str, command: str) -> str:
    """Return `script`, the console script, if the program was started by it, otherwise `command`, for --help."""
    return script if Path(sys.argv[0]).stem == script else command


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that prints errors on one line, with the closest option, instead of the whole usage.

    The exit status of an error is 2, as in argparse.
    """

    def __init__(self, **options: Any) -> None:
        """Create a parser; `options` are those of `argparse.ArgumentParser`."""
        super().__init__(
            **{"formatter_class": partial(argparse.HelpFormatter, max_help_position=_HELP_COLUMN), **options}
        )
        self._arguments: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args` as argparse does."""
        self._arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, f"{self.prog}: {message.rstrip('.')}.{self._suggestion(message)} See --help for all options.\n")

    def _suggestion(self, message: str) -> str:
        """Return a sentence with the option that was probably intended, if an unknown one caused the error."""
        if message.startswith(_UNKNOWN):
            for argument in message.removeprefix(_UNKNOWN).split():
                if closest := self._closest(argument):
                    return f" Did you mean {closest}?"
        elif "required" in message:  # found before unknown options, one of which may be the required one, misspelt
            for argument in self._arguments:
                if closest := self._closest(argument):
                    return f" {argument.partition('=')[0]} is unknown; did you mean {closest}?"
        return ""

    def _closest(self, argument: str) -> str:
        """Return the option that `argument` resembles; empty if none does, or if the argument is valid."""
        options = [
            option
            for action in self._actions
            if action.help != argparse.SUPPRESS  # hidden aliases
            for option in action.option_strings
        ]
        name = argument.partition("=")[0]
        abbreviated = self.allow_abbrev and any(option.startswith(name) for option in options)
        if not name.startswith("-") or name in options or abbreviated:
            return ""
        return next(iter(difflib.get_close_matches(name, options, n=1)), "")
