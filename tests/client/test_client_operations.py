"""Operations of the client: when they are repeated, and what they report, in simulated time."""

from __future__ import annotations

import pickle
import ssl
from pathlib import Path

import httpx
import numpy as np
import pytest

from pid_client import (
    ConnectionLostError,
    DeadlineError,
    DecodeFailedError,
    Image,
    InvalidRequestError,
    OverloadedError,
    PidError,
    UnauthorizedError,
    UnavailableError,
    operations,
)
from pid_client.call import Call
from pid_client.requests import DecodeRequest
from tests.client.scripted_network import BUSY, GONE, LOST, PNG, Network, Reply, problem

REQUEST = DecodeRequest.read(np.zeros((16, 8, 8), np.float32), seed=7)


def decode(network: Network, deadline: float = 60.0, retry: bool = True) -> Image:
    (image,) = network.perform(operations.decode(network.call(deadline, retry), REQUEST))
    return image


def deadlines(network: Network) -> list[int]:
    return [int(request.headers["X-Deadline-Ms"]) for request in network.sent]


class TestAttempts:
    def test_an_image_has_what_the_response_reports(self):
        image = decode(Network(Reply(chunks=[b"im", b"age"])))
        assert (image.data, image.media_type, image.seed, image.request_id) == (b"image", "image/png", 7, "id")
        assert image.timings == {"queue": 0.001, "denoise": 0.25}

    def test_a_busy_server_is_tried_again_after_the_time_that_it_names(self):
        network = Network(BUSY, BUSY, Reply())
        assert decode(network).data == b"image"
        assert network.waits == [5.0, 5.0]  # with the largest jitter, one second

    def test_attempts_differ_only_in_the_remaining_time(self):
        network = Network(BUSY, GONE, LOST, Reply())
        decode(network, deadline=30)
        assert deadlines(network) == [30_000, 25_000, 24_900, 24_700]
        assert len({request.content for request in network.sent}) == 1
        assert {str(request.url) for request in network.sent} == {"http://server/decode?seed=7"}
        assert {request.headers["X-Request-Id"] for request in network.sent} == {"id"}

    def test_pauses_without_a_suggestion_double_up_to_a_limit(self):
        network = Network(*[LOST] * 9, Reply())
        decode(network)
        assert network.waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]

    def test_a_suggestion_of_no_pause_does_not_cause_a_busy_loop(self):
        network = Network(*[problem(429, "queue-full", **{"Retry-After": "0"})] * 3, Reply())
        decode(network)
        assert network.waits == [0.05, 0.1, 0.2]

    def test_a_connection_that_is_lost_in_the_body_is_tried_again(self):
        network = Network(Reply(chunks=[b"half", LOST]), Reply())
        assert decode(network).data == b"image"

    def test_a_proxy_without_a_server_is_tried_again(self):
        network = Network(Reply(502, {"Content-Type": "text/html"}, [b"<html>"]), Reply())
        assert decode(network).data == b"image"

    @pytest.mark.parametrize(
        ("reply", "error", "code"),
        [
            (problem(401, "unauthorized"), UnauthorizedError, "unauthorized"),
            (problem(422, "invalid-latent"), InvalidRequestError, "invalid-latent"),
            (problem(413, "body-too-large"), InvalidRequestError, "body-too-large"),
            (problem(500, "decode-failed"), DecodeFailedError, "decode-failed"),
            (Reply(404, {"Content-Type": "text/html"}, [b"<html>"]), InvalidRequestError, "http-404"),
            (Reply(400, {"Content-Type": "application/problem+json"}, [b"{"]), InvalidRequestError, "http-400"),
            (Reply(400, {"Content-Type": "application/problem+json"}, [b"[]"]), InvalidRequestError, "http-400"),
            (Reply(400, {"Content-Type": "application/problem+json"}, [b'{"title": "x"}']), PidError, "http-400"),
            (Reply(200, {"Content-Type": "text/html"}, [b"<html>"]), DecodeFailedError, "http-200"),
            (Reply(307, {"Location": "https://other"}, []), DecodeFailedError, "http-307"),
            (Reply(200, {**PNG, "X-Shape": "a,b"}), DecodeFailedError, "http-200"),
            (Reply(200, {**PNG, "X-Seed": "9" * 5000}), DecodeFailedError, "http-200"),
        ],
    )
    def test_other_errors_are_final(self, reply: Reply, error: type[PidError], code: str):
        network = Network(reply)
        with pytest.raises(error) as raised:
            decode(network)
        assert (raised.value.status, raised.value.code, raised.value.request_id) == (reply.status, code, "id")
        assert network.waits == []

    def test_a_problem_is_explained_by_the_server(self):
        with pytest.raises(InvalidRequestError, match=r"Detail of invalid-option\. \(422 invalid-option\)"):
            decode(Network(problem(422, "invalid-option")))

    @pytest.mark.parametrize(("reply", "error"), [(BUSY, OverloadedError), (GONE, UnavailableError)])
    def test_without_retries_the_first_error_is_raised(self, reply: Reply, error: type[PidError]):
        with pytest.raises(error):
            decode(Network(reply), retry=False)

    def test_a_redirect_names_the_other_url(self):
        with pytest.raises(DecodeFailedError, match="redirects to https://other/decode; use the URL"):
            decode(Network(Reply(302, {"Location": "https://other/decode"}, [b"<html>"])))

    @pytest.mark.parametrize(
        "failure",
        [
            httpx.TooManyRedirects("too many"),
            httpx.DecodingError("not gzip"),
            httpx.ProxyError("407 Proxy Authentication Required"),
        ],
    )
    def test_failures_that_another_attempt_does_not_change_are_final(self, failure: httpx.RequestError):
        with pytest.raises(ConnectionLostError):
            decode(Network(failure))

    def test_timings_of_a_proxy_do_not_disturb(self):
        timings = 'denoise;dur=250.0,cdn;desc="hit, edge", queue;dur=1, total;dur=abc, cdn;dur=1.2.3'
        image = decode(Network(Reply(headers={**PNG, "Server-Timing": timings})))
        assert image.timings.items() >= {"denoise": 0.25, "queue": 0.001}.items()

    def test_an_untrusted_certificate_is_final(self):
        failure = httpx.ConnectError("certificate verify failed")
        failure.__cause__ = ssl.SSLCertVerificationError("self-signed certificate")
        with pytest.raises(ConnectionLostError, match="certificate verify failed"):
            decode(Network(failure))


