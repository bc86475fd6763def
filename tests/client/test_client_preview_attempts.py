"""Previews and retries of the client, in simulated time."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import numpy as np
import pytest

from pid_client import (
    DeadlineError,
    DecodeFailedError,
    Image,
    InvalidRequestError,
    PidError,
    Preview,
    UnavailableError,
    operations,
)
from pid_client.requests import DecodeRequest
from tests.client.scripted_network import (
    BUSY,
    GONE,
    LOST,
    Network,
    Reply,
    image_part,
    preview_part,
    preview_reply,
    problem,
    problem_part,
    sent_latents,
)

LATENTS = np.arange(3 * 16 * 8 * 8, dtype=np.float32).reshape(3, 16, 8, 8)
FAILED, LATE = problem(500, "decode-failed"), problem(504, "deadline-exceeded")


class TestDecode:
    def perform(self, *replies: Reply | httpx.RequestError, retry: bool = True) -> tuple[Network, list[int], Image]:
        """Return the network, the steps of the previews, and the image."""
        network, steps = Network(*replies), list[int]()
        request = DecodeRequest.read(LATENTS[0], seed=7)
        operation = operations.decode(network.call(retry=retry), request, lambda preview: steps.append(preview.step))
        (image,) = network.perform(operation)
        return network, steps, image

    def test_previews_precede_the_image(self):
        network, steps, image = self.perform(preview_reply(preview_part(1), preview_part(2), image_part(7)))
        assert steps == [1, 2]
        assert (image.data, image.media_type, image.seed, image.index) == (b"image", "image/png", 7, 0)
        assert image.timings == {"queue": 0.001, "denoise": 0.25}
        assert network.sent[0].headers["Accept"] == "multipart/x-mixed-replace"

    def test_a_preview_has_what_its_part_reports(self):
        previews: list[Preview] = []
        network = Network(preview_reply(preview_part(1), image_part(7)))
        network.perform(operations.decode(network.call(), DecodeRequest.read(LATENTS[0]), previews.append))
        (preview,) = previews
        assert (preview.index, preview.step, preview.steps, preview.latency) == (0, 1, 2, 0.25)
        assert preview.data == b"preview"
        assert "data" not in repr(preview)

    def test_previews_may_be_missing(self):
        assert self.perform(preview_reply(image_part(7)))[1] == []

    @pytest.mark.parametrize(
        "first",
        [
            GONE,
            BUSY,
            preview_reply(problem_part(GONE)),
            preview_reply(preview_part(1), problem_part(GONE)),
            preview_reply(preview_part(1), end=LOST),
            preview_reply(preview_part(1), end=b""),
        ],
    )
    def test_after_a_retry_the_steps_begin_again(self, first: Reply):
        shown_before = [1] * sum(b"X-Step:" in chunk for chunk in first.chunks if isinstance(chunk, bytes))
        network, steps, image = self.perform(first, preview_reply(preview_part(1), preview_part(2), image_part(7)))
        assert steps == [*shown_before, 1, 2]
        assert image.data == b"image"
        assert len({(request.url, request.content) for request in network.sent}) == 1
        assert {request.headers["Accept"] for request in network.sent} == {"multipart/x-mixed-replace"}

    @pytest.mark.parametrize(
        ("reply", "error"),
        [
            (FAILED, DecodeFailedError),
            (LATE, DeadlineError),
            (problem(422, "extreme-values"), InvalidRequestError),
            (GONE, UnavailableError),
        ],
    )
    def test_errors_are_those_without_previews(self, reply: Reply, error: type[PidError]):
        def raised(*replies: Reply, on_preview: Callable[[Preview], None] | None) -> PidError:
            network = Network(*replies)
            request = DecodeRequest.read(LATENTS[0])
            with pytest.raises(error) as caught:
                network.perform(operations.decode(network.call(retry=False), request, on_preview))
            return caught.value

        def described(error: PidError) -> tuple[object, ...]:
            return type(error), str(error), vars(error), repr(error.__cause__)

        expected = described(raised(reply, on_preview=None))
        for response in (
            reply,
            preview_reply(problem_part(reply)),
            preview_reply(preview_part(1), problem_part(reply)),
        ):
            assert described(raised(response, on_preview=lambda preview: None)) == expected

    def test_the_deadline_includes_the_time_of_the_function(self):
        reply = preview_reply(preview_part(1), image_part(7))
        network = Network(reply)

        def sleep(preview: Preview) -> None:
            network.now += 10

        with pytest.raises(DeadlineError):
            network.perform(operations.decode(network.call(5), DecodeRequest.read(LATENTS[0]), sleep))

    @pytest.mark.parametrize(
        "reply",
        [
            Reply(),
            preview_reply(preview_part(1, index=1), image_part(7)),
            preview_reply(preview_part(1).replace(b"X-Steps: 2", b"X-Steps: two")),
            preview_reply(preview_part(1).replace(b"X-Latency-Ms", b"X-Other")),
        ],
    )
    def test_a_malformed_response_is_an_error(self, reply: Reply):
        with pytest.raises(DecodeFailedError, match="not a valid multipart/x-mixed-replace body; check the URL"):
            self.perform(reply)


class TestBatch:
    def perform(self, *replies: Reply) -> tuple[Network, list[tuple[int, int]], list[tuple[int, int | str]]]:
        """Return the network, index and step of each preview, and index and seed, or code, of each result."""
        network, previews = Network(*replies), list[tuple[int, int]]()
        request = DecodeRequest.read(LATENTS, seed=10)
        results = network.perform(
            operations.decode_batch(
                network.call(), request, lambda preview: previews.append((preview.index, preview.step))
            )
        )
        return (
            network,
            previews,
            [(item.index, item.seed if isinstance(item, Image) else item.code) for item in results],
        )

    def test_after_a_retry_indices_are_those_of_the_batch(self):
        network, previews, results = self.perform(
            preview_reply(preview_part(1, 0), preview_part(1, 1), image_part(10, 0), end=LOST),
            preview_reply(preview_part(1, 1), image_part(12, 1), preview_part(2, 0), image_part(11, 0)),
        )
        assert previews == [(0, 1), (1, 1), (2, 1), (1, 2)]
        assert results == [(0, 10), (2, 12), (1, 11)]
        assert np.array_equal(sent_latents(network.sent[1]), LATENTS[1:])

    def test_a_failed_image_does_not_affect_the_others(self):
        _, previews, results = self.perform(
            preview_reply(
                *(preview_part(1, 0), problem_part(FAILED, 0), preview_part(1, 1), preview_part(1, 2)),
                *(image_part(11, 1), image_part(12, 2)),
            )
        )
        assert previews == [(0, 1), (1, 1), (2, 1)]
        assert results == [(0, "decode-failed"), (1, 11), (2, 12)]
