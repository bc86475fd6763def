"""Linters of the OpenAPI document, and a client that openapi-python-client generates from it."""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy
import pytest
from PIL import Image
from safetensors.torch import save

from tests.clients.conftest import KEY
from tests.clients.latents import JSON_TENSOR, LATENT, RAW, decode, pixels
from tests.programs import run

pytestmark = pytest.mark.clients

DOCUMENT = (Path(__file__).parents[2] / "docs/http-api.md").read_text()
SEED = 7


@pytest.fixture(params=["without keys", "with keys"])
def document(request: pytest.FixtureRequest, demo: str, demo_with_keys: str, tmp_path: Path) -> Path:
    """The document of a server as a file."""
    url = demo_with_keys if request.param == "with keys" else demo
    path = tmp_path / "openapi.json"
    path.write_bytes(httpx.get(f"{url}/openapi.json").raise_for_status().content)
    return path


def test_redocly_reports_neither_errors_nor_warnings(document: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REDOCLY_TELEMETRY", "off")
    monkeypatch.setenv("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true")
    report = json.loads(run("redocly", "lint", "--extends=recommended", "--format=json", document))
    assert report["problems"] == []
    assert report["totals"] == {"errors": 0, "warnings": 0, "ignored": 0}


def test_spectral_reports_nothing(document: Path):
    ruleset = document.with_name("ruleset.yaml")
    ruleset.write_text('extends: ["spectral:oas"]\n')
    report = run("spectral", "lint", "--fail-severity=hint", "--ruleset", ruleset, document)
    assert "No results" in report


@dataclass(frozen=True)
class Generated:
    """The modules of the generated client."""

    package: str

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")

    def call(self, operation: str, url: str, key: str | None = None, **arguments: object) -> Any:
        """Call an operation, such as decode.decode, and return the response with its headers."""
        client = self.module("client")
        chosen = client.Client(base_url=url) if key is None else client.AuthenticatedClient(base_url=url, token=key)
        return self.module(f"api.{operation}").sync_detailed(client=chosen, **arguments)

    def model(self, name: str, **members: object) -> Any:
        return getattr(self.module("models"), name)(**members)

    def file(self, content: bytes, name: str | None = None) -> Any:
        return self.module("types").File(payload=io.BytesIO(content), file_name=name)


@pytest.fixture(scope="module")
def generated(demo: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generated]:
    """A client that was generated without warnings, with the configuration in docs/http-api.md."""
    folder = tmp_path_factory.mktemp("generated")
    (overrides,) = re.findall(r"^```yaml\n(content_type_overrides:.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    config = folder / "config.yaml"
    config.write_text(f"{overrides}post_hooks: []\n")  # ruff would only format the client
    url = f"{demo}/openapi.json"
    options = ["--config", config, "--output-path", folder / "generated_client", "--meta", "none", "--fail-on-warning"]
    run("openapi-python-client", "generate", "--url", url, *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield Generated("generated_client")


def is_the_image(response: Any, url: str, **options: object) -> bool:
    """Return whether the response is the image that `POST /decode` returns for `LATENT` and these options."""
    assert response.status_code == 200, response.content
    assert response.headers["X-Seed"] == str(SEED)
    return response.parsed.payload.read() == decode(url, LATENT, seed=SEED, **options)


def test_it_decodes_a_json_body_with_options_in_the_body(generated: Generated, demo: str):
    latent = generated.model("Tensor", **{**JSON_TENSOR, "dtype": generated.module("models").Dtype.FLOAT16})
    body = generated.model(
        "DecodeBody", latent=latent, seed=SEED, steps=2, format_=generated.module("models").ImageFormat.WEBP
    )
    assert is_the_image(generated.call("decode.decode", demo, body=body), demo, steps=2, format="webp")


def test_it_decodes_a_json_body_with_options_in_the_query(generated: Generated, demo: str):
    latent = generated.model("Tensor", **{**JSON_TENSOR, "dtype": generated.module("models").Dtype.FLOAT16})
    body = generated.model("DecodeBody", latent=latent)
    assert is_the_image(generated.call("decode.decode", demo, body=body, seed=SEED, sigma=0.5), demo, sigma=0.5)


def test_it_decodes_raw_elements_with_options_in_the_query(generated: Generated, demo: str):
    models = generated.module("models")
    options = {"seed": SEED, "compression": models.Compression.BEST, "priority": models.Priority.INTERACTIVE}
    raw = {"shape": "16,16,16", "dtype": models.Dtype.FLOAT16}
    response = generated.call("decode.decode", demo, body=generated.file(RAW), x_request_id="mine", **options, **raw)
    assert is_the_image(response, demo, compression="best")
    assert response.headers["X-Request-Id"] == "mine"


def test_it_decodes_files_whose_format_the_server_detects(generated: Generated, demo: str):
    npy = io.BytesIO()
    numpy.save(npy, LATENT.numpy())
    for content in (save({"latent": LATENT}), npy.getvalue()):
        response = generated.call("decode.decode", demo, body=generated.file(content), seed=SEED)
        assert is_the_image(response, demo)


def test_it_decodes_a_form(generated: Generated, demo: str):
    file = generated.file(save({"latent": LATENT}), "latent.safetensors")
    body = generated.model("DecodeForm", latent=file, seed=SEED, quality=95, metadata=True, sigma=0.25)
    response = generated.call("decode.decode", demo, body=body)
    assert response.status_code == 200, response.content
    image = response.parsed.payload.read()
    assert Image.open(io.BytesIO(image)).text["Seed"] == str(SEED)
    assert (pixels(image) == pixels(decode(demo, LATENT, seed=SEED, sigma=0.25))).all()


def test_it_returns_problems_as_typed_models(generated: Generated, demo: str):
    body = generated.file(save({"latent": LATENT}))
    response = generated.call("decode.decode", demo, body=body, steps=9)
    assert (response.status_code, response.parsed.code) == (422, "invalid-option")
    assert response.parsed.request_id == response.headers["X-Request-Id"]


def test_it_reads_the_documents_about_the_server(generated: Generated, demo: str):
    info = generated.call("operation.info", demo).parsed
    (decoder,) = info.decoders
    assert (decoder.latent_space.channels, decoder.sizes[0].latent) == (16, [16, 16])
    assert info.text_encoder is None
    assert {cost.stage.value for cost in info.costs} >= {"condition", "step", "finish", "encode"}
    assert generated.call("health.ready", demo).parsed.state == generated.module("models").State.READY
    assert "pid_requests_total" in generated.call("operation.metrics", demo).parsed


def test_it_sends_an_api_key(generated: Generated, demo_with_keys: str):
    body = save({"latent": LATENT})
    rejected = generated.call("decode.decode", demo_with_keys, body=generated.file(body))
    assert (rejected.status_code, rejected.parsed.code) == (401, "unauthorized")
    accepted = generated.call("decode.decode", demo_with_keys, key=KEY, body=generated.file(body), seed=SEED)
    assert accepted.status_code == 200
