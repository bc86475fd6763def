"""The options of a decode request, alike in the query, JSON and form fields."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.body.media import ImageFormat
from server.body.quoting import quote
from server.errors import InvalidOptionError

PriorityName = Literal["interactive", "standard", "batch"]
DEADLINE_HEADER = "X-Deadline-Ms"  # says the same as the option deadline_ms
MAX_DEADLINE_MS = 24 * 3600 * 1000
_DEADLINE = f"a whole number of milliseconds from 1 to {MAX_DEADLINE_MS}"


class DecodeOptions(BaseModel):
    """What a client may choose; each description completes the sentence "The option … takes …"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sigma: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")] = 0.0
    """Noise level of the latent; 0 is a clean one."""
    seed: Annotated[int | None, Field(ge=0, lt=2**64, description="a whole number from 0 to 2^64 - 1")] = None
    """Seed of the decoder's noise; None lets the server draw one."""
    steps: Annotated[int, Field(ge=1, le=4, description="a whole number from 1 to 4")] = 4
    format: Annotated[ImageFormat | None, Field(description="png, webp or jpeg")] = None
    """Image format; None leaves it to the Accept header."""
    compression: Annotated[Literal["fast", "best", "none"], Field(description="fast, best or none")] = "fast"
    """Effort spent on a smaller PNG; other formats ignore it."""
    quality: Annotated[int, Field(ge=1, le=100, description="a whole number from 1 to 100")] = 90
    """Quality of WebP and JPEG; PNG ignores it."""
    metadata: Annotated[bool, Field(description="true or false")] = False
    """Whether a PNG carries the decode's settings as text chunks."""
    priority: Annotated[PriorityName, Field(description="interactive, standard or batch")] = "standard"
    """Class in which the image queues; the higher goes first as far as the others' deadlines allow."""
    deadline_ms: Annotated[int | None, Field(ge=1, le=MAX_DEADLINE_MS, description=_DEADLINE)] = None
    """Milliseconds from admission within which the image is due; None leaves it to the server's settings."""


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
