"""The message of a ConfigError, which has to be one sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engines.errors import ConfigError


def message_of(call: Callable[[], object]) -> str:
    """Return the message of the ConfigError that `call` raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text
