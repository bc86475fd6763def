"""The server's command line: settings from flags, then from `PID_*` environment variables, then from defaults."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from engines import __version__
from engines.cli import ArgumentParser, program_name
from engines.errors import ConfigError
from server.flags import add_flags, environment_values, flag_name, unknown_variables, variable_name
from server.settings import Settings

log = logging.getLogger(__name__)

PREFIX = "PID_"


def read_settings(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from flags, then from the environment, then from defaults.

    `--help`, `--version` and unknown flags end the process.

    Raises:
        ConfigError: a value is missing or invalid; the message names the flag and the variable.
    """
    flags = vars(_parser().parse_args(arguments))
    try:
        return Settings(**{**environment_values(Settings, PREFIX, environment), **flags})
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def warn_about_unknown_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Log the variables that begin with `PID_` and are not settings, as a misspelt one would be ignored silently."""
    unknown = unknown_variables(Settings, PREFIX, environment)
    if unknown:
        names = [f"{name} (did you mean {closest}?)" if closest else name for name, closest in unknown.items()]
        log.warning("unknown environment variables are ignored: %s", ", ".join(names))


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog=program_name("pid-server", "python -m server"),
        allow_abbrev=False,
        usage="%(prog)s --bundle [NAME=]DIR [options]",
        description="Serve PiD decodes over HTTP.",
        epilog="Each flag is also an environment variable: --queue-images is PID_QUEUE_IMAGES. Flags take precedence; "
        "an empty variable counts as not set.",
    )
    parser.add_argument("--version", action="version", version=f"pid-decode-server {__version__}")
    add_flags(parser, Settings)
    return parser


def _explain(error: ValidationError) -> str:
    """Return one sentence on the first invalid setting."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to")[0]
    if not first["loc"]:
        return f"{message}."
    name = str(first["loc"][0])
    names = f"{flag_name(name)} (or {variable_name(PREFIX, name)})"
    if first["type"] == "missing":
        return f"{names} is required; see --help."
    return f"{names} {message}, not {str(first['input'])[:80]!r}."
