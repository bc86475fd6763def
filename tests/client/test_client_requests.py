"""Requests that the client sends."""

from __future__ import annotations

from urllib.parse import parse_qs

import numpy as np
import pytest
import torch

from pid_client import operations
from pid_client.requests import DecodeRequest
from tests.client.scripted_network import BUSY, LOST, Network, Reply, batch_reply, sent_latents

LATENT = np.arange(16 * 8 * 8, dtype=np.float32).reshape(16, 8, 8)
BATCH = np.stack([LATENT + 10_000 * i for i in range(4)])


class TestRequests:
    def query(self, **options: object) -> dict[str, list[str]]:
        network = Network(Reply())
        request = DecodeRequest.read(LATENT, **{"seed": 7, **options})
        network.perform(operations.decode(network.call(), request))
        return parse_qs(network.sent[0].url.query.decode())

    def test_options_are_in_the_query(self):
        options = {"steps": 2, "format": "webp", "quality": 80, "priority": "batch", "metadata": True}
        assert self.query(decoder="Flux-2K", sigma=0.25, **options) == {
            "seed": ["7"],
            "decoder": ["Flux-2K"],
            "sigma": ["0.25"],
            "steps": ["2"],
            "format": ["webp"],
            "quality": ["80"],
            "priority": ["batch"],
            "metadata": ["true"],
        }

    def test_an_array_that_changes_later_is_not_sent(self):
        latent = LATENT.copy()
        network, request = Network(BUSY, Reply()), DecodeRequest.read(latent)
        latent[:] = 0
        network.perform(operations.decode(network.call(), request))
        assert all(np.array_equal(sent_latents(sent), LATENT) for sent in network.sent)

    def test_numbers_may_be_those_of_numpy_and_torch(self):
        query = self.query(seed=np.uint8(250), sigma=torch.tensor(0.25), steps=np.int64(2))
        assert query == {"seed": ["250"], "sigma": ["0.25"], "steps": ["2"]}

    def test_seeds_of_numpy_do_not_overflow(self):
        network = Network(batch_reply(1, end=LOST), batch_reply(2, 3, 4))
        network.perform(operations.decode_batch(network.call(), DecodeRequest.read(BATCH, seed=np.uint8(255))))
        assert network.sent[1].url.params["seed"] == "256"

    def test_an_option_that_is_none_has_the_default_of_the_server(self):
        assert self.query(sigma=None, format=None, prompt=None, caption=None) == {"seed": ["7"]}

    @pytest.mark.parametrize("seed", [None, -1])
    def test_without_a_seed_the_client_chooses_one_so_that_attempts_agree(self, seed: int | None):
        network = Network(BUSY, Reply())
        network.perform(operations.decode(network.call(), DecodeRequest.read(LATENT, seed=seed)))
        first, second = [int(request.url.params["seed"]) for request in network.sent]
        assert first == second >= 0

    def test_seeds_of_a_batch_wrap_as_in_the_server(self):
        network = Network(batch_reply(1, end=LOST), batch_reply(2, 3, 4))
        network.perform(operations.decode_batch(network.call(), DecodeRequest.read(BATCH, seed=2**64 - 1)))
        assert network.sent[1].url.params["seed"] == "0"

    @pytest.mark.parametrize("prompt", [b"ab", 7, [1], ["a", None]])
    def test_a_prompt_that_is_not_a_text_is_rejected(self, prompt: object):
        with pytest.raises(TypeError):
            DecodeRequest.read(LATENT, prompt=prompt)

    def test_an_empty_batch_is_rejected(self):
        with pytest.raises(ValueError, match="no elements"):
            DecodeRequest.read(BATCH[:0])

    def test_packed_latents_are_referred_to_the_conversions(self):
        with pytest.raises(TypeError, match=r"Convert packed latents with pid_client\.frames\.unpack"):
            DecodeRequest.read(np.zeros((1, 16, 64), np.float32), height=64, width=64)

    def test_an_unknown_option_is_rejected(self):
        with pytest.raises(TypeError, match="Unknown option sead; options are decoder, sigma, seed"):
            DecodeRequest.read(LATENT, sead=7)

    @pytest.mark.parametrize("shape", [(8,), (8, 8), (1, 1, 16, 1, 8, 8)])
    def test_a_shape_that_is_never_a_latent_is_rejected(self, shape: tuple[int, ...]):
        with pytest.raises(ValueError, match="pass \\[c, h, w\\] or a batch"):
            DecodeRequest.read(np.zeros(shape, np.float32))
