"""POST /decode over a real connection, on the simulated runtime."""

import base64
import email
import io
import json
import socket
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from engines.errors import DecodeError
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from tests.server.conftest import (
    IMAGE,
    LARGER,
    SIZE,
    Running,
    Serve,
    connect_and_disconnect,
    make_latent,
    simulated,
    until,
)


def image(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


class TestAnswers:
    def test_one_latent_is_answered_by_one_png_of_the_runtimes_pixels(self, server: Running):
        answer = server.decode(seed=5)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.headers["x-seed"] == "5"
        assert {part.split(";")[0] for part in answer.headers["server-timing"].split(", ")} >= {"queue"}
        assert (image(answer.content) == IMAGE).all()

    @pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
    def test_the_format_is_the_option_or_what_accept_asks_for(self, server: Running, name: str, kind: str):
        for answer in (
            server.decode(format=name),
            server.client.post(
                "/decode",
                content=save({"latent": make_latent()}),
                headers={"Content-Type": "application/x-safetensors", "Accept": f"image/{name}, image/*;q=0.5"},
            ),
        ):
            assert answer.headers["content-type"] == f"image/{name}"
            assert Image.open(io.BytesIO(answer.content)).format == kind

    def test_a_seed_is_drawn_and_told_where_none_is_given(self, server: Running):
        first, second = server.decode().headers["x-seed"], server.decode().headers["x-seed"]
        assert first != second
        assert 0 <= int(first) < 2**53

    def test_metadata_is_written_only_when_asked_for(self, server: Running):
        plain = Image.open(io.BytesIO(server.decode(seed=9).content))
        told = Image.open(io.BytesIO(server.decode(seed=9, sigma=0.25, steps=2, metadata="true").content))
        assert plain.text == {}
        assert told.text["Seed"] == "9"
        assert told.text["Sigma"] == "0.25"
        assert told.text["Steps"] == "2"
        assert told.text["Decoder"] == "simulated"

    def test_a_batch_is_answered_in_parts_in_its_order(self, server: Running):
        answer = server.decode(make_latent(3, 16, 2, 2), seed=2**64 - 1)
        assert answer.status_code == 200
        message = email.message_from_bytes(
            b"Content-Type: " + answer.headers["content-type"].encode() + b"\r\n\r\n" + answer.content
        )
        parts = message.get_payload()
        assert [part["X-Index"] for part in parts] == ["0", "1", "2"]
        assert [part["X-Seed"] for part in parts] == [str(2**64 - 1), "0", "1"]
        for part in parts:
            assert part.get_content_type() == "image/png"
            assert image(part.get_payload(decode=True)).shape == (*SIZE, 3)

    def test_strips_leave_before_the_image_is_encoded_to_its_end(self, serve: Serve):
        size = Size(512, 512)
        held = HeldRuntime({size: SimulatedCost()}, {size: np.zeros((*size, 3), np.uint8)})
        with serve(held) as running:
            held.arrived.clear()
            body = save({"latent": make_latent(16, 16, 16)})
            with running.client.stream(
                "POST", "/decode", content=body, headers={"Content-Type": "application/x-safetensors"}
            ) as answer:
                stream = answer.iter_raw()
                head = next(stream)
                assert head.startswith(b"\x89PNG")  # while the rows below have not arrived
                held.arrived.set()
                assert image(head + b"".join(stream)).shape == (512, 512, 3)

    def test_every_body_kind_reaches_the_decoder(self, server: Running):
        latent = make_latent()
        raw = latent.numpy().tobytes()
        npy = io.BytesIO()
        np.save(npy, latent.numpy())
        packed = {"data": base64.b64encode(raw).decode(), "shape": [16, 2, 2], "dtype": "float32"}
        post = server.client.post
        answers = [
            server.decode(latent),
            post("/decode", content=npy.getvalue(), headers={"Content-Type": "application/x-npy"}),
            post(
                "/decode",
                content=raw,
                headers={"Content-Type": "application/octet-stream"},
                params={"shape": "16,2,2", "dtype": "float32"},
            ),
            post("/decode", json={"latent": packed, "seed": 3}),
            post("/decode", files={"latent": ("latent.npy", npy.getvalue())}, data={"seed": "3"}),
        ]
        assert [answer.status_code for answer in answers] == [200] * 5
        assert answers[3].headers["x-seed"] == answers[4].headers["x-seed"] == "3"

    def test_the_openapi_example_works(self, server: Running):
        operation = server.client.get("/openapi.json").json()["paths"]["/decode"]["post"]
        example = operation["requestBody"]["content"]["application/json"]["example"]
        assert server.client.post("/decode", json=example).status_code == 200


class TestPriorityAndDeadline:
    def post(self, server: Running, headers: dict, **options):
        content = save({"latent": make_latent()})
        headers = {"Content-Type": "application/x-safetensors", **headers}
        return server.client.post("/decode", content=content, headers=headers, params=options)

    def test_both_are_options_and_the_deadline_a_header_too(self, server: Running):
        assert server.decode(priority="interactive", deadline_ms=5000).status_code == 200
        assert self.post(server, {"X-Deadline-Ms": "5000"}).status_code == 200
        assert self.post(server, {"X-Deadline-Ms": "5000"}, deadline_ms=5000).status_code == 200

    @pytest.mark.parametrize("headers", [{"X-Deadline-Ms": "5000"}, {"X-Deadline-Ms": "soon"}])
    def test_a_header_that_contradicts_the_option_or_is_no_number_is_refused(self, server: Running, headers: dict):
        answer = self.post(server, headers, deadline_ms=4000)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid-option")
        assert "deadline_ms" in answer.json()["detail"]

    def test_a_deadline_beyond_the_servers_limit_is_refused(self, server: Running):
        limit = server.client.get("/info").json()["limits"]["max_deadline_seconds"]
        answer = server.decode(deadline_ms=int(1000 * limit) + 1)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid-option")
        assert f"limited to {1000 * limit:.0f}" in answer.json()["detail"]

    def test_they_are_documented_where_the_others_are(self, server: Running):
        operation = server.client.get("/openapi.json").json()["paths"]["/decode"]["post"]
        places = {(parameter["name"], parameter["in"]) for parameter in operation["parameters"]}
        assert places >= {("priority", "query"), ("deadline_ms", "query"), ("X-Deadline-Ms", "header")}
        in_json = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert in_json["priority"]["enum"] == ["interactive", "standard", "batch"]


class HeldRuntime(SimulatedRuntime):
    """Hands out only the first rows until it is told to release the rest."""

    def __init__(self, *args):
        super().__init__(*args)
        self.arrived = threading.Event()
        self.arrived.set()  # through the warm-up

    def finish(self, slot):
        rows = super().finish(slot)
        rows.wait = lambda stop: None if stop <= 32 else self.arrived.wait(60)
        return rows


BAD_LATENTS = {
    "channels": make_latent(4, 2, 2),
    "size": make_latent(16, 3, 2),
    "integers": torch.ones(16, 2, 2, dtype=torch.int32),
    "complex": torch.ones(16, 2, 2, dtype=torch.complex64),
    "nan": torch.full((16, 2, 2), float("nan")),
    "infinity": torch.full((16, 2, 2), float("inf")),
    "empty": torch.zeros(0, 16, 2, 2),
    "too many": make_latent(4, 16, 2, 2),
}


class TestRefusals:
    """Bad input gets a problem document with a stable code, and costs nothing else."""

    @pytest.fixture(autouse=True)
    def _healthy_afterwards(self, server: Running):
        yield
        assert server.client.get("/health/ready").status_code == 200
        assert server.decode().status_code == 200

    def expect(self, answer, status: int, code: str) -> str:
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert (problem["status"], problem["code"]) == (status, code)
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert "Traceback" not in answer.text
        return problem["detail"]

    def post(self, server: Running, content: bytes, kind: str = "application/x-safetensors", **params):
        return server.client.post("/decode", content=content, headers={"Content-Type": kind}, params=params)

    @pytest.mark.parametrize("name", BAD_LATENTS)
    def test_a_latent_that_the_decoder_does_not_take(self, server: Running, name: str):
        self.expect(server.decode(BAD_LATENTS[name]), 422, "invalid-latent")

    @pytest.mark.parametrize(
        "options", [{"sigma": 1.5}, {"sigma": "nan"}, {"steps": 5}, {"steps": 0}, {"sead": 1}, {"seed": -1}]
    )
    def test_an_option_out_of_range_or_unknown(self, server: Running, options: dict):
        self.expect(server.decode(**options), 422, "invalid-option")

    @pytest.mark.parametrize("kind", ["application/x-pickle", "text/plain", "image/png"])
    def test_a_media_type_that_is_not_taken(self, server: Running, kind: str):
        detail = self.expect(self.post(server, b"12345678", kind), 415, "unsupported-media-type")
        assert "application/x-safetensors" in detail

    def test_damaged_bodies(self, server: Running):
        good = save({"latent": make_latent()})
        for body in (good[:-1], good[:20], b"", b"\xff" * 100, (2**50).to_bytes(8, "little") + good[8:]):
            self.expect(self.post(server, body), 400, "malformed-body")
        self.expect(self.post(server, b'{"latent": {', "application/json"), 400, "malformed-body")
        self.expect(
            self.post(server, b"\x00" * 100, "application/octet-stream", shape="16,2,2", dtype="float32"),
            400,
            "malformed-body",
        )

    def test_a_body_over_the_limit_with_and_without_content_length(self, server: Running):
        body = b"\0" * 300_000
        self.expect(self.post(server, body), 413, "body-too-large")
        chunked = server.client.post(
            "/decode",
            content=(body[i : i + 50_000] for i in range(0, len(body), 50_000)),
            headers={"Content-Type": "application/x-safetensors"},
        )
        self.expect(chunked, 413, "body-too-large")

    def test_the_limit_is_enforced_before_the_body_has_arrived(self, server: Running):
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(
                b"POST /decode HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-safetensors\r\n"
                b"Content-Length: 1000000000\r\n\r\n"
            )
            assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]

    def test_encoded_bodies_and_unacceptable_answers(self, server: Running):
        body = save({"latent": make_latent()})
        kind = {"Content-Type": "application/x-safetensors"}
        packed = server.client.post(
            "/decode", content=zlib.compress(body), headers={**kind, "Content-Encoding": "deflate"}
        )
        self.expect(packed, 415, "unsupported-media-type")
        picky = server.client.post("/decode", content=body, headers={**kind, "Accept": "image/avif"})
        self.expect(picky, 406, "not-acceptable")

    def test_unknown_paths_and_methods_are_problems_too(self, server: Running):
        self.expect(server.client.get("/nowhere"), 404, "no-such-route")
        self.expect(server.client.get("/decode"), 405, "no-such-route")