class TestDeadline:
    def test_a_pause_beyond_the_deadline_is_not_waited_for(self):
        network = Network(BUSY)
        with pytest.raises(OverloadedError) as raised:
            decode(network, deadline=4.9)
        assert raised.value.retry_after == 4
        assert network.waits == []

    def test_a_server_that_stays_away_is_tried_until_the_deadline(self):
        network = Network(*[LOST] * 20)
        with pytest.raises(ConnectionLostError, match="peer closed connection"):
            decode(network, deadline=10)
        assert 8 < network.now <= 10
        assert deadlines(network) == sorted(deadlines(network), reverse=True)

    @pytest.mark.parametrize("reply", [problem(504, "deadline-exceeded"), problem(422, "deadline-too-short")])
    def test_a_deadline_that_the_server_reports_is_final(self, reply: Reply):
        network = Network(reply)
        with pytest.raises(DeadlineError, match="Detail of deadline") as raised:
            decode(network)
        assert raised.value.__cause__.status == reply.status

    def test_a_slow_body_ends_at_the_deadline(self):
        network = Network(Reply(chunks=[b"slow"] * 100, seconds=1.0))
        with pytest.raises(DeadlineError):
            decode(network, deadline=5)
        assert network.now == 6

    def test_what_arrives_shortly_after_the_deadline_counts(self):
        late = problem(504, "deadline-exceeded")
        late.seconds = 5.2
        with pytest.raises(DeadlineError, match="Detail of deadline-exceeded") as raised:
            decode(Network(late), deadline=5)
        assert raised.value.__cause__.status == 504
        assert decode(Network(Reply(seconds=0.2)), deadline=0.3).data == b"image"

    def test_a_timeout_at_the_deadline_is_a_deadline_error(self):
        network = Network(Reply(chunks=[httpx.ReadTimeout("timed out")], seconds=5.5))
        with pytest.raises(DeadlineError):
            decode(network, deadline=5)

    def test_the_body_may_last_only_as_long_as_time_remains(self):
        network = Network(BUSY, Reply())
        decode(network, deadline=30)
        assert [request.extensions["timeout"]["read"] for request in network.sent] == [30.5, 25.5]

    def test_an_attempt_to_connect_does_not_use_up_the_deadline(self):
        network = Network(httpx.ConnectTimeout("timed out"), Reply())
        decode(network, deadline=30)
        assert network.sent[0].extensions["timeout"]["connect"] == 5

    @pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), 1e10])
    def test_a_deadline_that_is_not_positive_is_rejected(self, deadline: float):
        with pytest.raises(ValueError, match="positive"):
            Network().call(deadline)


