"""A server with several decoders: each request gets the right one, and each decoder is reported separately."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from server.http.protocols.kserve_response import VERSION
from tests.server.conftest import LARGER, SIZE, Running, Serve, make_latent, run_server, simulated
from tests.server.runtimes import RecordingRuntime
from tests.waiting import until

WHITE, GREY, BLACK = (np.full((*SIZE, 3), value, np.uint8) for value in (255, 128, 0))
COST = SimulatedCost()
ONE = make_latent()


@pytest.fixture(scope="module")
def several() -> Iterator[Running]:
    """A server whose decoders decode images of one colour: two with 16 channels, one of them larger, and one with 4."""
    decoders = {
        "flux": simulated(costs={SIZE: COST, LARGER: COST}, images={SIZE: WHITE}, max_batch=1),
        "sd3": simulated(costs={SIZE: COST}, images={SIZE: GREY}, max_batch=2),
        "sdxl": simulated(costs={SIZE: COST}, images={SIZE: BLACK}, latent_channels=4),
    }
    with run_server(decoders={name: {"device": runtime} for name, runtime in decoders.items()}) as running:
        yield running


def post(running: Running, path: str, latent: torch.Tensor, **options: str) -> object:
    headers = {"Content-Type": "application/x-safetensors"}
    return running.client.post(path, content=save({"latent": latent}), headers=headers, params=options)


def colour(response) -> int:
    """Return the colour of an image of one colour, which shows what decoded it."""
    assert response.status_code == 200, response.text
    pixels = np.asarray(Image.open(io.BytesIO(response.content)))
    return int(pixels[0, 0, 0])


class TestDecode:
    def test_a_latent_that_only_one_decoder_supports_needs_no_name(self, several: Running):
        assert colour(post(several, "/decode", make_latent(4, 2, 2))) == 0
        assert post(several, "/decode", make_latent(16, 2, 4)).status_code == 200

    def test_a_latent_that_several_support_needs_a_name(self, several: Running):
        response = post(several, "/decode", make_latent(16, 2, 2))
        assert (response.status_code, response.json()["code"]) == (422, "ambiguous-decoder")
        assert "flux and sd3" in response.json()["detail"]

    @pytest.mark.parametrize(("name", "expected"), [("flux", 255), ("sd3", 128)])
    def test_the_name_is_an_option_or_in_the_path(self, several: Running, name: str, expected: int):
        assert colour(post(several, "/decode", make_latent(), decoder=name)) == expected
        assert colour(post(several, f"/decode/{name}", make_latent())) == expected
        assert colour(post(several, f"/decode/{name}", make_latent(), decoder=name)) == expected

    def test_the_option_must_not_contradict_the_path(self, several: Running):
        response = post(several, "/decode/flux", make_latent(), decoder="sd3")
        assert (response.status_code, response.json()["code"]) == (422, "invalid-option")

    def test_an_unknown_name_is_an_error_that_lists_the_decoders(self, several: Running):
        by_option, by_path = (post(several, "/decode", make_latent(), decoder="x"), post(several, "/decode/x", ONE))
        assert (by_option.status_code, by_option.json()["code"]) == (422, "invalid-option")
        assert (by_path.status_code, by_path.json()["code"]) == (404, "unknown-decoder")
        for response in (by_option, by_path):
            assert "'flux', 'sd3' or 'sdxl'" in response.json()["detail"]

    def test_below_the_name_there_is_nothing(self, several: Running):
        response = post(several, "/decode/flux/more", make_latent())
        assert (response.status_code, response.json()["code"]) == (404, "no-such-route")

    def test_the_metadata_of_a_png_name_the_model(self, several: Running):
        response = post(several, "/decode/sd3", make_latent(), metadata="true")
        assert Image.open(io.BytesIO(response.content)).text["Decoder"] == "simulated"


class TestRemoteDecode:
    def test_the_factors_of_the_latent_space_or_a_name_choose(self, serve: Serve):
        runtimes = {name: RecordingRuntime(name, {SIZE: COST}) for name in ("flux", "sd3")}
        with serve(decoders={name: {"device": runtime} for name, runtime in runtimes.items()}) as running:
            for runtime in runtimes.values():
                runtime.samples.clear()  # of the warm-up
            body, shape = ONE.numpy().tobytes(), {"shape": [1, 16, 2, 2], "dtype": "float32"}
            headers = {"Content-Type": "tensor/binary"}
            factors = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
            for path, options in (
                ("/remote-decode", factors),
                ("/remote-decode/sd3", {"do_scaling": "true"}),
                ("/remote-decode", {"do_scaling": "true", "decoder": "sd3"}),
            ):
                response = running.client.post(path, content=body, headers=headers, params=shape | options)
                assert response.status_code == 200, response.text
            assert [len(runtime.samples) for runtime in runtimes.values()] == [0, 3]
            response = running.client.post("/remote-decode", content=body, headers=headers, params=shape)
            assert response.json()["code"] == "ambiguous-decoder"


class TestKServe:
    def infer(self, running: Running, model: str, channels: int = 16) -> object:
        shape = [1, channels, 2, 2]
        tensor = {"name": "latent", "shape": shape, "datatype": "FP32", "data": [0.0] * (channels * 4)}
        return running.client.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]})

    def test_the_decoders_are_models(self, several: Running):
        assert several.client.get("/v2/models").json() == {"models": ["flux", "sd3", "sdxl"]}
        for name, channels in (("flux", 16), ("sdxl", 4)):
            document = several.client.get(f"/v2/models/{name}").json()
            assert (document["name"], document["versions"]) == (name, [VERSION])
            assert document["inputs"][0]["shape"] == [-1, channels, -1, -1]
            assert several.client.get(f"/v2/models/{name}/ready").json() == {"name": name, "ready": True}

    def test_the_model_chooses_the_decoder(self, several: Running):
        for name in ("flux", "sd3"):
            response = self.infer(several, name)
            assert response.status_code == 200, response.text
            assert response.json()["model_name"] == name
        assert self.infer(several, "sdxl").json()["code"] == "invalid-latent"
        assert self.infer(several, "x").json()["code"] == "unknown-model"


class TestReports:
    def test_info_describes_each_decoder(self, several: Running):
        info = several.client.get("/info").json()
        assert [decoder["name"] for decoder in info["decoders"]] == ["flux", "sd3", "sdxl"]
        assert [decoder["latent_space"]["channels"] for decoder in info["decoders"]] == [16, 16, 4]
        assert [decoder["images_per_step"] for decoder in info["decoders"]] == [1, 2, 4]
        assert [len(decoder["sizes"]) for decoder in info["decoders"]] == [2, 1, 1]
        steps = {(cost["decoder"], *cost["size"], cost["batch"]) for cost in info["costs"] if cost["stage"] == "step"}
        expected = {("flux", *SIZE, 1), ("flux", *LARGER, 1), *(("sd3", *SIZE, batch) for batch in (1, 2))}
        assert steps == expected | {("sdxl", *SIZE, batch) for batch in (1, 2, 3, 4)}

    def test_metrics_and_the_log_count_by_decoder(self, several: Running, caplog: pytest.LogCaptureFixture):
        def steps(name: str) -> float:
            series = f'pid_steps_total{{decoder="{name}"}} '
            (line,) = [line for line in several.client.get("/metrics").text.splitlines() if line.startswith(series)]
            return float(line.removeprefix(series))

        before = {name: steps(name) for name in ("flux", "sd3", "sdxl")}
        with caplog.at_level("INFO", "server.requests"):
            assert post(several, "/decode/sd3", make_latent()).status_code == 200
            until(lambda: any("/decode/sd3" in record.getMessage() for record in caplog.records))
        assert {name: steps(name) - before[name] for name in before} == {"flux": 0, "sd3": 4, "sdxl": 0}
        (record,) = [record for record in caplog.records if "/decode/sd3" in record.getMessage()]
        assert record.fields["decoder"] == "sd3"

    def test_the_document_offers_the_names(self, several: Running):
        parameters = several.client.get("/openapi.json").json()["components"]["parameters"]
        for name in ("Decoder", "Model"):
            assert parameters[name]["schema"]["enum"] == ["flux", "sd3", "sdxl"]


def test_the_largest_body_of_any_decoder_is_accepted_by_default(serve: Serve):
    decoders = {
        "small": {"device": simulated(costs={SIZE: COST})},
        "large": {"device": simulated(costs={Size(256, 256): COST})},
    }
    with serve(decoders=decoders, max_images=1) as running:
        limit = running.client.get("/info").json()["limits"]["body_bytes"]
    with serve(decoders={"large": decoders["large"]}, max_images=1) as running:
        assert running.client.get("/info").json()["limits"]["body_bytes"] == limit