class BlockedRuntime(SimulatedRuntime):
    """Every step waits until the test lets it go."""

    def __init__(self) -> None:
        super().__init__({SIZE: SimulatedCost()}, max_batch=1, slots=1)
        self.go = threading.Event()
        self.go.set()  # through the warm-up
        self.steps = 0
        self.entered = threading.Event()

    def step(self, slots, indices):
        self.entered.set()
        assert self.go.wait(60)
        self.steps += 1
        super().step(slots, indices)


class TestUnderStress:
    def test_a_full_queue_refuses_with_retry_after_and_loses_nothing(self, serve: Serve):
        runtime = BlockedRuntime()
        with serve(runtime, queue_images=2, standard_share=1) as running:
            runtime.go.clear()
            answers = []
            threads = [threading.Thread(target=lambda: answers.append(running.decode())) for _ in range(3)]
            for index, thread in enumerate(threads):  # one on the device, two waiting
                thread.start()
                until(lambda n=index: admitted(running) == n + 1)
            refused = running.decode()
            assert refused.status_code == 429
            assert refused.json()["code"] == "queue-full"
            assert int(refused.headers["retry-after"]) >= 1
            runtime.go.set()
            for thread in threads:
                thread.join()
            assert [answer.status_code for answer in answers] == [200] * 3

    def test_a_client_that_leaves_frees_its_place_and_stops_its_work(self, serve: Serve):
        runtime = BlockedRuntime()
        with serve(runtime) as running:
            runtime.go.clear()
            runtime.entered.clear()
            before = runtime.steps
            connect_and_disconnect(running, after=lambda: runtime.entered.wait(60))
            until(lambda: running.service.undelivered.requests == 0)
            runtime.go.set()
            until(lambda: admitted(running) == 0)
            assert runtime.steps == before + 1  # the one that was under way
            assert running.decode().status_code == 200
            assert (
                'pid_cancelled_total{reason="client-left",stage="running"} 1.0' in running.client.get("/metrics").text
            )

    def test_a_decode_that_fails_is_a_500_for_that_request_alone(self, serve: Serve):
        class Fails(SimulatedRuntime):
            bad = False

            def step(self, slots, indices):
                if self.bad:
                    self.bad = False
                    raise DecodeError("The decoder failed on this image.")
                super().step(slots, indices)

        runtime = Fails({SIZE: SimulatedCost()})
        with serve(runtime) as running:
            runtime.bad = True
            failed = running.decode()
            assert (failed.status_code, failed.json()["code"]) == (500, "decode-failed")
            assert running.decode().status_code == 200
            assert running.client.get("/health/live").status_code == 200

    def test_one_bad_image_of_a_batch_fails_alone(self, serve: Serve):
        runtime = PoisonedRuntime({SIZE: SimulatedCost(step=0.01, batch_slope=0.1)}, max_batch=3, slots=3)
        with serve(runtime) as running:
            latents = make_latent(3, 16, 2, 2)
            latents[1] = 99.0
            answer = running.decode(latents)
            head, *parts = answer.content.split(b"--" + answer.headers["content-type"].split("boundary=")[1].encode())
            assert head == b""
            kinds = [part.split(b"\r\n")[1] for part in parts[:3]]
            assert kinds == [
                b"Content-Type: image/png",
                b"Content-Type: application/problem+json",
                b"Content-Type: image/png",
            ]
            assert json.loads(parts[1].split(b"\r\n\r\n")[1])["code"] == "decode-failed"

    def test_a_dead_device_thread_answers_everybody_and_turns_live_false(self, serve: Serve):
        class Dies(SimulatedRuntime):
            dying = False

            def step(self, slots, indices):
                if self.dying:
                    raise RuntimeError("not one of ours")
                super().step(slots, indices)

        runtime = Dies({SIZE: SimulatedCost()})
        with serve(runtime) as running:
            runtime.dying = True
            answer = running.decode()
            assert (answer.status_code, answer.json()["code"]) == (503, "device-lost")
            assert running.client.get("/health/live").status_code == 503
            assert running.decode().status_code == 503


