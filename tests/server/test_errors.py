"""Texts that errors have in common."""

from __future__ import annotations

import pytest

from server.errors import count_of


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 images"), (1, "1 image"), (2, "2 images"), (10**4000, "1" + "0" * 19 + "… images")]
)
def test_a_count_has_a_noun_in_the_right_number(count, text):
    assert count_of(count, "image") == text
