"""Argument parser of the command lines, with errors on one line."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

_UNKNOWN = "unrecognized arguments: "  # argparse's prefix


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that prints errors on one line, with the closest option, instead of the whole usage.

    The exit status of an error is 2, as in argparse.
    """

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, f"{self.prog}: {message.rstrip('.')}.{self._suggestion(message)} See --help for all options.\n")

    def _suggestion(self, message: str) -> str:
        if not message.startswith(_UNKNOWN):
            return ""
        known = [
            option
            for action in self._actions
            if action.help != argparse.SUPPRESS  # hidden aliases
            for option in action.option_strings
        ]
        for argument in message.removeprefix(_UNKNOWN).split():
            closest = difflib.get_close_matches(argument.partition("=")[0], known, n=1)
            if argument.startswith("-") and closest:
                return f" Did you mean {closest[0]}?"
        return ""
