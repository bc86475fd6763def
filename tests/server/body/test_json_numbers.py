"""Lists of numbers in JSON: those that stay views of the body decode to what json.loads and NumPy give."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.body.json_numbers import PIECE, NumberList, decode_numbers
from server.body.json_text import LONG_VALUE, MAX_JSON_TEXT, parse_json
from server.body.tensors import numbers_tensor
from server.errors import InvalidLatentError, InvalidOptionError, MalformedBodyError
from tests.server.body.bodies import JSON, LATENT, json_body, packed, rejected

SPACE = b" " * (MAX_JSON_TEXT - 2000)  # makes a body large enough to cut its lists out
NUMBERS = np.random.default_rng(0).standard_normal(3 * PIECE // 8).astype(np.float32).tolist()


def member(text: str | bytes) -> Any:
    """Return the member `data` of a large body, of which it is the JSON text."""
    data = text.encode() if isinstance(text, str) else text
    return parse_json(b'{"name": "x", "data": %s, "shape": [1]}' % data + SPACE)["data"]


def flatten(value: Any) -> list[float]:
    return [number for item in value for number in flatten(item)] if isinstance(value, list) else [value]


def expected(text: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.array(flatten(json.loads(text)), np.float64).astype(np.float32)


FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70)
LISTS = st.recursive(FLOATS, lambda inner: st.lists(inner, min_size=1, max_size=5), max_leaves=30)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\r\n\t", " : ")])


@given(st.lists(LISTS, min_size=1, max_size=5), st.integers(1, 400), SEPARATORS, st.sampled_from([None, 1]))
@example([1e39, -1e39, 0.1, 10**300], 200, (",", ":"), None)
@settings(max_examples=100)
def test_numbers_are_those_of_json_and_numpy(value, times, separators, indent):
    text = json.dumps(value * times, separators=separators, indent=indent)
    data = member(text)
    assert isinstance(data, NumberList) or len(text) < 2 * LONG_VALUE
    numbers = decode_numbers(data)
    assert numbers.dtype == np.float32
    assert numbers.tobytes() == expected(text).tobytes()
    assert decode_numbers(value * times).tobytes() == numbers.tobytes()


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 500])
@pytest.mark.parametrize("rows", [None, 1, 3, 64])
def test_lists_of_every_length_are_cut_at_every_place(length, rows):
    """Pieces end at different places of a number and of its row."""
    numbers = NUMBERS[: len(NUMBERS) - length]
    value = numbers if rows is None else [[numbers[i : i + rows]] for i in range(0, len(numbers), rows)]
    data = member(json.dumps(value, separators=(",", ":")))
    assert isinstance(data, NumberList)
    assert np.array_equal(decode_numbers(data), np.array(numbers, np.float32))


MEMBER = json.dumps(NUMBERS)
ROWS = json.dumps([NUMBERS[i : i + 4] for i in range(0, len(NUMBERS), 4)])
ITEMS = ["true", "null", '"x"', "{}", "NaN", "-Infinity", "0x1", "1_0", "01", "+1", "1.", ".5", "1e", "--1", "1 2", "é"]


@pytest.mark.parametrize(
    "item", [*ITEMS, "", "[]", "[ ]", "[1", "1]", "[1,]", "[,1]", "[1][2]", "1[2]", "[1]2", "1[,2]"]
)
@pytest.mark.parametrize("place", [0, 1, len(NUMBERS) // 2, len(NUMBERS)])
@pytest.mark.parametrize("text", [MEMBER, ROWS], ids=["flat", "nested"])
def test_a_list_with_anything_else_is_rejected(item, place, text):
    items = text[1:-1].split(", ")
    items.insert(place, item)
    with pytest.raises(MalformedBodyError):
        decode_numbers(member(f"[{', '.join(items)}]"))


@pytest.mark.parametrize(
    "text", ["[]", "[ ]", "[[]]", "[1, []]", "[true]", "[null]", '["1"]', "[{}]", "{}", "1", '"1"', "null"]
)
def test_a_short_value_that_is_not_a_list_of_numbers_is_rejected(text):
    with pytest.raises(MalformedBodyError, match="numbers only"):
        decode_numbers(json.loads(text))


@pytest.mark.parametrize(
    "text", ['["%s"]' % ("x" * 2000), '"%s"' % ("x" * 2000), "[%s 1]" % ("[1], " * 300 + "null, ")]
)
def test_a_long_value_that_is_not_a_list_of_numbers_is_rejected(text):
    with pytest.raises(MalformedBodyError, match="numbers only"):
        decode_numbers(member(text))


@pytest.mark.parametrize("unit", ["1", " ", "[", "]", "][", "[x", "[],", "[1]1,", ",", "[1],x,", "0.", "-"])
@pytest.mark.parametrize("close", ["", "]", "1]", "]]"])
def test_long_texts_without_numbers_are_rejected(unit, close):
    with pytest.raises(MalformedBodyError):
        decode_numbers(member("[1, " + unit * (4 * PIECE // len(unit)) + close))


@pytest.mark.parametrize("depth", [1, 30, 900])
def test_deep_lists_are_read_or_rejected(depth):
    text = "[" * depth + MEMBER[1:-1] + "]" * depth
    assert np.array_equal(decode_numbers(member(text)), np.array(NUMBERS, np.float32))
    value: list[Any] = [1.5]
    for _ in range(depth):
        value = [value]
    assert decode_numbers(value).tolist() == [1.5]


def test_numbers_out_of_range_are_infinite_in_short_and_long_lists():
    text = ", ".join(["1e39", "-1e39", "1e999", "-1e999", "9" * 400, "-" + "9" * 400])
    for value in (json.loads(f"[{text}]"), member(f"[{', '.join([text] * 10)}]")):
        assert decode_numbers(value)[:6].tolist() == [np.inf, -np.inf] * 3


def test_the_memory_for_numbers_is_proportional_to_their_text():
    value = member("[" + "1," * 10**6 + "1]")
    tracemalloc.start()
    try:
        numbers = decode_numbers(value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert numbers.nbytes == 4 * (10**6 + 1)
    assert peak < 3 * 2 * 10**6


def test_a_body_may_have_several_long_lists_and_strings():
    rows = random.Random(0).sample(NUMBERS, 5000)
    body = json.dumps({"a": rows, "b": ["x" * 5000, rows, 3], "c": {"d": [rows, rows], "e": []}, "f": ["x", rows]})
    value = parse_json(body.encode())
    lists = [value["a"], value["b"][1], value["f"][1]]
    assert all(isinstance(item, NumberList) for item in lists)
    assert all(decode_numbers(item).tolist() == np.array(rows, np.float32).tolist() for item in lists)
    assert decode_numbers(value["c"]["d"]).size == 10_000
    assert bytes(value["b"][0]) == b"x" * 5000
    assert (value["b"][2], value["c"]["e"], value["f"][0]) == (3, [], "x")


def test_a_list_in_place_of_a_key_or_of_the_body_is_rejected():
    for body in (b"{%s: 1}", b'{"a": {%s: 1}}', b"%s", b'{"a" %s}', b'{"a": 1%s}', b'{"a": %s'):
        with pytest.raises(MalformedBodyError):
            parse_json(body % MEMBER.encode() + SPACE)


def test_a_long_list_in_place_of_an_option_or_tensor_is_rejected_without_quoting_it():
    for name, error in (("seed", InvalidOptionError), ("x", InvalidOptionError), ("caption", MalformedBodyError)):
        message = rejected(error, JSON, json_body(**({"latent": packed(LATENT)} | {name: NUMBERS})))
        assert name in message
        assert "memory" not in message
    assert "a list" in rejected(InvalidOptionError, JSON, json_body(latent=packed(LATENT), seed=NUMBERS))
    assert "base64" in rejected(MalformedBodyError, JSON, json_body(latent=packed(LATENT) | {"data": NUMBERS}))


@pytest.mark.parametrize("as_list", [LATENT.tolist(), LATENT.flatten().tolist()], ids=["nested", "flat"])
@pytest.mark.parametrize("long", [False, True])
def test_a_tensor_of_numbers_has_the_values_in_c_order(as_list, long):
    value = member(json.dumps(as_list)) if long else as_list
    tensor = numbers_tensor("latent", tuple(LATENT.shape), value)
    assert torch.equal(tensor.to_float32(), LATENT)
    assert tensor.dtype == "float32"


@pytest.mark.parametrize("shape", [(2, 4, 8, 13), (-2, -4, 8, 12), (2, 4, 8, 0)])
def test_a_tensor_of_numbers_must_have_its_shape(shape):
    with pytest.raises(MalformedBodyError, match="has 768 numbers, which does not match"):
        numbers_tensor("latent", shape, LATENT.flatten().tolist())


def test_a_tensor_of_numbers_is_checked_like_any_other():
    with pytest.raises(InvalidLatentError, match="2 dimensions"):
        numbers_tensor("latent", (768, 1), LATENT.flatten().tolist())
    with pytest.raises(InvalidLatentError, match="infinity"):
        numbers_tensor("latent", (1, 1, 1), [1e39]).to_float32()
