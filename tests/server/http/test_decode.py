"""Responses of POST /decode over a real connection, on the simulated runtime."""

from __future__ import annotations

import base64
import email
import io

import httpx
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save

from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from server.images.available import available_formats
from tests.server.conftest import IMAGE, SIZE, Running, Serve, make_latent, simulated
from tests.server.images.decoding import decode
from tests.server.runtimes import LateRowsRuntime

SAFETENSORS = {"Content-Type": "application/x-safetensors"}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


class TestImages:
    def test_the_response_to_one_latent_is_a_png_of_the_decoded_pixels(self, server: Running):
        response = server.decode(seed=5)
        assert response.status_code == 200
        assert response.headers["content-type"] == "image/png"
        assert response.headers["transfer-encoding"] == "chunked"
        assert response.headers["x-seed"] == "5"
        assert {part.split(";")[0] for part in response.headers["server-timing"].split(", ")} >= {"queue"}
        assert (pixels(response.content) == IMAGE).all()

    @pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
    def test_the_format_is_chosen_by_the_option_or_the_accept_header(self, server: Running, name: str, kind: str):
        accept = {**SAFETENSORS, "Accept": f"image/{name}, image/*;q=0.5"}
        for response in (
            server.decode(format=name),
            server.client.post("/decode", content=save({"latent": make_latent()}), headers=accept),
        ):
            assert response.headers["content-type"] == f"image/{name}"
            assert Image.open(io.BytesIO(response.content)).format == kind

    @pytest.mark.parametrize("name", ["avif", "jxl"])
    def test_formats_of_optional_packages(self, server: Running, name: str):
        if name not in available_formats():
            pytest.skip(f"{name} is not available")
        response = server.decode(format=name, quality=100)
        assert response.headers["content-type"] == f"image/{name}"
        assert int(response.headers["content-length"]) == len(response.content)
        found = decode(response.content, name, SIZE).astype(int)
        assert np.abs(found - IMAGE).max() <= (0 if name == "jxl" else 40)

    @pytest.mark.parametrize("name", ["webp", "jpeg", "raw", "npy"])
    def test_the_length_is_known_unless_the_image_is_a_png(self, server: Running, name: str):
        response = server.decode(format=name)
        assert int(response.headers["content-length"]) == len(response.content)
        assert "transfer-encoding" not in response.headers

    def test_raw_and_npy_are_the_pixels(self, server: Running):
        response = server.decode(format="raw")
        assert response.headers["content-type"] == "application/octet-stream"
        assert (response.headers["x-shape"], response.headers["x-dtype"]) == ("64,64,3", "uint8")
        assert response.content == IMAGE.tobytes()
        response = server.decode(format="npy")
        assert response.headers["content-type"] == "application/x-npy"
        assert np.array_equal(np.load(io.BytesIO(response.content), allow_pickle=False), IMAGE)

    def test_a_random_seed_is_returned_if_the_request_sets_none(self, server: Running):
        first, second = server.decode().headers["x-seed"], server.decode().headers["x-seed"]
        assert first != second
        assert 0 <= int(first) < 2**53

    def test_metadata_is_written_only_on_request(self, server: Running):
        without = Image.open(io.BytesIO(server.decode(seed=9).content))
        image = Image.open(io.BytesIO(server.decode(seed=9, sigma=0.25, steps=2, metadata="true").content))
        assert without.text == {}
        assert image.text["Seed"] == "9"
        assert image.text["Sigma"] == "0.25"
        assert image.text["Steps"] == "2"
        assert image.text["Decoder"] == "simulated"

    def test_the_response_to_a_batch_has_one_part_per_image_in_order(self, server: Running):
        response = server.decode(make_latent(3, 16, 2, 2), seed=2**64 - 1)
        assert response.status_code == 200
        message = email.message_from_bytes(
            b"Content-Type: " + response.headers["content-type"].encode() + b"\r\n\r\n" + response.content
        )
        parts = message.get_payload()
        assert [part["X-Index"] for part in parts] == ["0", "1", "2"]
        assert [part["X-Seed"] for part in parts] == [str(2**64 - 1), "0", "1"]
        for part in parts:
            assert part.get_content_type() == "image/png"
            assert pixels(part.get_payload(decode=True)).shape == (*SIZE, 3)

    def test_the_first_strips_are_sent_before_the_last_rows_arrive(self, serve: Serve):
        size = Size(512, 512)
        runtime = LateRowsRuntime({size: SimulatedCost()}, {size: np.zeros((*size, 3), np.uint8)})
        with serve(runtime) as running:
            runtime.arrived.clear()
            body = save({"latent": make_latent(16, 16, 16)})
            with running.client.stream("POST", "/decode", content=body, headers=SAFETENSORS) as response:
                chunks = response.iter_raw()
                head = next(chunks)
                assert head.startswith(b"\x89PNG")
                runtime.arrived.set()
                assert pixels(head + b"".join(chunks)).shape == (512, 512, 3)


