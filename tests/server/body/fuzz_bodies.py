"""Fuzz every body parser: `python -m tests.server.body.fuzz_bodies 60` takes 60 s and ends with 1 at the first finding.

Valid bodies of every kind are cut, spliced, repeated, and their numbers and brackets exchanged, up to the largest body
that is taken; media types and queries likewise. A finding is anything but a request or a refusal (`PidError`), more
than `CPU_SECONDS` for one body, or more than `MEMORY` bytes beyond what the process began with.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from engines.errors import PidError
from server.body.media import FORM, JSON, NPY, RAW, SAFETENSORS
from server.body.parse import parse_request
from tests.server.body.test_parse import ACCEPTS, BOUNDARY, FORM_TYPE, VALID

CPU_SECONDS = 2.0
MEMORY = 256 * 2**20  # bytes; a body has up to 1 MiB here
CASES = 400  # between looks at the clock

Body = tuple[str | None, bytes, list[tuple[str, str]]]

TOKENS = [
    *(
        b"[",
        b"{",
        b"(",
        b'"',
        b"'",
        b"\\u0000",
        b",",
        b":",
        b"\r\n",
        b"\x00",
        b"\xff",
        b"null",
        b"NaN",
        b"1e999",
        b"-0",
    ),
    *(b"9" * 30, b"-1", b"4294967296", b"18446744073709551616", b"0x7fffffff", b"1_0", b"True", b"lambda:0", b"*" * 50),
    *(
        f"--{BOUNDARY}".encode(),
        b"--",
        b"; filename*=UTF-8''",
        b"\x93NUMPY\x01\x00",
        b"\x80\x04.",
        base64.b64encode(b"x" * 99),
    ),
]
TYPES = [
    SAFETENSORS,
    NPY,
    RAW,
    JSON,
    FORM,
    FORM_TYPE,
    f"{FORM}; boundary=",
    f"{JSON}; charset=utf-16",
    "text/plain",
    None,
]
PLACES = st.floats(0, 1)  # shares of the body; most of what can be got wrong stands at its beginning
HEADERS = PLACES.map(lambda share: share**3)

CUTS = st.tuples(st.just("cut"), HEADERS, PLACES)
TOKEN = st.tuples(st.just("token"), HEADERS, st.sampled_from(TOKENS))
REPEATS = st.tuples(st.just("repeat"), HEADERS, st.tuples(st.integers(1, 64), st.integers(1, 100_000)))
SPLICES = st.tuples(st.just("splice"), HEADERS, st.tuples(st.sampled_from(sorted(VALID)), PLACES))
NUMBERS = st.tuples(st.just("number"), PLACES, st.sampled_from([b"0", b"-1", b"999999999999", b"1e9", b"[]", b""]))
FLIPS = st.tuples(st.just("flip"), HEADERS, st.integers(1, 255))
QUERIES = st.lists(
    st.tuples(st.sampled_from(["shape", "dtype", "seed", "sigma", "x"]), st.text(max_size=20)), max_size=3
)


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    content_type, body, query = VALID[draw(st.sampled_from(sorted(VALID)))]
    for what, place, how in draw(st.lists(st.one_of(CUTS, TOKEN, REPEATS, SPLICES, NUMBERS, FLIPS), max_size=6)):
        body = _changed(bytearray(body), what, place, how)[: ACCEPTS.max_body]
    if draw(st.integers(0, 4)) == 0:
        content_type = draw(st.sampled_from(TYPES))
    return content_type, body, query if draw(st.booleans()) else query + draw(QUERIES)


def _changed(body: bytearray, what: str, place: float, how: object) -> bytes:
    at = min(int(place * len(body)), max(0, len(body) - 1))
    match what, how:
        case "cut", float(share):
            del body[at : at + int(share * (len(body) - at))]
        case "token", bytes(token):
            body[at:at] = token
        case "repeat", (int(length), int(times)):
            body[at:at] = (body[at : at + length] * times)[: ACCEPTS.max_body]
        case "splice", (str(kind), float(share)):
            other = VALID[kind][1]
            body[at:] = other[int(share * len(other)) :]
        case "flip", int(bits) if body:
            body[at] ^= bits
        case "number", bytes(other):
            digits = [i for i, byte in enumerate(body[:2000]) if 48 <= byte <= 57]
            if digits:
                start = digits[int(place * (len(digits) - 1))]
                body[start : start + 1] = other
    return bytes(body)


class TooSlowError(Exception):
    """A body took more processor time than it may."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Processor time, so that a busy machine finds nothing that is not there."""

    def stop(number: int, frame: object) -> None:
        raise TooSlowError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory(more: int) -> None:
    """From now on, allocating more than `more` bytes beyond what there is raises MemoryError."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))


def fuzz(
    seconds: float, parse: Callable[..., object] = parse_request, shrink: bool = True, cpu_seconds: float = CPU_SECONDS
) -> Counter[str]:
    """How often each ending was met. Raises what a body made `parse` raise, with that body in a note."""
    endings: Counter[str] = Counter()
    limit = time.monotonic() + seconds
    number = 0
    while time.monotonic() < limit:

        @seed(number)
        @settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
            suppress_health_check=list(HealthCheck),
        )
        @given(bodies())
        def chunk(body: Body) -> None:
            try:
                with cpu_limit(cpu_seconds):
                    parse(*body, ACCEPTS)
            except PidError as error:
                endings[error.code] += 1
            else:
                endings["taken"] += 1

        chunk()
        number += 1
    return endings


if __name__ == "__main__":
    logging.disable()  # python-multipart tells of every form
    limit_memory(MEMORY)
    found = fuzz(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
    print(f"{sum(found.values())} bodies: {', '.join(f'{count} {code}' for code, count in found.most_common())}")
