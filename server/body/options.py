"""Options of a decode request, read from the query, a JSON body or form fields."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from server.body.quoting import quote
from server.errors import InvalidOptionError
from server.request import DecodeOptions

DEADLINE_HEADER = "X-Deadline-Ms"  # equivalent to the option deadline_ms


def merge_options(options: DecodeOptions, fields: Iterable[tuple[str, object]]) -> DecodeOptions:
    """Validate options, and add them to those that were sent elsewhere in the request.

    Text is read as numbers and booleans. Several fields named prompt are the prompts of several images, in this order.

    Raises:
        InvalidOptionError: an option is unknown, out of range, or set to two different values.
    """
    values = {name: getattr(options, name) for name in options.model_fields_set}
    for name, raw in _join_prompts(fields):
        value = _validate(name, raw)
        if values.setdefault(name, value) != value:
            raise InvalidOptionError(
                f"The option {name} is set to both {quote(values[name])} and {quote(value)}; set it once."
            )
    return DecodeOptions(**values)


def _join_prompts(fields: Iterable[tuple[str, object]]) -> Iterable[tuple[str, object]]:
    fields = list(fields)
    prompts = [raw for name, raw in fields if name == "prompt"]
    if len(prompts) < 2:
        return fields
    return [*(field for field in fields if field[0] != "prompt"), ("prompt", prompts)]


def _validate(name: str, raw: object) -> Any:
    field = DecodeOptions.model_fields.get(name)
    if field is None:
        raise InvalidOptionError(_unknown(name))
    validate = DecodeOptions.model_validate_strings if isinstance(raw, str) else DecodeOptions.model_validate
    try:
        return getattr(validate({name: raw}), name)
    except ValidationError:
        raise InvalidOptionError(f"The option {name} must be {field.description}, not {quote(raw)}.") from None


def _unknown(name: str) -> str:
    names = list(DecodeOptions.model_fields)
    closest = difflib.get_close_matches(name[:40], names, n=1, cutoff=0.5)
    advice = f"did you mean {closest[0]}?" if closest else f"the options are {', '.join(names)}."
    return f"Unknown option {quote(name)}; {advice}"
