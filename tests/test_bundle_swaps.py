"""Replacement of the bundle of a running server process, with real bundles: by a link, by SIGHUP and under load."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def connected(server: Process) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=300)


def described(client: httpx.Client, name: str | None) -> dict[str, Any]:
    """Return the description of a decoder, or of the only one."""
    (decoder,) = [each for each in client.get("/info").json()["decoders"] if name in (None, each["name"])]
    return decoder


def notes(client: httpx.Client, name: str | None = None) -> list[str]:
    return described(client, name)["notes"]


def metric(client: httpx.Client, start: str) -> float:
    """Return the value of the only series whose line begins with `start`."""
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(start)]
    return float(line.rpartition(" ")[2])


def failures(client: httpx.Client) -> float:
    return metric(client, 'pid_bundle_swaps_total{decoder="dct-demo",result="failed"}')


def decode(client: httpx.Client, name: str | None = None) -> bytes:
    decoder = described(client, name)
    shape = (decoder["latent_space"]["channels"], *decoder["sizes"][0]["latent"])
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    headers = {"Content-Type": "application/x-safetensors"}
    options = {"seed": 1, "deadline_ms": 300_000, "decoder": decoder["name"]}
    response = client.post("/decode", content=save({"latent": latent}), headers=headers, params=options)
    assert response.status_code == 200, response.text
    return response.content


def point(link: Path, target: Path) -> None:
    """Point an existing symbolic link to another bundle, atomically."""
    new = link.with_name("new")
    new.symlink_to(target)
    os.rename(new, link)


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


@pytest.fixture
def client(server: Process) -> Iterator[httpx.Client]:
    with connected(server) as client:
        yield client


def test_bundles_are_replaced_and_unusable_ones_rejected(
    server: Process, client: httpx.Client, link: Path, demo_bundle: Path, tmp_path: Path
):
    image = decode(client)

    second = copy_of(demo_bundle, tmp_path / "second", "second")
    point(link, second)
    until(lambda: "second" in notes(client))
    assert decode(client) == image

    damaged = copy_of(demo_bundle, tmp_path / "damaged", "damaged")
    weights = damaged / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    point(link, damaged)
    until(lambda: failures(client) == 1)
    assert "second" in notes(client)
    assert decode(client) == image

    shutil.rmtree(second)
    copy_of(demo_bundle, damaged.with_name("third"), "third")
    shutil.rmtree(damaged)
    os.rename(tmp_path / "third", damaged)
    os.kill(server.pid, signal.SIGHUP)  # the link has not moved
    until(lambda: "third" in notes(client))
    assert decode(client) == image

    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert any(line["level"] == "error" and "SHA-256" in line["message"] for line in lines)


def test_no_request_fails_while_bundles_are_replaced_under_load(
    client: httpx.Client, link: Path, demo_bundle: Path, tmp_path: Path
):
    bundles = {note: copy_of(demo_bundle, tmp_path / note, note) for note in ("first", "second")}
    images: list[bytes] = []
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            images.append(decode(client))

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(send) for _ in range(3)]
        try:
            for note in ("first", "second") * 2:
                point(link, bundles[note])
                until(lambda note=note: note in notes(client))
                before = len(images)
                until(lambda before=before: len(images) > before + 4, "images of the new bundle")
        finally:
            stop.set()
            for each in clients:
                each.result()
    assert failures(client) == 0


def test_a_bundle_whose_file_system_hangs_stops_neither_requests_nor_the_exit(link: Path, tmp_path: Path):
    (tmp_path / "hanging").mkdir()
    os.mkfifo(tmp_path / "hanging/manifest.json")  # opening it waits for a writer
    server = decode_server(link, ["--drain-delay", "0"], tmp_path / "log")
    with running(server), connected(server) as client:
        point(link, tmp_path / "hanging")
        until(lambda: metric(client, "pid_bundle_swap_seconds{") > 1)
        assert decode(client)
        assert failures(client) == 0
    assert asyncio.run(server.stop()) == 0  # its exit status


def test_a_bundle_is_replaced_while_the_weights_of_decoders_move(demo_bundle: Path, link: Path, tmp_path: Path):
    flags = ["--bundle", f"b={link}", "--resident", "1", "--drain-delay", "0"]
    server = decode_server(Path(f"a={demo_bundle}"), flags, tmp_path / "log")
    with running(server), connected(server) as client:
        image = decode(client, "a")
        assert decode(client, "b") == decode(client, "a") == image
        before = metric(client, 'pid_weight_restores_total{decoder="a"}')
        point(link, copy_of(demo_bundle, tmp_path / "second", "second"))
        while "second" not in notes(client, "b"):
            assert decode(client, "a") == decode(client, "b") == image
        for name in "bab":
            assert decode(client, name) == image
        assert metric(client, 'pid_weight_restores_total{decoder="a"}') > before
        memory = client.get("/info").json()["memory"]
        assert [each["decoder"] for each in memory if each["part"] == "weights"] == ["a", "b"]
