"""The options of a decode request, alike in the query, JSON and form fields."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from server.body.quoting import quote
from server.errors import InvalidOptionError
from server.request import DecodeOptions

DEADLINE_HEADER = "X-Deadline-Ms"  # equivalent to the option deadline_ms


def parse_options(given: Iterable[tuple[str, object]]) -> DecodeOptions:
    """Check and merge options from every place a request may hold them; strings are read as numbers and booleans.

    Raises:
        InvalidOptionError: an unknown name, a value out of range, or one option given twice with different values.
    """
    options: dict[str, Any] = {}
    for name, raw in given:
        value = _check(name, raw)
        if options.setdefault(name, value) != value:
            raise InvalidOptionError(
                f"Give the option {name} once: it is both {quote(options[name])} and {quote(value)} in this request."
            )
    return DecodeOptions(**options)


def _check(name: str, raw: object) -> Any:
    field = DecodeOptions.model_fields.get(name)
    if field is None:
        raise InvalidOptionError(_unknown(name))
    validate = DecodeOptions.model_validate_strings if isinstance(raw, str) else DecodeOptions.model_validate
    try:
        return getattr(validate({name: raw}), name)
    except ValidationError:
        raise InvalidOptionError(f"The option {name} takes {field.description}, not {quote(raw)}.") from None


def _unknown(name: str) -> str:
    names = list(DecodeOptions.model_fields)
    closest = difflib.get_close_matches(name[:40], names, n=1, cutoff=0.5)
    advice = f"did you mean {closest[0]}?" if closest else f"there are {', '.join(names)}."
    return f"There is no option {quote(name)}; {advice}"
