"""curl against the server with the bundled decoder."""

from __future__ import annotations

import io
import json
import subprocess
import zipfile
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from engines.size import Size
from tests.clients.latents import JSON_TENSOR, LATENT, RAW, RAW_QUERY
from tests.programs import program

pytestmark = pytest.mark.clients

SIZE = Size(256, 256)
OCTETS, SAFETENSORS = "Content-Type: application/octet-stream", "Content-Type: application/x-safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the latent in all formats."""
    folder = tmp_path_factory.mktemp("latents")
    save_file({"latent": LATENT}, folder / "latent.safetensors")
    np.save(folder / "latent.npy", LATENT.numpy())
    (folder / "latent.raw").write_bytes(RAW)
    (folder / "latent.json").write_text(json.dumps({"latent": JSON_TENSOR, "seed": 7}))
    return folder


class Curl:
    """Calls curl in the directory of the latents."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder

    def __call__(self, path: str, *options: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [program("curl"), "--silent", "--show-error", "--max-time", "60", *options, self.url + path]
        return subprocess.run(command, cwd=self.folder, input=stdin, capture_output=True)

    def body(self, path: str, *options: str, stdin: bytes = b"") -> bytes:
        """Return the body of a response that must be a success."""
        completed = self(path, "--fail-with-body", *options, stdin=stdin)
        assert completed.returncode == 0, completed.stderr + completed.stdout
        return completed.stdout


@pytest.fixture(scope="module")
def curl(demo: str, folder: Path) -> Curl:
    return Curl(demo, folder)


@pytest.fixture(scope="module")
def expected(curl: Curl) -> bytes:
    """PNG of the latent with seed 7."""
    png = curl.body("/decode?seed=7", "-H", SAFETENSORS, "--data-binary", "@latent.safetensors")
    assert Image.open(io.BytesIO(png)).size == SIZE
    return png


DECODE_RAW = f"/decode?seed=7&{RAW_QUERY}"


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/decode?seed=7", ["-H", "Content-Type: application/x-npy", "--data-binary", "@latent.npy"]),
        ("/decode", ["--form", "latent=@latent.npy;type=application/x-npy", "--form", "seed=7"]),
        ("/decode", ["-H", "Content-Type: application/json", "--data", "@latent.json"]),
        (DECODE_RAW, ["-H", OCTETS, "--data-binary", "@latent.raw"]),
    ],
    ids=["npy", "form", "json", "raw"],
)
def test_all_body_formats_give_the_same_image(curl: Curl, expected: bytes, path: str, options: list[str]):
    assert curl.body(path, *options) == expected


def test_a_chunked_upload_from_a_pipe_is_decoded(curl: Curl, expected: bytes):
    options = ["--request", "POST", "-H", OCTETS, "--upload-file", "-"]
    assert curl.body(DECODE_RAW, *options, stdin=RAW) == expected


def test_http_1_0_gets_the_image_without_chunks(curl: Curl, expected: bytes):
    response = curl.body(DECODE_RAW, "--http1.0", "--include", "-H", OCTETS, "--data-binary", "@latent.raw")
    head, _, body = response.partition(b"\r\n\r\n")
    assert body == expected
    assert b"transfer-encoding" not in head.lower()


def test_an_offer_of_content_encodings_changes_nothing(curl: Curl, expected: bytes):
    options = ["--compressed", "-H", OCTETS, "--data-binary", "@latent.raw"]
    assert curl.body(DECODE_RAW, *options) == expected


def test_expect_100_continue_is_confirmed(curl: Curl):
    completed = curl(
        DECODE_RAW, "--verbose", "-H", "Expect: 100-continue", "-H", OCTETS, "--data-binary", "@latent.raw"
    )
    assert b"HTTP/1.1 100 Continue" in completed.stderr
    assert completed.stdout.startswith(b"\x89PNG")


def test_a_rejected_body_is_not_uploaded(curl: Curl):
    path = "/decode?steps=5&shape=16,16,16&dtype=float16"
    options = ["--verbose", "-H", "Expect: 100-continue", "--expect100-timeout", "30", "-H", OCTETS]
    completed = curl(path, *options, "--write-out", "%{size_upload}", "--data-binary", "@latent.raw")
    assert b"100 Continue" not in completed.stderr
    problem, size = completed.stdout[:-1], completed.stdout[-1:]
    assert (json.loads(problem)["code"], size) == ("invalid-option", b"0")


@pytest.mark.parametrize("path", ["/info", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/docs"])
def test_head_has_the_headers_of_get_and_no_body(curl: Curl, path: str):
    write = ["--output", "/dev/null", "--write-out", "%{http_code} %{content_type} %{size_download}"]
    get, head = (curl.body(path, *options).split() for options in (write, [*write, "--head"]))
    assert head[:-1] == get[:-1]
    assert head[-1] == b"0"


@pytest.mark.parametrize(("path", "methods"), [("/decode", {"POST"}), ("/info", {"GET", "HEAD"})])
def test_options_lists_the_methods(curl: Curl, path: str, methods: set[str]):
    head = curl.body(path, "--request", "OPTIONS", "--include").decode()
    allowed = {name.strip() for name in head.lower().partition("allow:")[2].splitlines()[0].upper().split(",")}
    assert allowed >= methods


def test_the_option_json_gets_the_image_in_base64(curl: Curl, expected: bytes):
    (image,) = json.loads(curl.body("/decode", "--json", "@latent.json"))["images"]
    assert b64decode(image["data"]) == expected


def test_a_batch_as_zip_can_be_extracted(curl: Curl, expected: bytes):
    raw = RAW + RAW
    path = "/decode?seed=7&shape=2,16,16,16&dtype=float16"
    options = ["-H", "Accept: application/zip", "-H", OCTETS, "--data-binary", "@-"]
    with zipfile.ZipFile(io.BytesIO(curl.body(path, *options, stdin=raw))) as archive:
        assert archive.namelist() == ["image-0.png", "image-1.png"]
        assert archive.read("image-0.png") == expected


def test_an_error_is_a_problem_document(curl: Curl):
    completed = curl("/decode?shape=16,16&dtype=float16", "--include", "-H", OCTETS, "--data-binary", "@latent.raw")
    head, _, body = completed.stdout.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert json.loads(body)["status"] == 422
