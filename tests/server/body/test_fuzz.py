"""The fuzzer of body parsers: it gets past the first checks, and notices what it is there to notice."""

from __future__ import annotations

import subprocess
import sys

import pytest

from server.body.media import JSON
from server.body.parse import parse_request
from tests.server.body.fuzz_bodies import TooSlowError, fuzz

HARNESS = "import tests.server.body.fuzz_bodies as f; f.limit_memory(f.MEMORY); f.fuzz(20, {parser}, shrink=False)"


def test_two_seconds_of_it_find_nothing_and_reach_every_kind_of_answer():
    endings = fuzz(2)
    assert endings["taken"] > 10
    reached = ("malformed-body", "invalid-latent", "invalid-option", "unsupported-media-type")
    assert all(endings[code] > 0 for code in reached)


def test_a_parser_that_hangs_is_noticed():
    def hangs(content_type: str | None, body: bytes, *rest: object) -> object:
        while content_type == JSON:
            pass
        return parse_request(content_type, body, *rest)  # type: ignore[arg-type]

    with pytest.raises(TooSlowError):
        fuzz(20, hangs, shrink=False, cpu_seconds=0.1)


def test_a_parser_that_fails_in_an_unforeseen_way_is_noticed():
    def fails(content_type: str | None, body: bytes, *rest: object) -> object:
        return body.index(b"{") if content_type == JSON else None

    with pytest.raises(ValueError, match="not found"):
        fuzz(20, fails, shrink=False)


def test_a_parser_that_believes_what_a_body_claims_is_noticed():
    parser = "lambda content_type, body, *rest: bytes(10**9) if b'999999999999' in body else None"
    done = subprocess.run([sys.executable, "-c", HARNESS.format(parser=parser)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "MemoryError" in done.stderr