class TestBodies:
    def test_every_kind_of_body_is_decoded(self, server: Running):
        latent = make_latent()
        raw = latent.numpy().tobytes()
        npy = io.BytesIO()
        np.save(npy, latent.numpy())
        tensor = {"data": base64.b64encode(raw).decode(), "shape": [16, 2, 2], "dtype": "float32"}
        post = server.client.post
        responses = [
            server.decode(latent),
            post("/decode", content=npy.getvalue(), headers={"Content-Type": "application/x-npy"}),
            post(
                "/decode",
                content=raw,
                headers={"Content-Type": "application/octet-stream"},
                params={"shape": "16,2,2", "dtype": "float32"},
            ),
            post("/decode", json={"latent": tensor, "seed": 3}),
            post("/decode", files={"latent": ("latent.npy", npy.getvalue())}, data={"seed": "3"}),
        ]
        assert [response.status_code for response in responses] == [200] * 5
        assert responses[3].headers["x-seed"] == responses[4].headers["x-seed"] == "3"

    def test_the_example_of_the_openapi_document_is_decoded(self, server: Running):
        operation = server.client.get("/openapi.json").json()["paths"]["/decode"]["post"]
        example = operation["requestBody"]["content"]["application/json"]["example"]
        assert server.client.post("/decode", json=example).status_code == 200


class TestPriorityAndDeadline:
    def post(self, server: Running, headers: dict[str, str], **options: object) -> httpx.Response:
        content = save({"latent": make_latent()})
        return server.client.post("/decode", content=content, headers={**SAFETENSORS, **headers}, params=options)

    def test_priority_and_deadline_are_options_and_the_deadline_is_also_a_header(self, server: Running):
        assert server.decode(priority="interactive", deadline_ms=5000).status_code == 200
        assert self.post(server, {"X-Deadline-Ms": "5000"}).status_code == 200
        assert self.post(server, {"X-Deadline-Ms": "5000"}, deadline_ms=5000).status_code == 200

    @pytest.mark.parametrize("headers", [{"X-Deadline-Ms": "5000"}, {"X-Deadline-Ms": "soon"}])
    def test_a_header_that_is_invalid_or_contradicts_the_option_is_rejected(self, server: Running, headers: dict):
        response = self.post(server, headers, deadline_ms=4000)
        assert (response.status_code, response.json()["code"]) == (422, "invalid-option")
        assert "deadline_ms" in response.json()["detail"]

    def test_a_deadline_over_the_servers_limit_is_rejected(self, server: Running):
        limit = server.client.get("/info").json()["limits"]["max_deadline_seconds"]
        response = server.decode(deadline_ms=int(1000 * limit) + 1)
        assert (response.status_code, response.json()["code"]) == (422, "invalid-option")
        assert f"limited to {1000 * limit:.0f}" in response.json()["detail"]

    @pytest.mark.parametrize("value", [600_000, 600_001, 10**8, 10**19])
    def test_a_client_may_wait_longer_than_the_servers_limit(self, server: Running, value: int):
        assert self.post(server, {"X-Deadline-Ms": str(value)}).status_code == 200

    def test_a_client_that_waits_longer_has_the_servers_limit(self, serve: Serve):
        with serve(simulated(costs={SIZE: SimulatedCost(step=0.1)}), max_deadline=0.2) as running:
            response = self.post(running, {"X-Deadline-Ms": "5000"})
            assert (response.status_code, response.json()["code"]) == (422, "deadline-too-short")

    def test_priority_and_deadline_are_in_the_openapi_document(self, server: Running):
        document = server.client.get("/openapi.json").json()
        operation = document["paths"]["/decode"]["post"]
        parameters = {(parameter["name"], parameter["in"]) for parameter in operation["parameters"]}
        assert parameters >= {("priority", "query"), ("deadline_ms", "query"), ("X-Deadline-Ms", "header")}
        assert document["components"]["schemas"]["Priority"]["enum"] == ["interactive", "standard", "batch"]
