"""Options, header values, content negotiation and the quoting of client input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.body.media import header_value
from server.body.options import merge_options
from server.body.quoting import MAX_QUOTED, one_of, quote
from server.errors import InvalidOptionError
from server.request import DecodeOptions


def merge(fields: list[tuple[str, object]]) -> DecodeOptions:
    return merge_options(DecodeOptions(), fields)


def test_options_have_defaults():
    options = merge([])
    assert options == DecodeOptions()
    assert (options.sigma, options.seed, options.steps, options.format) == (0.0, None, 4, None)
    assert (options.compression, options.quality, options.metadata) == ("fast", 90, False)
    assert (options.priority, options.deadline_ms) == ("standard", None)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("sigma", "0", 0.0),
        ("sigma", "0.25", 0.25),
        ("sigma", "1", 1.0),
        ("seed", "0", 0),
        ("seed", "18446744073709551615", 2**64 - 1),
        ("seed", "-1", None),
        ("seed", -1, None),
        ("steps", "1", 1),
        ("steps", "4", 4),
        ("height", "1", 1),
        ("width", "65536", 65536),
        ("format", "png", "png"),
        ("format", "webp", "webp"),
        ("format", "jpeg", "jpeg"),
        ("format", "jpg", "jpeg"),
        ("format", "raw", "raw"),
        ("format", "npy", "npy"),
        ("compression", "fast", "fast"),
        ("compression", "best", "best"),
        ("compression", "none", "none"),
        ("quality", "1", 1),
        ("quality", "100", 100),
        ("metadata", "true", True),
        ("metadata", "false", False),
        ("priority", "interactive", "interactive"),
        ("priority", "batch", "batch"),
        ("deadline_ms", "1", 1),
        ("deadline_ms", "86400000", 86_400_000),
    ],
)
def test_text_and_typed_values_are_equivalent(name, text, value):
    assert getattr(merge([(name, text)]), name) == value
    assert merge([(name, text), (name, value)]) == merge([(name, value)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigma", "-0.1"),
        ("sigma", "1.0001"),
        ("sigma", "nan"),
        ("sigma", "inf"),
        ("sigma", float("nan")),
        ("sigma", float("inf")),
        ("sigma", 10**400),
        ("sigma", True),
        ("sigma", None),
        ("seed", "-2"),
        ("seed", -2),
        ("seed", -1.0),
        ("seed", "18446744073709551616"),
        ("seed", "1" * 5000),
        ("seed", 10**4000),
        ("seed", 0.5),
        ("steps", "0"),
        ("steps", "5"),
        ("steps", "four"),
        ("steps", ""),
        ("steps", True),
        ("steps", [4]),
        ("steps", {"a": 4}),
        ("height", "0"),
        ("width", "65537"),
        ("width", -1),
        ("height", 1024.5),
        ("height", 10**4000),
        ("format", "gif"),
        ("format", "JPG"),
        ("format", "planes-signed"),
        ("format", "x" * 10_000),
        ("compression", "zstd"),
        ("quality", "0"),
        ("quality", "101"),
        ("metadata", "perhaps"),
        ("metadata", 1),
        ("priority", "urgent"),
        ("priority", 0),
        ("deadline_ms", "0"),
        ("deadline_ms", "86400001"),
        ("deadline_ms", 1.5),
    ],
)
def test_a_value_out_of_range_is_rejected_in_one_sentence(name, value):
    with pytest.raises(InvalidOptionError) as raised:
        merge([(name, value)])
    message = str(raised.value)
    assert message.startswith(f"The option {name} must be {DecodeOptions.model_fields[name].description}, not ")
    assert len(message) < 80 + MAX_QUOTED


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("sede", "did you mean seed?"),
        ("step", "did you mean steps?"),
        ("Sigma", "did you mean sigma?"),
        ("compresion", "did you mean compression?"),
        ("xyz", "the options are decoder, sigma, seed, steps, prompt, height, width, format, tile, compression, "),
        ("q" * 100_000, "the options are decoder"),
        ("", "the options are decoder"),
        ("__class__", "the options are decoder"),
        ("model_fields", "the options are"),
    ],
)
def test_an_unknown_option_is_rejected_with_the_closest_name(name, advice):
    with pytest.raises(InvalidOptionError) as raised:
        merge([(name, "1")])
    assert advice in str(raised.value)
    assert len(str(raised.value)) < 170 + MAX_QUOTED


def test_an_option_may_be_repeated_only_with_the_same_value():
    assert merge([("sigma", "0.5"), ("sigma", 0.5), ("sigma", "0.50")]).sigma == 0.5
    with pytest.raises(InvalidOptionError, match="steps is set to both 2 and 3"):
        merge([("steps", "2"), ("steps", 3)])
    with pytest.raises(InvalidOptionError, match="seed is set to both null and 3"):
        merge([("seed", None), ("seed", "3")])


def test_options_from_two_places_are_merged_unless_they_contradict_each_other():
    query = merge([("steps", "2"), ("quality", "90")])
    merged = merge_options(query, [("seed", 7), ("steps", 2)])
    assert (merged.steps, merged.seed, merged.quality, merged.sigma) == (2, 7, 90, 0)
    for fields in ([("quality", 80)], [("seed", 7), ("seed", 8)]):
        with pytest.raises(InvalidOptionError, match="set to both"):
            merge_options(query, fields)


def test_options_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        DecodeOptions().steps = 2


@pytest.mark.parametrize(
    ("header", "first", "params"),
    [
        ("Application/JSON; Charset=utf-8", "application/json", {"charset": "utf-8"}),
        ('multipart/form-data; boundary="a;b"', "multipart/form-data", {"boundary": "a;b"}),
        ("form-data; name=a; filename*=UTF-8''b.npy", "form-data", {"name": "a", "filename": "b.npy"}),
        ("", "", {}),
        ("a/b; c*" + "9" * 5000 + "=d", "", {}),
    ],
)
def test_a_header_is_split_into_value_and_parameters(header, first, params):
    assert header_value(header) == (first, params)


@given(st.text() | st.text(alphabet="ab/;=*'\"\\0123 \r\n"))
def test_any_header_is_split(header):
    first, params = header_value(header)
    assert all(isinstance(text, str) for text in (first, *params, *params.values()))


@given(st.text() | st.integers() | st.floats() | st.binary() | st.lists(st.text()))
def test_quotes_are_short_and_printable(value):
    assert len(quote(value)) <= MAX_QUOTED
    assert quote(value).isprintable()


def test_alternatives_are_joined_with_or():
    assert (one_of("a"), one_of("ab"), one_of("abc")) == ("a", "a or b", "a, b or c")
