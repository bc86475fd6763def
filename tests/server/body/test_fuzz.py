"""The fuzzer of body parsers: it reaches every kind of error and detects hangs, exceptions and large allocations."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import pytest

from server.body.media import JSON
from tests.server.body.bodies import parse_request
from tests.server.body.fuzz_bodies import MEMORY, TooSlowError, fuzz, limit_memory


def test_the_fuzzer_reaches_every_kind_of_error_and_finds_nothing():
    results = fuzz()
    assert results["accepted"] > 10
    reached = ("malformed-body", "invalid-latent", "invalid-caption", "invalid-option", "unsupported-media-type")
    assert all(results[code] > 0 for code in reached)


def test_a_parser_that_hangs_is_a_finding():
    def parse(content_type: str | None, body: bytes, *rest: object) -> object:
        while content_type == JSON:
            pass
        return parse_request(content_type, body, *rest)  # type: ignore[arg-type]

    with pytest.raises(TooSlowError):
        fuzz(20, parse, shrink=False, cpu_seconds=0.1)


def test_an_unexpected_exception_is_a_finding():
    def parse(content_type: str | None, body: bytes, *rest: object) -> object:
        return body.index(b"{") if content_type == JSON else None

    with pytest.raises(ValueError, match="not found"):
        fuzz(20, parse, shrink=False)


def test_a_parser_that_allocates_what_a_body_claims_is_a_finding():
    def parse(content_type: str | None, body: bytes, *rest: object) -> object:
        return bytes(10**9) if b"999999999999" in body else None

    def fuzz_with_limit(findings: Connection) -> None:
        limit_memory(MEMORY)
        try:
            fuzz(20, parse, shrink=False)
        except MemoryError:
            findings.send("MemoryError")
        findings.close()

    # Another process, because the limit cannot be lifted; a fork, because it starts with everything imported.
    context = multiprocessing.get_context("fork")
    findings, sender = context.Pipe(duplex=False)
    process = context.Process(target=fuzz_with_limit, args=(sender,))
    process.start()
    sender.close()
    assert findings.recv() == "MemoryError"
    process.join()
