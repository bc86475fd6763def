"""Large JSON bodies: strings that stay views of the body decode to what json.loads and b64decode give."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import pytest

from server.body.json_text import (
    LONG_VALUE,
    MAX_ESCAPED_QUOTES,
    MAX_JSON_TEXT,
    PIECE,
    decode_base64,
    decode_text,
    parse_json,
)
from server.errors import InvalidOptionError, MalformedBodyError
from tests.server.body.bodies import JSON, LATENT, json_body, packed, parse_request, rejected

DATA = random.Random(0).randbytes(2 * PIECE + 1001)
BASE64 = base64.b64encode(DATA).decode()
SPACE = b" " * (MAX_JSON_TEXT - 2000)  # makes a body large enough to cut its strings out


def escape(text: str, share: float) -> str:
    """Write some characters as escape sequences, as some JSON writers do with + and /."""
    chance = random.Random(1)
    return "".join(f"\\u{ord(c):04X}" if chance.random() < share else c for c in text).replace("/", "\\/")


@pytest.mark.parametrize("length", [0, 1, 2, 3, 1000, 3 * PIECE // 4, 3 * PIECE // 4 + 1, len(DATA)])
@pytest.mark.parametrize("share", [0, 0.01, 1])
def test_long_strings_are_views_and_decode_to_the_same_bytes(length: int, share: float):
    text = base64.b64encode(DATA[:length]).decode()
    text = escape(text, share) if share else text
    body = b'{"a": "%s", "b": [1, "x"], "c": {"d": "\\"\\\\"}}' % text.encode() + SPACE
    value = parse_json(body)
    assert isinstance(value["a"], memoryview) == (len(body) > MAX_JSON_TEXT and len(text) > LONG_VALUE)
    assert decode_base64(value["a"]) == DATA[:length]
    assert value | {"a": ""} == {"a": "", "b": [1, "x"], "c": {"d": '"\\'}}


@pytest.mark.parametrize(
    "text",
    [
        BASE64[:-3],  # one character more than a multiple of four
        BASE64[: PIECE - 4] + "AA=",  # padding is missing or complete
        BASE64 + "=",
        BASE64 + "AA",
        BASE64[: PIECE - 4] + "AA==A",
        BASE64 + "AAAA",  # after the padding
        BASE64[: PIECE - 4] + "AA==" + BASE64[:PIECE],  # padding between two pieces
        BASE64[: PIECE - 4] + "AA==" + "A",
        BASE64[:100] + "\n" + BASE64[100:],  # not escaped
        BASE64[:100] + "\\t" + BASE64[100:],
        BASE64[:100] + " " + BASE64[100:],
        BASE64[:100] + "-" + BASE64[101:],
        BASE64[:100].replace("+", "-").replace("/", "_") + "-" + "A" * 2 * PIECE + "+AA",
        BASE64[:100] + "é" + BASE64[102:],
        BASE64[:100] + "\\u00e9" + BASE64[101:],
        BASE64[:100] + '\\"' + BASE64[101:],
        BASE64[:100] + "\\x" + BASE64[101:],
        BASE64[:100] + "\0" + BASE64[101:],
        BASE64[: PIECE - 1] + "\\\\u002b" + BASE64[PIECE:],
        BASE64[: PIECE - 2] + "\\\\\\u002b" + BASE64[PIECE:],
        "\\" * 2 * PIECE,
        "é" * PIECE,
        "=" * PIECE,
    ],
)
def test_long_strings_that_are_not_base64_are_rejected(text: str):
    assert len(BASE64) % 4 == 0
    assert BASE64.endswith("=")
    body = f'{{"latent": {{"data": "{text}", "shape": [4, 8, 8], "dtype": "float32"}}}}'.encode()
    assert "base64" in rejected(MalformedBodyError, JSON, body)


@pytest.mark.parametrize(
    "body",
    [
        b'"%s"' % BASE64.encode(),
        b'{"%s": 1}' % BASE64.encode(),
        b'{"a": "%s"' % BASE64.encode(),
        b'{"a": "%s' % BASE64.encode(),
        b'{"a": "%s", "a": 1}' % BASE64.encode(),
        b'{"a": "%s\\"' % (b"\\" * PIECE),
        b"\xff" * PIECE,
        b'{"a": 1}' + b" " * PIECE,
        b'{"latent":[' + b"1," * PIECE + b"1]}",
        b'{"latent":[' + b'"x",' + b"1," * PIECE + b"]}",
        b'{"a":"' + b'\\"' * PIECE + b'"}',
        b'{"a":[' + b'"",' * PIECE + b'""]}',
        b'{"a":[' + b'"%s",' % (b"a" * (LONG_VALUE + 1)) * 2000 + b'""]}',
    ],
)
def test_large_bodies_that_are_not_such_objects_are_rejected(body: bytes):
    rejected(MalformedBodyError, JSON, body)


def url_safe(text: str) -> str:
    return text.replace("+", "-").replace("/", "_")


@pytest.mark.parametrize("length", [1, 2, 3, 45, 1000, 3 * PIECE // 4 + 1, len(DATA)])
@pytest.mark.parametrize("alphabet", [str, url_safe])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("line_break", ["", "\n", "\r\n"])
def test_variants_of_base64_decode_to_the_same_bytes(length, alphabet, padded, line_break):
    text = alphabet(base64.b64encode(DATA[:length]).decode())
    text = text if padded else text.rstrip("=")
    if line_break:
        text = "".join(text[i : i + 76] + line_break for i in range(0, len(text), 76))
    assert decode_base64(text) == DATA[:length]
    assert decode_base64(parse_json(json.dumps({"a": text}).encode() + SPACE)["a"]) == DATA[:length]


@pytest.mark.parametrize(
    "text", ["A", "AA=", "AA===", "=", "AA==AA", "AA==A", "A-+A", "A_/A", "AA A", "AAé", "AA\t", "AA\0"]
)
def test_short_strings_that_are_not_base64_are_rejected(text):
    with pytest.raises(ValueError):  # noqa: PT011
        decode_base64(text)


@pytest.mark.parametrize("as_list", [False, True])
def test_long_strings_may_have_a_limited_number_of_escaped_quotes(as_list: bool):
    text = 'say "\u20ac\n" ' * 1000
    body = json.dumps({"a": [text] if as_list else text}).encode() + SPACE
    value = parse_json(body)["a"]
    view = value[0] if as_list else value
    assert isinstance(view, memoryview)
    assert decode_text(view) == text
    quotes = b'"%s"' % (b'\\"' * (MAX_ESCAPED_QUOTES + LONG_VALUE))
    with pytest.raises(MalformedBodyError, match="escaped quotes"):
        parse_json(b'{"a": %s}' % (b"[%s]" % quotes if as_list else quotes) + SPACE)


def test_text_with_control_characters_is_not_json():
    view = parse_json(b'{"a": "%s"}' % (b"\x01" * 4 * LONG_VALUE) + SPACE)["a"]
    with pytest.raises(MalformedBodyError):
        decode_text(view)


def with_member(name: str, value: Any) -> bytes:
    return json_body(latent=packed(LATENT), **{name: value}) + SPACE


def test_a_long_string_in_place_of_an_option_is_rejected_without_quoting_it():
    for name in ("seed", "format", "unknown"):
        message = rejected(InvalidOptionError, JSON, with_member(name, BASE64[:10_000]))
        assert "AAAA" not in message
        assert name in message
    assert "a long text" in rejected(InvalidOptionError, JSON, with_member("seed", BASE64[:10_000]))
    assert "a list" in rejected(InvalidOptionError, JSON, with_member("seed", [BASE64[:10_000]]))


def test_options_after_a_long_string_are_read():
    request = parse_request(JSON, with_member("seed", 7), [])
    assert request.options.seed == 7
    assert json.loads(with_member("seed", 7))["seed"] == 7
