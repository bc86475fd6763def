"""Conversion of results to plain data for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def to_document(value: Any, keys: Mapping[str, str]) -> Any:
    """Convert dataclasses, models and containers to what `json.dumps` accepts; NaN and infinity become None.

    Args:
        value: The data to convert.
        keys: JSON keys of the dataclass fields whose published key differs from the field's name.
    """
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {keys.get(name, name): to_document(getattr(value, name), keys) for name in names}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): to_document(item, keys) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_document(item, keys) for item in value]
    return value
