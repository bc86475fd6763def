"""Command-line flags and environment variables derived from the fields of a pydantic model.

A field becomes a flag and a variable by a `Flag` in its annotation, and by a `Metavar` unless it is a boolean:
`max_batch` is `--max-batch` and, with the prefix `PID_`, `PID_MAX_BATCH`. Values stay text here; the model validates
them.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo

BYTES = "BYTES"  # the metavar whose defaults are shown in KiB and MiB


@dataclass(frozen=True)
class Flag:
    """Description of a field on the command line."""

    group: str  # heading in --help
    help: str
    default: str | None = None  # text for --help, if the default value itself would not explain it
    renamed_from: str | None = None  # former name of the field, accepted but not shown
    repeatable: bool = False  # whether the flag may occur several times; its values are a list then


@dataclass(frozen=True)
class Metavar:
    """Placeholder for the value of a flag, such as SECONDS; a field without one is a boolean."""

    name: str


def flag_name(field: str) -> str:
    """Return the flag that sets `field`."""
    return f"--{field.replace('_', '-')}"


def variable_name(prefix: str, field: str) -> str:
    """Return the environment variable that sets `field`."""
    return f"{prefix}{field}".upper()


def add_flags(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """Add a flag per field of `model` to `parser`, in one argument group per `Flag.group`.

    A flag that is not on the command line is absent from the parsed namespace.
    """
    for title in dict.fromkeys(_flag(field).group for field in model.model_fields.values()):
        group = parser.add_argument_group(title)
        for name, field in model.model_fields.items():
            if _flag(field).group == title:
                _add_flag(group, name, field)


def environment_values(model: type[BaseModel], prefix: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the values that `environment` gives to fields of `model`.

    Variable names ignore case. An empty variable counts as not set.
    """
    variables = {name.upper(): value for name, value in environment.items() if value.strip()}
    values = {}
    for name, field in model.model_fields.items():
        for variable in _variables(prefix, name, field):
            if variable in variables:
                values[name] = variables[variable]
                break
    return values


def unknown_variables(model: type[BaseModel], prefix: str, environment: Mapping[str, str]) -> dict[str, str | None]:
    """Return the variables with `prefix` that set no field of `model`, each with the closest known name, if any."""
    known = {variable for name, field in model.model_fields.items() for variable in _variables(prefix, name, field)}
    current = [variable_name(prefix, name) for name in model.model_fields]
    unknown = sorted(name for name in environment if name.upper().startswith(prefix) and name.upper() not in known)
    return {
        name: next(iter(difflib.get_close_matches(name.upper(), current, n=1, cutoff=0.8)), None) for name in unknown
    }


def _add_flag(group: argparse._ActionsContainer, name: str, field: FieldInfo) -> None:
    flag, metavar, text = _flag(field), _metavar(field), _help(field)
    if metavar is None:
        group.add_argument(flag_name(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    read = _text_or_none if field.default is None else str
    action = "append" if flag.repeatable else "store"
    group.add_argument(flag_name(name), type=read, action=action, metavar=metavar, default=argparse.SUPPRESS, help=text)
    if flag.renamed_from is not None:
        former = flag_name(flag.renamed_from)
        group.add_argument(former, type=read, dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _text_or_none(text: str) -> str | None:
    """Read the value of an optional setting; `null` unsets it, even if its variable is set."""
    return None if text == "null" else text


def _flag(field: FieldInfo) -> Flag:
    return next(item for item in field.metadata if isinstance(item, Flag))


def _metavar(field: FieldInfo) -> str | None:
    return next((item.name for item in field.metadata if isinstance(item, Metavar)), None)


def _variables(prefix: str, name: str, field: FieldInfo) -> list[str]:
    """Return the variables that set the field, the current name first."""
    names = [name, _flag(field).renamed_from]
    return [variable_name(prefix, each) for each in names if each is not None]


def _help(field: FieldInfo) -> str:
    text = _flag(field).help
    if field.is_required():
        return f"{text} (required)"
    default = _default(field)
    return f"{text} (default: {default})" if default else text


def _default(field: FieldInfo) -> str:
    """Return the default as --help shows it; empty for None, False and empty text."""
    flag, value = _flag(field), field.default
    if flag.default is not None:
        return flag.default
    if value is None or value is False or value == "":
        return ""
    if _metavar(field) == BYTES:
        return f"{value // 2**20} MiB" if value % 2**20 == 0 else f"{value // 2**10} KiB"
    return f"{value:g}" if isinstance(value, float) else str(value)
