"""docs/protocols.md lists what the protocols read and send."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from server.body.tensors import ERRORS
from server.http.protocols.kserve_request import DTYPES, PRIORITIES, Output
from server.http.protocols.remote_models import Parameters
from tests.server.conftest import Running

DOCUMENT = (Path(__file__).parents[4] / "docs/protocols.md").read_text()


def names(first_header: str) -> list[str]:
    """Return the names in the first column of the table with this header."""
    table = re.search(rf"^\| {first_header} \|.*\n\|[- |]+\|\n((?:\|.*\n)+)", DOCUMENT, re.MULTILINE)
    assert table
    return [name for line in table[1].splitlines() for name in re.findall(r"`(\w+)`", line.split(" | ")[0])]


def test_every_endpoint_of_kserve_is_listed(server: Running):
    paths = server.client.get("/openapi.json").json()["paths"]
    listed = {(method, path) for method, path in re.findall(r"`([A-Z]+) (/v2[^`]*)`", DOCUMENT)}
    assert listed == {(method.upper(), path) for path in paths if path.startswith("/v2") for method in paths[path]}


def test_every_parameter_of_remote_decode_is_listed():
    assert sorted(names("parameter")) == sorted(Parameters.model_fields)


def test_every_input_and_output_of_kserve_is_listed():
    assert names("input") == [*ERRORS, "prompt"]
    assert names("output") == list(get_args(Output))
    assert all(datatype in DOCUMENT for datatype in DTYPES)


def test_every_priority_of_kserve_is_listed():
    for level, name in PRIORITIES.items():
        assert level == 0 or f"{level} for `{name}`" in DOCUMENT
