"""docs/http-api.md: its examples run, and its tables match the code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from engines.captions.simulated import SimulatedTextEncoder
from engines.errors import DecodeError, DeviceLostError, DeviceMemoryError, PidError
from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from server import errors
from server.http.models import MemoryPart
from server.request import DecodeOptions
from tests.server.conftest import Running, run_server, simulated

DOCUMENT = (Path(__file__).parents[3] / "docs/http-api.md").read_text()
SIZE = Size(512, 512)  # of the images that the examples decode


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """A server with the decoder that the examples name, and another one."""
    decoders = {
        name: {"device": simulated(costs={SIZE: SimulatedCost()}, images={}, latent_channels=channels)}
        for name, channels in {"flux": 16, "sdxl": 4}.items()
    }
    with run_server(decoders=decoders, text_encoder=SimulatedTextEncoder()) as running:
        yield running


def examples(language: str, running: Running) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    assert blocks
    return "\n".join(blocks).replace("http://127.0.0.1:8000", running.url)


def rows(first_header: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this header."""
    table = re.search(rf"^\| {first_header} \|.*\n\|[- |]+\|\n((?:\|.*\n)+)", DOCUMENT, re.MULTILINE)
    assert table
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()]


def names(table: list[list[str]]) -> set[str]:
    return set(re.findall(r"`(\w+)`", " ".join(" ".join(cells) for cells in table)))


def size_and_format(path: Path) -> tuple[tuple[int, int], str | None]:
    with Image.open(path) as image:
        return image.size, image.format


def test_the_python_examples_run(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(examples("python", running), "http-api.md", "exec"), {})  # noqa: S102
    for name in ("image.png", "image-0.png", "image-1.png", "image-2.png"):
        assert size_and_format(tmp_path / name) == (SIZE, "PNG")


def test_the_shell_examples_run(running: Running, tmp_path: Path):
    script = examples("sh", running).replace("python -c", f"{sys.executable} -c")
    subprocess.run(["/bin/sh", "-ec", script], cwd=tmp_path, check=True, timeout=120)
    assert size_and_format(tmp_path / "image.png") == (SIZE, "PNG")
    assert size_and_format(tmp_path / "image.webp") == (SIZE, "WEBP")
    assert size_and_format(tmp_path / "image.jpg") == (SIZE, "JPEG")


def test_every_option_is_listed_with_its_default():
    table = {cells[0].strip("`"): cells[2] for cells in rows("option")}
    assert table.keys() == DecodeOptions.model_fields.keys()
    defaults = {name: field.default for name, field in DecodeOptions.model_fields.items() if field.default is not None}
    assert {name: table[name].strip("`") for name in defaults} == {
        name: f"{value:g}" if isinstance(value, float) else str(value).lower() for name, value in defaults.items()
    }


def test_every_error_is_listed_with_its_status():
    types = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, PidError)]
    known = {(error.status, error.code) for error in (*types, DecodeError, DeviceMemoryError, DeviceLostError)}
    known -= {(499, "client-left")}  # never sent
    known |= {(404, "no-such-route"), (405, "no-such-route")}
    table = {(int(status), cells[1].strip("`")) for cells in rows("status") for status in cells[0].split(", ")}
    assert table == known


def test_every_endpoint_is_listed(running: Running):
    paths = set(running.client.get("/openapi.json").json()["paths"])
    paths = {path for path in paths if not path.startswith("/v2/")}  # those are in protocols.md
    assert {re.findall(r"`[A-Z]+ (/[^`]*)`", cells[0])[0] for cells in rows("endpoint")} == paths | {"/docs"}


def test_every_member_of_info_is_listed(running: Running):
    info = running.client.get("/info").json()
    decoder = info["decoders"][0]
    nested = {*info["text_encoder"], *info["limits"], *info["costs"][0], *MemoryPart.model_fields}
    assert {*info, *nested} <= names(rows("member"))
    nested = {*decoder["latent_space"], *decoder["sizes"][0], *decoder["caption"]}
    assert {*decoder, *nested} <= names(rows("member of a decoder"))
