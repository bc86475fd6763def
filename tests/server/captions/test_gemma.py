"""A real text encoder and a real network behind the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save

from engines.captions.encoder import open_text_encoder
from engines.captions.protocol import TextEncoder
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.torch_runtime import TorchBackend
from tests.engines.runtime.runtimes import INFO, make_decoder
from tests.server.conftest import Running, make_latent, run_server
from tests.tiny_text_encoder import write_tiny_text_encoder

PROMPTS = ("a red cat", "the photo")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    directory: Path = tmp_path_factory.mktemp("text-encoder")
    write_tiny_text_encoder(directory, width=INFO.caption_width)
    return open_text_encoder(directory, "Instruction: ", "cpu", INFO.caption_tokens)


@pytest.fixture(scope="module")
def running(encoder: TextEncoder) -> Iterator[Running]:
    runtime = DeviceRuntime(TorchBackend(make_decoder("cpu")), torch.zeros(5, 24), INFO)
    with run_server({"cpu": runtime}, text_encoder=encoder) as running:
        yield running


def decode_with_caption(running: Running, caption: torch.Tensor) -> httpx.Response:
    body = save({"latent": make_latent(), "caption": caption})
    headers = {"Content-Type": "application/x-safetensors"}
    return running.client.post("/decode", content=body, headers=headers, params={"seed": 3})


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_gives_the_image_of_its_embedding(running: Running, encoder: TextEncoder, prompt: str):
    embedding = encoder.encode([prompt])[0]
    expected = decode_with_caption(running, embedding)
    assert expected.status_code == 200
    for _ in range(2):  # encoded for the request, then from the cache
        response = running.decode(prompt=prompt, seed=3)
        assert response.status_code == 200
        assert response.content == expected.content


def test_different_prompts_give_different_images(running: Running):
    first, second = (running.decode(prompt=prompt, seed=3).content for prompt in PROMPTS)
    assert first != second
    assert first != running.decode(seed=3).content
