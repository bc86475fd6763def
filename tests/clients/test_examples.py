"""The examples in docs/clients.md and docs/protocols.md, run against servers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.clients.examples import example, replace, run_python
from tests.clients.latents import decode, pixels
from tests.programs import program

pytestmark = pytest.mark.clients

LATENT = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(0)).half()
PORT = "http://127.0.0.1:8000"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Working directory of an example, with the elements of the latent in the file `latent`."""
    (tmp_path / "latent").write_bytes(LATENT.numpy().tobytes())
    return tmp_path


def run(folder: Path, *command: str) -> None:
    subprocess.run([program(command[0]), *command[1:]], cwd=folder, check=True, timeout=120)


def test_node(flux: str, folder: Path):
    code = replace(example("clients.md", "js"), **{PORT: flux, "shape=16,64,64": "shape=16,8,8"})
    read = 'import { readFileSync, writeFileSync } from "node:fs";\nconst latent = readFileSync("latent");\n'
    write = 'writeFileSync("image.png", Buffer.from(await image.arrayBuffer()));\n'
    (folder / "example.mjs").write_text(read + code + write)
    run(folder, "node", "example.mjs")
    assert (folder / "image.png").read_bytes() == decode(flux, LATENT, seed=7)


def test_java(flux: str, folder: Path):
    code = replace(example("clients.md", "java"), **{PORT: flux, "shape=16,64,64": "seed=7&shape=16,8,8"})
    imports = ("java.net.URI", "java.net.http.*", "java.nio.file.*", "java.time.Duration")
    head = "".join(f"import {name};\n" for name in imports)
    read = 'byte[] latent = Files.readAllBytes(Path.of("latent"));\n'
    main = f"public static void main(String[] arguments) throws Exception {{\n{read}{code}}}"
    (folder / "Example.java").write_text(f"{head}class Example {{\n{main}\n}}\n")
    run(folder, "java", "Example.java")
    assert (folder / "image.png").read_bytes() == decode(flux, LATENT, seed=7)


def test_diffusers(flux: str, folder: Path):
    setup = """
import torch
from types import SimpleNamespace
pipe = SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=0.3611, shift_factor=0.1159)))
latents = torch.frombuffer(bytearray(open("latent", "rb").read()), dtype=torch.float16).reshape(1, 16, 8, 8)
"""
    code = replace(example("protocols.md", "python", "remote_decode("), **{PORT: flux})
    run_python(folder, setup, f'{code}image.save("image.png")\n')
    difference = pixels((folder / "image.png").read_bytes()).astype(int) - pixels(decode(flux, LATENT, seed=7))
    assert np.abs(difference).mean() < 2  # the default format is JPEG


def test_tritonclient(flux: str, folder: Path):
    setup = """
import numpy
latents = numpy.fromfile("latent", numpy.float16).reshape(1, 16, 8, 8)
"""
    address = flux.removeprefix("http://")
    code = example("protocols.md", "python", "InferenceServerClient(")
    code = replace(code, **{"127.0.0.1:8000": address, "64, 64": "8, 8", '"flux-2kto4k-v1.5"': '"simulated"'})
    run_python(folder, setup, code)
    assert np.array_equal(
        pixels((folder / "image.webp").read_bytes()), pixels(decode(flux, LATENT, seed=7, format="webp"))
    )
