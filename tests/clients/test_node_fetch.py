"""Node's fetch against the server with the bundled decoder."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.conftest import Serve
from tests.clients.latents import JSON_TENSOR, LATENT, RAW, decode
from tests.programs import program
from tests.waiting import until

pytestmark = pytest.mark.clients

SCRIPT = Path(__file__).with_name("node_fetch.mjs")
SEED = 7


def node(case: str, url: str, **body: object) -> dict[str, Any]:
    command = [program("node"), str(SCRIPT), case, url]
    output = subprocess.run(command, input=json.dumps(body), stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    result: dict[str, Any] = json.loads(output.stdout)
    return result


def sha256_of_image(url: str, seed: int) -> str:
    return hashlib.sha256(decode(url, LATENT, seed=seed)).hexdigest()


def test_a_json_body_is_decoded(demo: str):
    result = node("json", demo, latent=JSON_TENSOR, seed=SEED)
    assert result == {"status": 200, "type": "image/png", "images": [sha256_of_image(demo, SEED)]}


def test_a_streamed_upload_and_a_streamed_response_have_the_same_image(demo: str):
    result = node("streamed", demo, latent=JSON_TENSOR, seed=SEED)
    assert result == {"status": 200, "seed": str(SEED), "images": [sha256_of_image(demo, SEED)]}


def twice() -> dict[str, object]:
    """Return the JSON tensor of a batch that holds the latent twice."""
    return {**JSON_TENSOR, "data": b64encode(2 * RAW).decode(), "shape": [2, *LATENT.shape]}


def test_a_multipart_batch_has_one_image_per_latent(demo: str):
    result = node("multipart", demo, latent=twice(), seed=SEED)
    assert result["type"].startswith("multipart/mixed")
    assert result["images"] == [sha256_of_image(demo, SEED), sha256_of_image(demo, SEED + 1)]


def test_a_batch_as_json_needs_no_parser(demo: str):
    result = node("batchAsJson", demo, latent=twice(), seed=SEED)
    images = result["body"]["images"]
    assert [image["seed"] for image in images] == [SEED, SEED + 1]
    for image in images:
        assert b64decode(image["data"]) == decode(demo, LATENT, seed=image["seed"])


def test_an_aborted_fetch_cancels_the_decode(serve: Serve):
    url = serve("tests.server.simulated_server")
    shape = [8, 16, 2, 2]  # 1.6 s of work
    latent = {"data": b64encode(bytes(2 * math.prod(shape))).decode(), "shape": shape, "dtype": "float16"}
    assert node("abort", url, latent=latent) == {"error": "AbortError"}

    def cancelled() -> bool:
        counts = re.findall(r"^pid_cancelled_total\{.*} ([\d.]+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
        return sum(map(float, counts)) > 0

    until(cancelled, "the decode to be cancelled")
