"""Replacement of the bundle of a running server process, with real bundles, by a link and by SIGHUP."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save

from engines.bundle import open_bundle, write_bundle
from loadtest.processes import Process, decode_server, running
from tests.waiting import until


def copy_of(bundle: Path, target: Path, note: str) -> Path:
    """Write a bundle with the same files and another manifest."""
    source = open_bundle(bundle)
    files = {name: lambda path, name=name: shutil.copy(bundle / name, path) for name in source.manifest.files}
    changed = source.manifest.model_copy(update={"warnings": (*source.manifest.warnings, note)})
    return write_bundle(target, changed, files).path


def notes(server: Process) -> list[str]:
    (decoder,) = httpx.get(f"{server.url}/info").json()["decoders"]
    return decoder["notes"]


def failures(server: Process) -> int:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("pid_bundle_swaps_total") and 'result="failed"' in line]
    return int(float(line.rpartition(" ")[2]))


def decode(server: Process) -> bytes:
    (decoder,) = httpx.get(f"{server.url}/info").json()["decoders"]
    shape = (decoder["latent_space"]["channels"], *decoder["sizes"][0]["latent"])
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    headers = {"Content-Type": "application/x-safetensors"}
    response = httpx.post(f"{server.url}/decode?seed=1", content=save({"latent": latent}), headers=headers, timeout=300)
    assert response.status_code == 200, response.text
    return response.content


@pytest.fixture
def link(demo_bundle: Path, tmp_path: Path) -> Path:
    path = tmp_path / "current"
    path.symlink_to(demo_bundle)
    return path


@pytest.fixture
def server(link: Path, tmp_path: Path) -> Iterator[Process]:
    process = decode_server(link, ["--drain-delay", "0"], tmp_path / "log")
    with running(process):
        yield process


def test_bundles_are_replaced_and_unusable_ones_rejected(
    server: Process, link: Path, demo_bundle: Path, tmp_path: Path
):
    image = decode(server)

    second = copy_of(demo_bundle, tmp_path / "second", "second")
    (tmp_path / "new").symlink_to(second)
    os.rename(tmp_path / "new", link)
    until(lambda: "second" in notes(server))
    assert decode(server) == image

    damaged = copy_of(demo_bundle, tmp_path / "damaged", "damaged")
    weights = damaged / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "new").symlink_to(damaged)
    os.rename(tmp_path / "new", link)
    until(lambda: failures(server) == 1)
    assert "second" in notes(server)
    assert decode(server) == image

    shutil.rmtree(second)
    copy_of(demo_bundle, damaged.with_name("third"), "third")
    shutil.rmtree(damaged)
    os.rename(tmp_path / "third", damaged)
    os.kill(server.pid, signal.SIGHUP)  # the link has not moved
    until(lambda: "third" in notes(server))
    assert decode(server) == image

    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert any(line["level"] == "error" and "SHA-256" in line["message"] for line in lines)