class TestRequestId:
    @pytest.mark.parametrize("request_id", ["", "my id!", "a\nb", "x" * 65, "ü"])
    def test_an_id_that_the_server_would_replace_is_rejected(self, request_id: str):
        with pytest.raises(ValueError, match="request_id is invalid"):
            Call(60, request_id=request_id)


def test_errors_survive_pickling():
    error = OverloadedError(429, "queue-full", "The queue is full.", 4.0, "id", 2)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), vars(copy)) == (str(error), vars(error)) == ("The queue is full. (429 queue-full)", vars(error))
    late = pickle.loads(pickle.dumps(DeadlineError("Late.", "id", 1)))
    assert (str(late), late.request_id, late.index) == ("Late.", "id", 1)


class TestStream:
    def perform(self, network: Network) -> list[object]:
        return network.perform(operations.stream(network.call(), REQUEST))

    def test_chunks_follow_the_info(self):
        info, *chunks = self.perform(Network(Reply(chunks=[b"a", b"b"])))
        assert (info.seed, chunks) == (7, [b"a", b"b"])

    def test_a_connection_that_is_lost_before_the_first_chunk_is_tried_again(self):
        network = Network(Reply(chunks=[LOST]), BUSY, Reply(chunks=[b"a"]))
        assert self.perform(network)[1:] == [b"a"]

    def test_a_connection_that_is_lost_later_is_an_error(self):
        with pytest.raises(ConnectionLostError):
            self.perform(Network(Reply(chunks=[b"a", LOST]), Reply()))


class TestFile:
    def perform(self, network: Network, path: Path) -> list[object]:
        return network.perform(operations.decode_to_file(network.call(), REQUEST, path))

    def test_a_lost_connection_begins_the_file_again(self, tmp_path: Path):
        network = Network(Reply(chunks=[b"long beginning", LOST]), Reply(chunks=[b"im", b"age"]))
        (info,) = self.perform(network, tmp_path / "image.png")
        assert info.seed == 7
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"image.png": b"image"}

    def test_a_path_that_cannot_be_written_costs_no_decode(self, tmp_path: Path):
        network = Network(Reply())
        with pytest.raises(FileNotFoundError):
            self.perform(network, tmp_path / "missing" / "image.png")
        assert network.sent == []

    def test_a_directory_costs_no_decode(self, tmp_path: Path):
        network = Network(Reply())
        with pytest.raises(OSError, match="not a regular file"):
            self.perform(network, tmp_path)
        assert network.sent == []

    def test_a_symbolic_link_stays_one(self, tmp_path: Path):
        target, link = tmp_path / "target.png", tmp_path / "link.png"
        target.write_bytes(b"older")
        link.symlink_to(target)
        self.perform(Network(Reply()), link)
        assert link.is_symlink()
        assert target.read_bytes() == b"image"

    def test_a_name_may_be_long(self, tmp_path: Path):
        path = tmp_path / ("x" * 240)
        self.perform(Network(Reply()), path)
        assert path.read_bytes() == b"image"

    def test_a_failure_leaves_an_existing_file_alone(self, tmp_path: Path):
        path = tmp_path / "image.png"
        path.write_bytes(b"older")
        with pytest.raises(DecodeFailedError):
            self.perform(Network(Reply(chunks=[b"half", LOST]), problem(500, "decode-failed")), path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"image.png": b"older"}


class TestInfo:
    @pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"decoders": [{"name": 1}]}'])
    def test_a_response_of_another_server_is_an_error(self, body: bytes):
        network = Network(Reply(200, {"Content-Type": "application/json"}, [body] if body else []))
        with pytest.raises(DecodeFailedError, match="check the URL"):
            network.perform(operations.get_info(network.call()))