class PoisonedRuntime(SimulatedRuntime):
    """Fails every step that has the poisoned latent in it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.poisoned = set()

    def start(self, sample):
        slot = super().start(sample)
        (self.poisoned.add if sample.latent.max() == 99.0 else self.poisoned.discard)(slot)
        return slot

    def step(self, slots, indices):
        if self.poisoned & set(slots):
            raise DecodeError("The decoder failed on this image.")
        super().step(slots, indices)


def admitted(running: Running) -> int:
    return running.service.dispatcher.open_jobs()


class TestOperation:
    def test_health_and_info(self, server: Running):
        assert server.client.get("/health/live").json() == {"state": "ready"}
        assert server.client.get("/health/ready").json() == {"state": "ready"}
        info = server.client.get("/info").json()
        assert info["latent_space"]["channels"] == 16
        assert [entry["output"] for entry in info["sizes"]] == [list(SIZE), list(LARGER)]
        assert {(cost["stage"], tuple(cost["size"])) for cost in info["costs"]} >= {
            (stage, size) for stage in ("condition", "step", "finish", "encode") for size in (SIZE, LARGER)
        }

    def test_not_ready_before_the_warm_up_is_over(self, serve: Serve):
        release = threading.Event()

        class Slow(SimulatedRuntime):
            def warm_up(self):
                assert release.wait(60)

        with serve(Slow({SIZE: SimulatedCost()}), wait=False) as running:
            assert running.client.get("/health/live").status_code == 200
            assert running.client.get("/health/ready").status_code == 503
            refused = running.decode()
            assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
            release.set()
            until(lambda: running.client.get("/health/ready").status_code == 200)
            assert running.decode().status_code == 200

    def test_metrics_count_what_happened(self, serve: Serve):
        with serve(simulated()) as running:
            running.decode()
            running.decode(steps=9)
            text = running.client.get("/metrics").text
        for line in (
            'pid_requests_total{code="200"} 1.0',
            'pid_requests_total{code="422"} 1.0',
            'pid_refusals_total{code="invalid-option"} 1.0',
            'pid_images_total{format="png"} 1.0',
            "pid_steps_total 4.0",
            "pid_queue_images 0.0",
            'pid_stage_seconds_count{stage="denoise"} 1.0',
            "pid_requests_in_flight 0.0",
        ):
            assert line in text, line
        assert 'pid_memory_bytes{device="cpu",kind="used"}' in text
        assert 'pid_cost_seconds{batch="1",size="64x64",stage="step"}' in text

    def test_a_sane_request_id_is_kept_and_another_replaced(self, server: Running):
        ids = [
            server.client.get("/info", headers={"X-Request-Id": given}).headers["x-request-id"]
            for given in ("abc-123", "no spaces please", "x" * 65)
        ]
        assert ids[0] == "abc-123"
        assert all(len(other) == 32 for other in ids[1:])
