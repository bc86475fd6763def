"""Batches of the client: which images are requested again, and what is reported, in simulated time."""

from __future__ import annotations

from email.parser import BytesParser

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from pid_client import (
    DeadlineError,
    DecodeFailedError,
    Image,
    InvalidRequestError,
    PidError,
    operations,
)
from pid_client.requests import DecodeRequest
from tests.client.scripted_network import GONE, LOST, Network, Reply, batch_reply, problem, sent_latents

LATENT = np.arange(16 * 8 * 8, dtype=np.float32).reshape(16, 8, 8)
BATCH = np.stack([LATENT + 10_000 * i for i in range(4)])


class TestBatch:
    def perform(self, network: Network, deadline: float = 60.0, **options: object) -> list[tuple[int, int | str]]:
        """Return index and seed of each image, and index and code of each error, in the order of arrival."""
        request = DecodeRequest.read(BATCH, seed=10, **options)
        results = network.perform(operations.decode_batch(network.call(deadline), request))
        return [(item.index, item.seed if isinstance(item, Image) else item.code) for item in results]

    def test_images_have_the_index_of_their_latent(self):
        network = Network(batch_reply(10, 11, 12, 13))
        assert self.perform(network) == [(0, 10), (1, 11), (2, 12), (3, 13)]
        assert np.array_equal(sent_latents(network.sent[0]), BATCH)
        assert network.sent[0].headers["Accept"] == "multipart/mixed"

    def test_after_a_lost_connection_only_missing_images_are_requested(self):
        network = Network(batch_reply(10, 11, end=LOST), batch_reply(12, 13))
        assert self.perform(network) == [(0, 10), (1, 11), (2, 12), (3, 13)]
        assert np.array_equal(sent_latents(network.sent[1]), BATCH[2:])
        assert network.sent[1].url.params["seed"] == "12"

    def test_a_response_without_its_end_counts_as_lost(self):
        network = Network(batch_reply(10, 11, 12, 13, end=b""), batch_reply(13))
        assert self.perform(network) == [(0, 10), (1, 11), (2, 12), (3, 13)]

    def test_a_temporary_failure_of_an_image_is_tried_again(self):
        network = Network(batch_reply(10, GONE, 12, GONE), batch_reply(11), batch_reply(13))
        assert self.perform(network) == [(0, 10), (2, 12), (1, 11), (3, 13)]
        assert [request.url.params["seed"] for request in network.sent] == ["10", "11", "13"]
        assert np.array_equal(sent_latents(network.sent[1]), BATCH[1:2])

    def test_images_that_have_arrived_are_emitted_after_the_deadline(self):
        reply = batch_reply(10, 11, 12, 13)
        reply.chunks, reply.seconds = [b"".join(reply.chunks)], 5.0
        assert self.perform(Network(reply), deadline=4.0) == [(0, 10), (1, 11), (2, 12), (3, 13)]

    def test_a_final_failure_of_an_image_does_not_affect_the_others(self):
        network = Network(batch_reply(10, problem(500, "decode-failed"), 12, 13))
        assert self.perform(network) == [(0, 10), (1, "decode-failed"), (2, 12), (3, 13)]

    def test_a_temporary_failure_is_reported_when_time_runs_out(self):
        network = Network(batch_reply(10, GONE, 12, 13), *[batch_reply(GONE)] * 9)
        assert self.perform(network, deadline=1.0) == [(0, 10), (2, 12), (3, 13), (1, "unavailable")]
        assert network.now <= 1

    @pytest.mark.parametrize(
        ("reply", "code"),
        [(problem(500, "decode-failed"), "decode-failed"), (problem(422, "extreme-values"), "extreme-values")],
    )
    def test_a_final_failure_of_a_repeated_image_does_not_affect_the_others(self, reply: Reply, code: str):
        network = Network(batch_reply(GONE, 11, GONE, 13), reply, batch_reply(12))
        assert self.perform(network) == [(1, 11), (3, 13), (0, code), (2, 12)]

    @pytest.mark.parametrize(
        "reply",
        [
            Reply(
                200, {"Content-Type": "multipart/mixed; boundary=frontier"}, [b"--frontier\r\n\r\nx\r\n--frontier--"]
            ),
            Reply(200, {"Content-Type": "multipart/mixed; boundary=f"}, [b"--f\r\nContent-Length: x\r\n\r\n"]),
        ],
    )
    def test_a_malformed_response_is_an_error(self, reply: Reply):
        with pytest.raises(DecodeFailedError, match="not a valid multipart/mixed body"):
            self.perform(Network(reply))

    def test_an_index_that_was_not_requested_is_an_error(self):
        with pytest.raises(DecodeFailedError, match="not a valid multipart/mixed body"):
            self.perform(Network(batch_reply(10, 11, 12, GONE, first=1)))

    @pytest.mark.parametrize("reply", [Reply(302, {}, []), Reply(500, {}, [b"<html>"]), problem(422, "invalid-latent")])
    def test_an_error_of_the_only_request_is_raised(self, reply: Reply):
        request = DecodeRequest.read(BATCH[:1])
        network = Network(reply)
        with pytest.raises(PidError):
            network.perform(operations.decode_batch(network.call(), request))

    def test_the_error_of_the_only_image_is_reported(self):
        network = Network(problem(504, "deadline-exceeded"))
        (error,) = network.perform(operations.decode_batch(network.call(), DecodeRequest.read(BATCH[:1])))
        assert (type(error), error.index) == (DeadlineError, 0)

    def test_the_end_of_the_body_may_be_late_or_missing(self):
        reply = batch_reply(10, 11, 12, 13, end=LOST)
        assert self.perform(Network(reply)) == [(0, 10), (1, 11), (2, 12), (3, 13)]

    def test_a_wrong_number_of_prompts_is_sent_as_it_is(self):
        network = Network(problem(422, "invalid-option"))
        with pytest.raises(InvalidRequestError):
            self.perform(network, prompt=["a", "b"])
        assert form(network.sent[0])["prompt"] == ["a", "b"]

    def test_an_error_of_the_request_is_raised(self):
        with pytest.raises(InvalidRequestError) as raised:
            self.perform(Network(batch_reply(10, end=LOST), problem(422, "invalid-latent")))
        assert raised.value.index is None

    def test_a_response_that_is_not_multipart_is_an_error(self):
        with pytest.raises(DecodeFailedError, match=r"not a valid multipart/mixed body; check the URL"):
            self.perform(Network(Reply()))

    def test_captions_and_prompts_follow_their_latents(self):
        captions = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
        network = Network(batch_reply(10, end=LOST), batch_reply(11, 12, 13))
        self.perform(network, caption=captions)
        assert np.array_equal(load(network.sent[1].content)["caption"], captions[1:])

        network = Network(batch_reply(10, end=LOST), batch_reply(11, 12, 13))
        self.perform(network, prompt=["a", "b", "c", "d"])
        assert [form(request)["prompt"] for request in network.sent] == [["a", "b", "c", "d"], ["b", "c", "d"]]

    def test_one_caption_or_prompt_is_for_all_latents(self):
        caption = np.ones((2, 3), np.float32)
        network = Network(batch_reply(10, end=LOST), batch_reply(11, 12, 13))
        self.perform(network, caption=caption)
        assert np.array_equal(load(network.sent[1].content)["caption"], caption)
        network = Network(batch_reply(10, end=LOST), batch_reply(11, 12, 13))
        self.perform(network, prompt="a")
        assert [form(request)["prompt"] for request in network.sent] == [["a"], ["a"]]


def form(request: httpx.Request) -> dict[str, list[str]]:
    """Return the text fields of a form."""
    head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
    fields: dict[str, list[str]] = {}
    for part in BytesParser().parsebytes(head + request.read()).get_payload():
        if part.get_filename() is None:
            name = part.get_param("name", header="Content-Disposition")
            fields.setdefault(name, []).append(part.get_payload(decode=True).decode())
    return fields
