"""KServe v2: metadata, inference in JSON and binary, and errors. tritonclient itself is tested in tests/clients."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from engines.captions.simulated import SimulatedTextEncoder
from engines.errors import DecodeError
from engines.runtime.simulated import SimulatedCost
from server.http.protocols.kserve_response import HEADER_LENGTH
from tests.server.conftest import IMAGE, SIZE, Running, make_latent, run_server
from tests.server.runtimes import PoisonedRuntime, RecordingRuntime

MODEL = "/v2/models/simulated"
LATENT = make_latent(1, 16, 2, 2)
CAPTION = make_latent(1, 300, 2304)
DTYPES = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Running, RecordingRuntime]]:
    runtime = RecordingRuntime("flux", {SIZE: SimulatedCost()}, {SIZE: IMAGE})
    with run_server(runtime, max_images=3, text_encoder=SimulatedTextEncoder(width=2304, tokens=300)) as running:
        yield running, runtime


@pytest.fixture(scope="module")
def running(pair) -> Running:
    return pair[0]


def data_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def binary_input(name: str, tensor: torch.Tensor, datatype: str = "FP32") -> tuple[dict, bytes]:
    data = data_of(tensor.to(DTYPES[datatype]))
    return describe(name, tensor, datatype) | {"parameters": {"binary_data_size": len(data)}}, data


def describe(name: str, tensor: torch.Tensor, datatype: str = "FP32") -> dict:
    return {"name": name, "shape": list(tensor.shape), "datatype": datatype}


def json_input(name: str, tensor: torch.Tensor, nested: bool = False) -> tuple[dict, bytes]:
    return describe(name, tensor) | {"data": (tensor if nested else tensor.flatten()).tolist()}, b""


def prompt_input(*prompts: str) -> tuple[dict, bytes]:
    data = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in prompts)
    tensor = {"name": "prompt", "shape": [len(prompts)], "datatype": "BYTES"}
    return tensor | {"parameters": {"binary_data_size": len(data)}}, data


def infer(running: Running, *inputs: tuple[dict, bytes], path: str = f"{MODEL}/infer", **members: object):
    text = json.dumps({"inputs": [description for description, _ in inputs], **members}).encode()
    blobs = b"".join(data for _, data in inputs)
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))} if blobs else {}
    return running.client.post(path, content=text + blobs, headers=headers)


BINARY = {"binary_data_output": True}


def outputs(response: httpx.Response) -> dict[str, object]:
    """Return the outputs: bytes of those in binary, the data of those in JSON."""
    assert response.status_code == 200, response.text
    assert int(response.headers["content-length"]) == len(response.content)
    end = int(response.headers.get(HEADER_LENGTH, len(response.content)))
    document, blobs = json.loads(response.content[:end]), response.content[end:]
    assert (document["model_name"], document["model_version"]) == ("simulated", "1")
    values: dict[str, object] = {}
    for output in document["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        values[output["name"]] = output["data"] if size is None else blobs[:size]
        blobs = blobs[size or 0 :]
    assert blobs == b""
    return values


def elements(data: object) -> list[bytes]:
    """Split the binary data of BYTES."""
    assert isinstance(data, bytes)
    items = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        items.append(data[4 : 4 + length])
        data = data[4 + length :]
    return items


def is_image(data: bytes) -> bool:
    return bool((np.asarray(Image.open(io.BytesIO(data))) == IMAGE).all())


def rejected(response: httpx.Response, status: int, code: str) -> str:
    assert response.headers["content-type"] == "application/json"
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert response.json()["request_id"] == response.headers["x-request-id"]
    return response.json()["error"]


class TestMetadata:
    def test_the_server_declares_the_binary_extension(self, running: Running):
        document = running.client.get("/v2").json()
        assert document["extensions"] == ["binary_tensor_data"]

    @pytest.mark.parametrize(
        "path", ["/v2/health/live", "/v2/health/ready", f"{MODEL}/ready", f"{MODEL}/versions/1/ready"]
    )
    def test_health(self, running: Running, path: str):
        assert running.client.get(path).status_code == 200

    @pytest.mark.parametrize("path", ["/v2/health/ready", f"{MODEL}/ready"])
    def test_a_server_that_drains_is_not_ready(self, path: str):
        with run_server() as draining:
            draining.service.lifecycle.drain()
            assert draining.client.get(path).status_code == 503
            assert draining.client.get("/v2/health/live").status_code == 200

    def test_the_model_describes_its_inputs_and_outputs(self, running: Running):
        document = running.client.get(MODEL).json()
        inputs = {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in document["inputs"]}
        assert inputs["latent"] == ("FP32", [-1, 16, -1, -1])
        assert inputs["caption"] == ("FP32", [-1, 300, 2304])
        assert inputs["prompt"] == ("BYTES", [-1])
        assert [tensor["name"] for tensor in document["outputs"]] == ["image", "pixels", "seed"]
        assert document["versions"] == ["1"]

    @pytest.mark.parametrize("path", ["/v2/models/other", f"{MODEL}/versions/2"])
    def test_another_model_is_unknown(self, running: Running, path: str):
        for response in (
            running.client.get(path),
            running.client.get(f"{path}/ready"),
            infer(running, binary_input("latent", LATENT), path=f"{path}/infer"),
        ):
            assert rejected(response, 404, "unknown-model")


class TestInference:
    @pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32"])
    def test_binary_latents(self, pair, datatype: str):
        running, runtime = pair
        values = outputs(infer(running, binary_input("latent", LATENT, datatype), parameters={**BINARY, "seed": 7}))
        assert list(values) == ["image", "seed"]
        assert list(map(is_image, elements(values["image"]))) == [True]
        assert np.frombuffer(values["seed"], "<u8").tolist() == [7]
        assert torch.equal(runtime.samples[-1].latent, LATENT.to(DTYPES[datatype]).float()[0])

    @pytest.mark.parametrize("nested", [False, True])
    def test_latents_in_json(self, pair, nested: bool):
        running, runtime = pair
        values = outputs(infer(running, json_input("latent", LATENT, nested), parameters={"seed": 2**64 - 1}))
        assert is_image(base64.b64decode(values["image"][0]))
        assert values["seed"] == [2**64 - 1]
        assert torch.equal(runtime.samples[-1].latent, LATENT[0])

    def test_a_batch_and_the_id(self, running: Running):
        latents = binary_input("latent", make_latent(3, 16, 2, 2))
        response = infer(running, latents, id="a", parameters={**BINARY, "seed": 5, "format": "png"})
        values = outputs(response)
        assert json.loads(response.content[: int(response.headers[HEADER_LENGTH])])["id"] == "a"
        assert list(map(is_image, elements(values["image"]))) == [True] * 3
        assert np.frombuffer(values["seed"], "<u8").tolist() == [5, 6, 7]

    def test_pixels(self, running: Running):
        requested = [{"name": "pixels", "parameters": {"binary_data": True}}, {"name": "seed"}]
        values = outputs(infer(running, binary_input("latent", make_latent(2, 16, 2, 2)), outputs=requested))
        assert values["pixels"] == 2 * IMAGE.tobytes()
        assert len(values["seed"]) == 2

    def test_a_caption(self, pair):
        running, runtime = pair
        outputs(infer(running, binary_input("latent", LATENT, "FP16"), binary_input("caption", CAPTION, "BF16")))
        assert torch.equal(runtime.samples[-1].caption, CAPTION.bfloat16().float()[0])

    def test_prompts(self, pair):
        running, runtime = pair
        latents = binary_input("latent", make_latent(2, 16, 2, 2))
        for prompt in (
            prompt_input("a fox", "ein Bär"),
            ({"name": "prompt", "shape": [2, 1], "datatype": "BYTES", "data": [["a fox"], ["ein Bär"]]}, b""),
        ):
            runtime.samples.clear()
            outputs(infer(running, latents, prompt))
            first, second = (sample.caption for sample in runtime.samples)
            assert not torch.equal(first, second)
        long = "fox " * 1000
        outputs(infer(running, latents, ({"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [long]}, b"")))

    def test_options_are_parameters_of_the_request_or_the_query(self, pair):
        running, runtime = pair
        parameters = {"sigma": 0.25, "steps": 2, "priority": 1, "timeout": 30_000_000, "format": "webp", **BINARY}
        values = outputs(
            infer(running, binary_input("latent", LATENT), path=f"{MODEL}/infer?seed=3", parameters=parameters)
        )
        assert (runtime.samples[-1].sigma, runtime.samples[-1].seed) == (0.25, 3)
        assert Image.open(io.BytesIO(elements(values["image"])[0])).format == "WEBP"

    def test_requests_are_counted_by_protocol(self, running: Running):
        outputs(infer(running, binary_input("latent", LATENT)))
        series = 'pid_requests_total{code="200",decoder="simulated",protocol="kserve"}'
        (line,) = [line for line in running.client.get("/metrics").text.splitlines() if line.startswith(series)]
        assert float(line.split()[1]) >= 1


class TestErrors:
    def test_the_failure_of_one_image_is_the_response(self):
        runtime = PoisonedRuntime(DecodeError("The decoder failed."), {SIZE: SimulatedCost()}, {SIZE: IMAGE})
        latents = make_latent(2, 16, 2, 2)
        latents[1] = PoisonedRuntime.POISON
        with run_server(runtime) as failing:
            rejected(infer(failing, binary_input("latent", latents)), 500, "decode-failed")

    @pytest.mark.parametrize(
        ("members", "part"),
        [
            ({"inputs": 1}, "inputs"),
            ({"inputs": []}, "latent"),
            ({"inputs": [{"name": "latent"}]}, "inputs.0.shape"),
            ({"inputs": [json_input("latent", LATENT)[0] | {"x": 1}]}, "inputs.0.x"),
            ({"inputs": [json_input("latent", LATENT)[0] | {"name": "image"}]}, "latent, caption or prompt"),
            ({"inputs": [json_input("latent", LATENT)[0]] * 2}, "twice"),
            ({"inputs": [describe("latent", LATENT)]}, "data or binary_data_size"),
            ({"inputs": [binary_input("latent", LATENT)[0]]}, "adds up to 256"),
            ({"inputs": [json_input("latent", LATENT)[0] | {"datatype": "FP16"}]}, "send it as binary"),
            ({"inputs": [json_input("latent", LATENT)[0] | {"datatype": "INT8"}]}, "FP16, BF16 or FP32"),
            ({"inputs": [json_input("latent", LATENT)[0] | {"shape": [1, 16, 2, 3]}]}, "does not match its shape"),
            ({"inputs": [json_input("latent", LATENT)[0] | {"data": ["x"]}]}, "number"),
            ({"parameters": {"sede": 3}}, "did you mean seed"),
            ({"parameters": {"priority": 4}}, "batch"),
            ({"parameters": {"timeout": "1"}}, "microseconds"),
            ({"parameters": {"binary_data_output": 1}}, "binary_data_output"),
            ({"outputs": [{"name": "x"}]}, "Unknown output 'x'"),
            ({"outputs": [{"name": "image"}, {"name": "pixels"}]}, "not both"),
            ({"outputs": [{"name": "seed"}, {"name": "seed"}]}, "twice"),
            ({"outputs": [{"name": "pixels", "parameters": {"binary_data": False}}]}, "binary_data=true"),
            ({"id": 3}, "id"),
        ],
    )
    def test_an_invalid_request_is_rejected(self, running: Running, members: dict[str, object], part: str):
        body = {"inputs": [json_input("latent", LATENT)[0]], **members}
        response = running.client.post(f"{MODEL}/infer", json=body)
        assert response.status_code in (400, 422)
        assert part in response.json()["error"]

    @pytest.mark.parametrize(
        "prompt",
        [
            ({"name": "prompt", "shape": [2], "datatype": "BYTES", "data": ["a"]}, b""),
            ({"name": "prompt", "shape": [1], "datatype": "BYTES", "data": "a"}, b""),
            ({"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [3]}, b""),
            ({"name": "prompt", "shape": [], "datatype": "BYTES", "data": ["a"]}, b""),
            ({"name": "prompt", "shape": [1], "datatype": "FP32", "data": ["a"]}, b""),
            ({**prompt_input("a")[0], "shape": [2]}, prompt_input("a")[1]),
            (prompt_input("a")[0], b"\xff\0\0\0a"),
            (prompt_input("a")[0], b"\1\0\0\0\xff"),
            ({**prompt_input("a")[0], "parameters": {"binary_data_size": 2}}, b"\0\0"),
            ({**prompt_input("a")[0], "parameters": {"binary_data_size": 8000}}, bytes(8000)),
        ],
    )
    def test_an_invalid_prompt_is_rejected(self, running: Running, prompt: tuple[dict, bytes]):
        response = infer(running, binary_input("latent", LATENT), prompt)
        assert response.status_code in (400, 422)
        assert "prompt" in response.json()["error"]

    @pytest.mark.parametrize("length", ["", "-1", "x", "1e3", "99999999", "9" * 30, "0"])
    def test_an_invalid_length_of_the_json_is_rejected(self, running: Running, length: str):
        response = running.client.post(f"{MODEL}/infer", content=b"{}", headers={HEADER_LENGTH: length})
        rejected(response, 400, "malformed-body")

    def test_other_errors_have_the_same_form(self, running: Running):
        assert rejected(running.client.get("/v2/x"), 404, "no-such-route")
        assert rejected(running.client.get(f"{MODEL}/infer"), 405, "no-such-route")
        response = running.client.post(f"{MODEL}/infer", content=b"x", headers={"Content-Type": "text/plain"})
        assert rejected(response, 415, "unsupported-media-type")
        response = running.client.post(f"{MODEL}/infer?sigma=2", json={})
        assert "sigma" in rejected(response, 422, "invalid-option")


def test_probes_need_no_key_but_the_model_does(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("test:" + "k" * 20)
    with run_server(api_keys=keys) as protected:
        assert protected.client.get("/v2/health/live").status_code == 200
        assert protected.client.get("/v2/health/ready").status_code == 200
        assert rejected(protected.client.get(MODEL), 401, "unauthorized")
        assert rejected(infer(protected, binary_input("latent", LATENT)), 401, "unauthorized")
