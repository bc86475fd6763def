"""Options of a decode request and parameters of its protocol, read from the query, a JSON body or form fields."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from server.body.quoting import quote
from server.errors import InvalidOptionError

Options = TypeVar("Options", bound=BaseModel)

DEADLINE_HEADER = "X-Deadline-Ms"  # the option deadline_ms, but limited to the maximum


def merge_options(options: Options, fields: Iterable[tuple[str, object]]) -> Options:
    """Validate fields of the model of `options`, and add them to those that were sent elsewhere in the request.

    The description of each field in the model completes the sentence "The option … must be …". Text is read as numbers
    and booleans. Several fields named prompt are the prompts of several images, in this order.

    Raises:
        InvalidOptionError: an option is unknown, out of range, or set to two different values.
    """
    model = type(options)
    values = {name: getattr(options, name) for name in options.model_fields_set}
    for name, raw in _join_prompts(fields):
        value = _validate(model, name, raw)
        if values.setdefault(name, value) != value:
            raise InvalidOptionError(
                f"The option {name} is set to both {quote(values[name])} and {quote(value)}; set it once."
            )
    return model(**values)


def _join_prompts(fields: Iterable[tuple[str, object]]) -> Iterable[tuple[str, object]]:
    fields = list(fields)
    prompts = [raw for name, raw in fields if name == "prompt"]
    if len(prompts) < 2:
        return fields
    return [*(field for field in fields if field[0] != "prompt"), ("prompt", prompts)]


def _validate(model: type[BaseModel], name: str, raw: object) -> Any:
    field = model.model_fields.get(name)
    if field is None:
        raise InvalidOptionError(_unknown(name, list(model.model_fields)))
    validate = model.model_validate_strings if isinstance(raw, str) else model.model_validate
    try:
        return getattr(validate({name: raw}), name)
    except ValidationError:
        raise InvalidOptionError(f"The option {name} must be {field.description}, not {quote(raw)}.") from None


def _unknown(name: str, names: list[str]) -> str:
    closest = difflib.get_close_matches(name[:40], names, n=1, cutoff=0.5)
    advice = f"did you mean {closest[0]}?" if closest else f"the options are {', '.join(names)}."
    return f"Unknown option {quote(name)}; {advice}"
