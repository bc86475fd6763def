"""Fuzz every body parser: `python -m tests.server.body.fuzz_bodies 60` runs for 60 s, or until the first finding.

Well-formed bodies of every kind are cut, spliced and repeated, and their numbers and brackets replaced, up to the
maximum body size; media types and queries are changed as well. A finding is any exception other than a `PidError`, more
than `CPU_SECONDS` for one body, or more than `MEMORY` bytes beyond what the process started with.
"""

from __future__ import annotations

import base64
import contextlib
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from engines.errors import PidError
from server.body.json_text import parse_json
from server.body.media import FORM, JSON, NPY, RAW, SAFETENSORS
from server.body.tensors import numbers_tensor
from server.http.protocols.kserve import KServe
from server.http.protocols.kserve_response import HEADER_LENGTH
from server.http.protocols.remote_decode import BINARY, RemoteDecode
from server.request import ServerLimits
from tests.server.body.bodies import (
    BOUNDARY,
    CAPTION,
    FORM_TYPE,
    LATENT,
    LIMITS,
    ONE,
    VALID,
    json_body,
    npy,
    packed,
    parse_request,
    raw,
    raw_query,
)

CPU_SECONDS = 2.0
MEMORY = 256 * 2**20  # bytes; the largest body is 1 MiB
CASES = 400  # per round

Body = tuple[str | None, bytes, list[tuple[str, str]]]

# Requests of other protocols than /decode; their media type begins with the name of the protocol.
REMOTE, KSERVE = RemoteDecode.name, KServe.name
KSERVE_JSON = json_body(
    id="a",
    inputs=[
        {"name": "latent", "shape": [2, 4, 8, 12], "datatype": "FP16", "parameters": {"binary_data_size": 1536}},
        {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 9}},
    ],
    outputs=[{"name": "image"}, {"name": "seed", "parameters": {"binary_data": False}}],
    parameters={"seed": 7, "timeout": 1000, "priority": 1, "binary_data_output": True},
)
SHAPE = [("shape", str(size)) for size in LATENT.shape]

BODIES = {
    "remote": (f"{REMOTE} {BINARY}", raw(LATENT.half()), [*SHAPE, ("dtype", "float16"), ("output_type", "pt")]),
    "remote raw": (f"{REMOTE} {BINARY}", raw(LATENT), [*SHAPE, ("dtype", "float32"), ("output_type", "pt")]),
    "remote base64": (
        f"{REMOTE} {JSON}",
        json_body(
            inputs=base64.b64encode(raw(ONE)).decode(),
            parameters={"shape": [1, 4, 8, 8], "dtype": "float32", "output_type": "pt", "do_scaling": True},
        ),
        [],
    ),
    "kserve": (
        f"{KSERVE} {RAW}",
        KSERVE_JSON + raw(LATENT.half()) + b"\5\0\0\0a cat",
        [(HEADER_LENGTH, str(len(KSERVE_JSON)))],
    ),
    "kserve json": (
        f"{KSERVE} {JSON}",
        json_body(
            inputs=[
                {"name": "latent", "shape": [4, 8, 8], "datatype": "FP32", "data": ONE.tolist()},
                {"name": "caption", "shape": [3, 5], "datatype": "FP32", "data": CAPTION[0].tolist()},
            ]
        ),
        [],
    ),
    **VALID,
    "channels": (NPY, npy(np.zeros((5, 8, 8), np.float32)), []),
    "not finite": (RAW, raw(torch.full((4, 8, 8), torch.nan)), raw_query(ONE)),
    "large": (JSON, b" " * 62_000 + VALID["json"][1], []),
    "prompts": (JSON, json_body(latent=packed(LATENT), prompt=['a "cat"', 'é"' * 1000]) + b" " * 62_000, []),
    "prompt": (NPY, npy(LATENT.numpy()), [("prompt", "a cat"), ("prompt", "a dog")]),
    "numbers": (JSON, json_body(numbers=LATENT.tolist()) + b" " * 62_000, []),
    "few numbers": (JSON, json_body(numbers=LATENT.flatten().tolist()), []),
    "preamble": (FORM_TYPE, b"text\r\n" + VALID["form"][1] + b"text", []),
    "undeclared": (None, npy(LATENT.numpy()), []),
    "curl": ("application/x-www-form-urlencoded", raw(LATENT), raw_query(LATENT)),
    "tokens": (NPY, npy(np.zeros((1, 24, 16), np.float32)), [("height", "64"), ("width", "96")]),
    "video": (NPY, npy(np.zeros((2, 4, 1, 8, 8), np.float16)), []),
    "caption": (SAFETENSORS, save_safetensors({"latent": LATENT, "caption": CAPTION[:1]}), []),
}
TOKENS = [
    *(bytes([byte]) for byte in b"[{(\"',:\x00\xff"),
    *rb"\u0000 \ud800 null NaN 1e999 -0 -1 4294967296 18446744073709551616 0x7fffffff 1_0 True lambda:0".split(),
    *(b"9" * 30, b"*" * 50, b"\r\n", b"--", f"--{BOUNDARY}".encode(), b"; filename*=UTF-8''"),
    *(b"\x93NUMPY\x01\x00", b"\x80\x04.", base64.b64encode(b"x" * 99)),
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
    "application/x-www-form-urlencoded",
    None,
]
PLACES = st.floats(0, 1)  # positions as fractions of the body
HEADERS = PLACES.map(lambda place: place**3)  # mostly at the beginning, which holds the headers

