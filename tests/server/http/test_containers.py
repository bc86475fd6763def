"""Containers of images over a real connection: multipart, JSON and zip."""

from __future__ import annotations

import base64
import email
import io
import json
import zipfile
from collections.abc import Iterator, Sequence

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from engines.errors import DecodeError
from engines.runtime.simulated import SimulatedCost
from server.http.containers import BASE64_PIECE, base64_pieces
from tests.server.conftest import IMAGE, SIZE, Running, make_latent, run_server
from tests.server.runtimes import PoisonedRuntime

MULTIPART, JSON, ZIP = "multipart/mixed", "application/json", "application/zip"


def decode(
    running: Running, images: int, accept: str, failing: Sequence[int] = (), **options: object
) -> httpx.Response:
    latents = make_latent(images, 16, 2, 2)
    latents[list(failing)] = PoisonedRuntime.POISON
    return running.client.post(
        "/decode",
        content=save({"latent": latents}),
        headers={"Content-Type": "application/x-safetensors", "Accept": accept},
        params=options,
    )


def read_multipart(response: httpx.Response) -> list[tuple[str, bytes]]:
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    parts = email.message_from_bytes(head + response.content).get_payload()
    return [(part.get_content_type(), part.get_payload(decode=True)) for part in parts]


def read_json(response: httpx.Response) -> list[tuple[str, bytes]]:
    images = response.json()["images"]
    assert [image["index"] for image in images] == list(range(len(images)))
    return [(image["media_type"], base64.b64decode(image["data"], validate=True)) for image in images]


def read_zip(response: httpx.Response) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        return [(name, archive.read(name)) for name in archive.namelist()]


READERS = {MULTIPART: read_multipart, JSON: read_json, ZIP: read_zip}


class TestImages:
    @pytest.mark.parametrize("images", [1, 3])
    @pytest.mark.parametrize("accept", [MULTIPART, JSON, ZIP])
    def test_a_container_has_every_image_in_order(self, server: Running, accept: str, images: int):
        response = decode(server, images, accept, seed=7)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(accept)
        assert response.headers["x-seed"] == ", ".join(str(7 + index) for index in range(images))
        entries = READERS[accept](response)
        assert len(entries) == images
        for _, data in entries:
            assert (np.asarray(Image.open(io.BytesIO(data))) == IMAGE).all()

    def test_names_and_media_types_follow_the_format(self, server: Running):
        assert [name for name, _ in read_zip(decode(server, 2, ZIP))] == ["image-0.png", "image-1.png"]
        assert [name for name, _ in read_zip(decode(server, 1, ZIP, format="jpeg"))] == ["image-0.jpg"]
        assert [kind for kind, _ in read_json(decode(server, 1, f"{JSON}, image/webp;q=0.5"))] == ["image/webp"]

    def test_json_has_the_seed_of_each_image(self, server: Running):
        images = decode(server, 3, JSON, seed=2**64 - 1).json()["images"]
        assert [image["seed"] for image in images] == [2**64 - 1, 0, 1]

    def test_the_same_images_give_the_same_archive(self, server: Running):
        assert decode(server, 2, ZIP).content == decode(server, 2, ZIP).content


@pytest.fixture(scope="module")
def failing() -> Iterator[Running]:
    runtime = PoisonedRuntime(DecodeError("The decoder failed."), {SIZE: SimulatedCost()}, {SIZE: IMAGE})
    with run_server(runtime) as running:
        yield running


class TestFailures:
    def test_a_failed_image_is_a_part_of_a_multipart_body(self, failing: Running):
        response = decode(failing, 3, MULTIPART, failing=[1])
        kinds = [kind for kind, _ in read_multipart(response)]
        assert (response.status_code, kinds) == (200, ["image/png", "application/problem+json", "image/png"])

    def test_a_failed_image_is_an_item_of_the_json(self, failing: Running):
        response = decode(failing, 3, JSON, failing=[1])
        first, second, third = response.json()["images"]
        assert response.status_code == 200
        assert (second["index"], second["problem"]["code"]) == (1, "decode-failed")
        assert sorted(first) == sorted(third) == ["data", "index", "media_type", "seed"]

    def test_a_failed_image_is_a_file_in_the_archive(self, failing: Running):
        response = decode(failing, 3, ZIP, failing=[1])
        entries = dict(read_zip(response))
        assert (response.status_code, list(entries)) == (200, ["image-0.png", "image-1.json", "image-2.png"])
        assert json.loads(entries["image-1.json"])["code"] == "decode-failed"

    @pytest.mark.parametrize("accept", [MULTIPART, JSON, ZIP])
    def test_the_failure_of_the_only_image_is_the_response(self, failing: Running, accept: str):
        response = decode(failing, 1, accept, failing=[0])
        assert (response.status_code, response.json()["code"]) == (500, "decode-failed")
        assert response.headers["content-type"] == "application/problem+json"


@given(st.lists(st.binary(max_size=7) | st.integers(0, 3 * BASE64_PIECE).map(bytes), max_size=4))
def test_base64_of_pieces_is_that_of_the_whole(chunks):
    assert b"".join(base64_pieces(chunks)) == base64.b64encode(b"".join(chunks))
