"""tritonclient over HTTP: the KServe v2 protocol with Triton's binary extension.

The decoder is simulated: its images show the latent, the seed and the caption.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.http.aio
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.clients.latent_server import CAPTION_TOKENS, CAPTION_WIDTH
from tests.clients.latents import decode, pixels

pytestmark = pytest.mark.clients

MODEL = "simulated"  # the name of the decoder
SEED = 7
LATENTS = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1)).half()
CAPTIONS = torch.randn(3, CAPTION_TOKENS, CAPTION_WIDTH, generator=torch.Generator().manual_seed(2)).half()


@pytest.fixture
def client(flux: str) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(flux.removeprefix("http://")) as client:
        yield client


def tensor(name: str, values: np.ndarray, binary: bool = True) -> InferInput:
    described = InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype))
    return described.set_data_from_numpy(values, binary_data=binary)


def latent(latents: torch.Tensor = LATENTS, dtype: object = np.float16, binary: bool = True) -> InferInput:
    return tensor("latent", latents.numpy().astype(dtype), binary)


def infer(client: InferenceServerClient, *inputs: InferInput, **arguments: object) -> InferResult:
    arguments = {"parameters": {"seed": SEED}, **arguments}
    return client.infer(MODEL, list(inputs) or [latent()], **arguments)


def images(result: InferResult) -> list[bytes]:
    return [bytes(image) for image in result.as_numpy("image")]


class TestStatus:
    def test_the_server_and_its_model_are_ready(self, client: InferenceServerClient):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)
        assert client.is_model_ready(MODEL, "1")
        assert not client.is_model_ready("another")

    def test_the_server_supports_the_binary_extension(self, client: InferenceServerClient):
        metadata = client.get_server_metadata()
        assert metadata["extensions"] == ["binary_tensor_data"]
        assert metadata["name"]
        assert metadata["version"]

    @pytest.mark.parametrize("version", ["", "1"])
    def test_the_model_describes_its_tensors(self, client: InferenceServerClient, version: str):
        metadata = client.get_model_metadata(MODEL, version)
        assert (metadata["name"], metadata["versions"]) == (MODEL, ["1"])
        inputs = {entry["name"]: entry["shape"] for entry in metadata["inputs"]}
        assert inputs["latent"] == [-1, 16, -1, -1]
        assert inputs["caption"] == [-1, CAPTION_TOKENS, CAPTION_WIDTH]
        assert inputs["prompt"] == [-1]
        outputs = {entry["name"]: (entry["datatype"], entry["shape"]) for entry in metadata["outputs"]}
        assert outputs["image"] == ("BYTES", [-1])
        assert outputs["pixels"] == ("UINT8", [-1, -1, -1, 3])
        assert outputs["seed"] == ("UINT64", [-1])


class TestInputs:
    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=["FP16", "BF16", "FP32"])
    def test_a_batch_gives_the_images_of_decode(self, client: InferenceServerClient, flux: str, dtype: object):
        result = infer(client, latent(dtype=dtype))
        sent = LATENTS.bfloat16() if dtype is ml_dtypes.bfloat16 else LATENTS
        assert images(result) == [decode(flux, sent[i], seed=SEED + i) for i in range(3)]
        assert result.as_numpy("seed").tolist() == [SEED, SEED + 1, SEED + 2]

    def test_json_numbers_give_the_same_image(self, client: InferenceServerClient, flux: str):
        result = infer(client, latent(LATENTS[:1], np.float32, binary=False))
        assert images(result) == [decode(flux, LATENTS[0], seed=SEED)]

    @pytest.mark.parametrize("binary", [True, False])
    def test_captions_belong_to_their_latents(self, client: InferenceServerClient, flux: str, binary: bool):
        dtype = np.float16 if binary else np.float32
        result = infer(client, latent(), tensor("caption", CAPTIONS.numpy().astype(dtype), binary))
        expected = [decode(flux, LATENTS[i], CAPTIONS[i], seed=SEED + i) for i in range(3)]
        assert images(result) == expected
        assert expected[0] != decode(flux, LATENTS[0], seed=SEED)

    @pytest.mark.parametrize("binary", [True, False])
    def test_prompts_are_per_latent_or_for_all(self, client: InferenceServerClient, flux: str, binary: bool):
        prompts = ["a red fox", "ein Füchslein", "狐"]
        for sent in (prompts, prompts[1:2]):
            strings = np.array([prompt.encode() for prompt in sent], dtype=np.object_)
            result = infer(client, latent(), tensor("prompt", strings, binary))
            each = sent if len(sent) == 3 else sent * 3
            assert images(result) == [
                decode(flux, LATENTS[i], seed=SEED + i, prompt=prompt) for i, prompt in enumerate(each)
            ]

    def test_options_are_parameters(self, client: InferenceServerClient, flux: str):
        parameters = {"seed": SEED, "format": "webp", "quality": 100, "steps": 1, "sigma": 0.5, "metadata": False}
        (image,) = images(infer(client, latent(LATENTS[:1]), parameters=parameters))
        assert Image.open(io.BytesIO(image)).format == "WEBP"
        assert np.array_equal(pixels(image), pixels(decode(flux, LATENTS[0], seed=SEED)))

    def test_priority_and_timeout_of_triton_are_options(self, client: InferenceServerClient):
        assert images(infer(client, priority=1, timeout=30_000_000))  # microseconds
        with pytest.raises(InferenceServerException, match="deadline_ms"):
            infer(client, timeout=0)
        with pytest.raises(InferenceServerException, match="priority"):
            infer(client, priority=4)


class TestOutputs:
    def test_image_and_seed_are_the_default(self, client: InferenceServerClient):
        names = {output["name"] for output in infer(client).get_response()["outputs"]}
        assert names == {"image", "seed"}

    def test_pixels_equal_the_png(self, client: InferenceServerClient, flux: str):
        result = infer(client, outputs=[InferRequestedOutput("pixels")])
        assert [output["name"] for output in result.get_response()["outputs"]] == ["pixels"]
        expected = [pixels(decode(flux, LATENTS[i], seed=SEED + i)) for i in range(3)]
        assert np.array_equal(result.as_numpy("pixels"), np.stack(expected))

    @pytest.mark.parametrize("binary", [True, False])
    def test_the_seed_is_an_integer_of_64_bits(self, client: InferenceServerClient, binary: bool):
        large = 2**63 - 5
        output = InferRequestedOutput("seed", binary_data=binary)
        seeds = infer(client, parameters={"seed": large}, outputs=[output]).as_numpy("seed")
        assert seeds.dtype == np.uint64
        assert seeds.tolist() == [large, large + 1, large + 2]

    def test_a_random_seed_reproduces_the_image(self, client: InferenceServerClient, flux: str):
        result = infer(client, latent(LATENTS[:1]), parameters=None)
        (seed,) = result.as_numpy("seed")
        assert images(result) == [decode(flux, LATENTS[0], seed=int(seed))]

    def test_the_id_of_the_request_is_returned(self, client: InferenceServerClient):
        response = infer(client, request_id="my-request").get_response()
        assert (response["id"], response["model_name"], response["model_version"]) == ("my-request", MODEL, "1")


class TestConcurrency:
    def test_async_infer(self, flux: str):
        with InferenceServerClient(flux.removeprefix("http://"), concurrency=3) as client:
            pending = [
                client.async_infer(MODEL, [latent(LATENTS[i : i + 1])], parameters={"seed": SEED + i}) for i in range(3)
            ]
            results = [images(request.get_result()) for request in pending]
        assert results == [[decode(flux, LATENTS[i], seed=SEED + i)] for i in range(3)]

    def test_the_asyncio_client(self, flux: str):
        async def call() -> list[bytes]:
            async with tritonclient.http.aio.InferenceServerClient(flux.removeprefix("http://")) as client:
                assert await client.is_model_ready(MODEL)
                return images(await client.infer(MODEL, [latent()], parameters={"seed": SEED}))

        assert asyncio.run(call()) == [decode(flux, LATENTS[i], seed=SEED + i) for i in range(3)]


class TestErrors:
    def message(self, client: InferenceServerClient, *inputs: InferInput, status: int, **arguments: object) -> str:
        with pytest.raises(InferenceServerException) as raised:
            infer(client, *inputs, **arguments)
        assert raised.value.status() == str(status)
        message: str = raised.value.message()
        return message

    @pytest.mark.parametrize(("model", "version"), [("another", ""), (MODEL, "2")])
    def test_an_unknown_model_or_version(self, client: InferenceServerClient, model: str, version: str):
        with pytest.raises(InferenceServerException) as raised:
            client.infer(model, [latent()], model_version=version)
        assert raised.value.status() == "404"
        assert (MODEL if model == "another" else "version") in raised.value.message()

    def test_another_number_of_channels(self, client: InferenceServerClient):
        message = self.message(client, latent(torch.zeros(1, 4, 8, 8)), status=422)
        assert "16" in message

    def test_a_dtype_that_is_not_supported(self, client: InferenceServerClient):
        message = self.message(client, latent(dtype=np.float64), status=422)
        assert "FP64" in message

    def test_an_unknown_parameter(self, client: InferenceServerClient):
        assert "sead" in self.message(client, parameters={"sead": 1}, status=422)

    def test_a_parameter_out_of_range(self, client: InferenceServerClient):
        assert "steps" in self.message(client, parameters={"steps": 5}, status=422)

    def test_an_unknown_input(self, client: InferenceServerClient):
        unknown = tensor("latents", LATENTS.numpy())
        assert "latents" in self.message(client, unknown, status=422)

    def test_an_unknown_output(self, client: InferenceServerClient):
        message = self.message(client, outputs=[InferRequestedOutput("picture")], status=422)
        assert all(name in message for name in ("image", "pixels", "seed"))

    def test_compressed_bodies(self, client: InferenceServerClient):
        assert "Content-Encoding" in self.message(client, request_compression_algorithm="gzip", status=415)