CUTS = st.tuples(st.just("cut"), HEADERS, PLACES)
TOKEN = st.tuples(st.just("token"), HEADERS, st.sampled_from(TOKENS))
REPEATS = st.tuples(st.just("repeat"), HEADERS, st.tuples(st.integers(1, 64), st.integers(1, 100_000)))
SPLICES = st.tuples(st.just("splice"), HEADERS, st.tuples(st.sampled_from(sorted(BODIES)), PLACES))
NUMBERS = st.tuples(st.just("number"), PLACES, st.sampled_from([b"0", b"-1", b"999999999999", b"1e9", b"[]", b""]))
FLIPS = st.tuples(st.just("flip"), HEADERS, st.integers(1, 255))
QUERIES = st.lists(
    st.tuples(st.sampled_from(["shape", "dtype", "height", "width", "seed", "sigma", "x"]), st.text(max_size=20)),
    max_size=3,
)


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    """A well-formed body with up to six changes, and sometimes another media type or query."""
    content_type, body, query = BODIES[draw(st.sampled_from(sorted(BODIES)))]
    changes = st.one_of(CUTS, TOKEN, REPEATS, SPLICES, NUMBERS, FLIPS)
    for what, place, how in draw(st.lists(changes, max_size=draw(st.sampled_from([1, 6])))):
        body = _change(bytearray(body), what, place, how)[: LIMITS.max_body_bytes]
    if draw(st.integers(0, 4)) == 0:
        content_type = draw(st.sampled_from(TYPES))
    return content_type, body, query if draw(st.booleans()) else query + draw(QUERIES)


def _change(body: bytearray, what: str, place: float, how: object) -> bytes:
    at = min(int(place * len(body)), max(0, len(body) - 1))
    match what, how:
        case "cut", float(share):
            del body[at : at + int(share * (len(body) - at))]
        case "token", bytes(token):
            body[at:at] = token
        case "repeat", (int(length), int(times)):
            body[at:at] = (body[at : at + length] * times)[: LIMITS.max_body_bytes]
        case "splice", (str(kind), float(share)):
            other = BODIES[kind][1]
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
    """Parsing one body exceeded the limit of CPU time."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlowError after `seconds` of CPU time, which other processes on the machine do not use up."""

    def stop(number: int, frame: object) -> None:
        raise TooSlowError(f"more than {seconds:g} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def limit_memory(additional: int) -> None:
    """Make allocations fail with MemoryError once the process has grown by `additional` bytes."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()  # bytes of address space
    resource.setrlimit(resource.RLIMIT_AS, (now + additional, resource.RLIM_INFINITY))


def parse(content_type: str | None, body: bytes, query: list[tuple[str, str]], limits: ServerLimits) -> object:
    """Parse a request of a protocol, or JSON with a list of numbers."""
    for protocol in (RemoteDecode(), KServe()):
        name, _, media_type = (content_type or "").partition(" ")
        if name == protocol.name:
            headers = [("content-type", media_type)]
            headers += [(name.lower(), value) for name, value in query if name == HEADER_LENGTH]
            query = [field for field in query if field[0] != HEADER_LENGTH]
            return protocol.read_head(headers, query, limits).parse(body)
    if content_type == JSON and (numbers := parse_json(body).get("numbers")) is not None:
        return numbers_tensor("latent", tuple(LATENT.shape), numbers).to_float32()
    return parse_request(content_type, body, query, limits)


def fuzz(
    seconds: float = 0.0,
    parse: Callable[..., object] = parse,
    shrink: bool = True,
    cpu_seconds: float = CPU_SECONDS,
) -> Counter[str]:
    """Parse rounds of `CASES` bodies, at least one, until `seconds` have passed; count the results by error code.

    Raises:
        Exception: a finding; the body is in a note of the exception.
    """
    results: Counter[str] = Counter()
    end = time.monotonic() + seconds
    number = 0
    while number == 0 or time.monotonic() < end:

        @seed(number)
        @settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
            suppress_health_check=list(HealthCheck),
        )
        @given(bodies())
        def fuzz_round(body: Body) -> None:
            try:
                with cpu_limit(cpu_seconds):
                    parse(*body, LIMITS)
            except PidError as error:
                results[error.code] += 1
            else:
                results["accepted"] += 1

        fuzz_round()
        number += 1
    return results


if __name__ == "__main__":
    limit_memory(MEMORY)
    counts = fuzz(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
    print(f"{sum(counts.values())} bodies: {', '.join(f'{count} {code}' for code, count in counts.most_common())}")
