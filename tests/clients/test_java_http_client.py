"""Java's HttpClient against the server with the bundled decoder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.clients.latents import LATENT, RAW, RAW_QUERY, decode
from tests.programs import program

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_the_default_client_uploads_a_raw_latent_over_http_1_1(demo: str, tmp_path: Path, framing: str):
    latent, image = tmp_path / "latent", tmp_path / "image"
    latent.write_bytes(RAW)
    command = [program("java"), str(Path(__file__).with_name("Decode.java"))]
    command += [f"{demo}/decode?seed=7&{RAW_QUERY}", str(latent), str(image), framing]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout
    assert output == "200 HTTP_1_1\n"
    assert image.read_bytes() == decode(demo, LATENT, seed=7)
