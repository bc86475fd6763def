"""The option prompt, over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save

from engines.captions.prompts import MAX_CHARACTERS
from engines.errors import DecodeError
from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from server.body.json_text import MAX_JSON_TEXT
from tests.server.captions.text_encoders import ControlledTextEncoder, RecordingRuntime
from tests.server.conftest import IMAGE, LARGER, SIZE, Running, Serve, connect_and_disconnect, make_latent, run_server
from tests.waiting import until

JSON = {"Content-Type": "application/json"}


def recording(**changes: object) -> RecordingRuntime:
    costs = {SIZE: SimulatedCost(), LARGER: SimulatedCost()}
    return RecordingRuntime(**{"costs": costs, "images": {SIZE: IMAGE}, "max_batch": 1, **changes})  # type: ignore[arg-type]


class Captioned:
    """A server with a controlled text encoder and a runtime that records captions."""

    def __init__(self, running: Running, encoder: ControlledTextEncoder, runtime: RecordingRuntime) -> None:
        self.running, self.encoder, self.runtime = running, encoder, runtime

    def forget(self) -> None:
        self.encoder.batches.clear()
        self.runtime.captions.clear()

    def post_json(self, **members: object) -> httpx.Response:
        latent = make_latent()
        data = base64.b64encode(latent.numpy().tobytes()).decode()
        document = {"latent": {"data": data, "shape": list(latent.shape), "dtype": "float32"}, **members}
        return self.running.client.post("/decode", content=json.dumps(document), headers=JSON)

    def post_form(self, latents: torch.Tensor, prompt: str | list[str]) -> httpx.Response:
        files = {"latent": ("x.safetensors", save({"latent": latents}), "application/x-safetensors")}
        return self.running.client.post("/decode", files=files, data={"prompt": prompt})

    def embedding(self, prompt: str) -> torch.Tensor:
        return self.encoder._embedding(prompt)


@pytest.fixture(scope="module")
def shared() -> Iterator[Captioned]:
    """A server whose captions are cached for all tests of this module; use prompts of your own."""
    encoder, runtime = ControlledTextEncoder(max_batch=4), recording()
    with run_server(runtime, text_encoder=encoder, max_images=4) as running:
        yield Captioned(running, encoder, runtime)


@pytest.fixture
def captioned(shared: Captioned) -> Captioned:
    shared.forget()
    return shared


class TestOption:
    @pytest.mark.parametrize("where", ["query", "json", "form"])
    def test_a_prompt_becomes_the_caption_of_the_image(self, captioned: Captioned, where: str):
        prompt = f"A red Cat, in {where} "
        if where == "query":
            response = captioned.running.decode(prompt=prompt)
        elif where == "json":
            response = captioned.post_json(prompt=prompt)
        else:
            response = captioned.post_form(make_latent(), prompt)
        assert response.status_code == 200, response.text
        (caption,) = captioned.runtime.captions
        assert torch.equal(caption, captioned.embedding(prompt))
        assert captioned.encoder.prompts == [prompt]

    @pytest.mark.parametrize("where", ["query", "json", "form"])
    def test_each_image_has_its_own_prompt(self, captioned: Captioned, where: str):
        prompts = [f"{where} one", f"{where} two"]
        latents = torch.stack([make_latent(), make_latent()])
        if where == "query":
            response = captioned.running.decode(latents, prompt=prompts)
        elif where == "form":
            response = captioned.post_form(latents, prompts)
        else:
            data = base64.b64encode(latents.numpy().tobytes()).decode()
            latent = {"data": data, "shape": list(latents.shape), "dtype": "float32"}
            response = captioned.post_json(latent=latent, prompt=prompts)
        assert response.status_code == 200, response.text
        for caption, prompt in zip(captioned.runtime.captions, prompts, strict=True):
            assert torch.equal(caption, captioned.embedding(prompt))

    def test_one_prompt_applies_to_all_images(self, captioned: Captioned):
        response = captioned.running.decode(torch.stack([make_latent()] * 3), prompt="for all")
        assert response.status_code == 200
        assert len(captioned.runtime.captions) == 3
        assert all(torch.equal(caption, captioned.embedding("for all")) for caption in captioned.runtime.captions)
        assert captioned.encoder.prompts == ["for all"]

    def test_a_request_without_a_prompt_has_no_caption(self, captioned: Captioned):
        assert captioned.running.decode().status_code == 200
        assert captioned.runtime.captions == [None]
        assert captioned.encoder.prompts == []

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            (["a", "b"], "2 prompts for 1 image"),
            (["a"] * 5, "at most 4 images"),
            ([], "must be a text"),
            (7, "must be a text"),
            (["a", 7], "must be a text"),
            ({"text": "a"}, "must be a text"),
            ("x" * 100_000, "the limit"),
            ("x" * (MAX_CHARACTERS + 1), "the limit"),
            ("\ud800", "lone surrogate"),
            (["fine", "\udfff"], "lone surrogate"),
        ],
        ids=lambda value: str(type(value)),
    )
    def test_an_invalid_prompt_is_rejected(self, captioned: Captioned, prompt: object, message: str):
        response = captioned.post_json(prompt=prompt)
        assert response.status_code == 422
        assert response.json()["code"] == "invalid-option"
        assert message in response.json()["detail"]
        assert captioned.encoder.batches == []

    @pytest.mark.parametrize(
        "prompt",
        ["\0\x07\x1b[31m\x7f", "😀🏳️‍🌈", "  ", "\n\n", "<bos><pad>", "x" * MAX_CHARACTERS, "A" * 500 + '"' * 700],
    )
    def test_any_other_text_is_encoded_unchanged(self, captioned: Captioned, prompt: str):
        assert captioned.post_json(prompt=prompt).status_code == 200
        assert captioned.post_form(make_latent(), prompt).status_code == 200
        assert captioned.encoder.prompts == [prompt]  # the second time, it is known

    @pytest.mark.parametrize("prompt", ["x" * (MAX_CHARACTERS + 1), "😀" * (MAX_CHARACTERS + 1), "x" * 200_000])
    def test_a_prompt_in_a_form_has_the_same_limit(self, captioned: Captioned, prompt: str):
        response = captioned.post_form(make_latent(), prompt)
        assert (response.status_code, response.json()["code"]) == (422, "invalid-option")
        assert "the limit" in response.json()["detail"]

    def test_a_form_has_room_for_one_prompt_per_image(self, serve: Serve):
        encoder, runtime = ControlledTextEncoder(max_batch=4), recording()
        with serve(runtime, text_encoder=encoder, max_images=32, queue_images=64, queue_seconds=1000) as running:
            response = Captioned(running, encoder, runtime).post_form(
                torch.stack([make_latent()] * 32), [str(number) for number in range(32)]
            )
            assert response.status_code == 200, response.text

    def test_the_empty_prompt_was_encoded_at_the_start(self, captioned: Captioned):
        assert captioned.running.decode(prompt="").status_code == 200
        assert torch.equal(captioned.runtime.captions[0], captioned.embedding(""))
        assert captioned.encoder.prompts == []

    @pytest.mark.parametrize("as_list", [False, True])
    def test_a_long_prompt_in_a_large_body_is_read_in_full(self, serve: Serve, as_list: bool):
        encoder, runtime = ControlledTextEncoder(), recording(costs={Size(1024, 1024): SimulatedCost()})
        prompt = 'He said "\\u00e9" – ' * 300
        assert len(prompt) > 4096
        with serve(runtime, text_encoder=encoder) as running:
            encoder.batches.clear()
            latent = torch.zeros(16, 32, 32)
            assert latent.nbytes >= MAX_JSON_TEXT
            data = base64.b64encode(latent.numpy().tobytes()).decode()
            latent = {"data": data, "shape": list(latent.shape), "dtype": "float32"}
            response = Captioned(running, encoder, runtime).post_json(
                latent=latent, prompt=[prompt] if as_list else prompt
            )
            assert response.status_code == 200, response.text
            assert encoder.prompts == [prompt]

    def test_a_prompt_and_a_caption_exclude_each_other(self, captioned: Captioned):
        body = save({"latent": make_latent(), "caption": torch.zeros(300, 2304)})
        headers = {"Content-Type": "application/x-safetensors"}
        response = captioned.running.client.post("/decode", content=body, headers=headers, params={"prompt": "a"})
        assert response.status_code == 422
        assert "both a prompt and a tensor 'caption'" in response.json()["detail"]

    def test_different_prompts_in_query_and_body_are_rejected(self, captioned: Captioned):
        files = {"latent": ("x.safetensors", save({"latent": make_latent()}), "application/x-safetensors")}
        response = captioned.running.client.post("/decode", files=files, data={"prompt": "a"}, params={"prompt": "b"})
        assert response.status_code == 422
        assert "set it once" in response.json()["detail"]

    def test_a_server_without_a_text_encoder_says_how_to_start_one(self, server: Running):
        response = server.decode(prompt="a cat")
        assert response.status_code == 422
        assert "--text-encoder" in response.json()["detail"]


class TestCache:
    def test_equal_prompts_are_encoded_once(self, serve: Serve):
        encoder = ControlledTextEncoder()
        with serve(recording(), text_encoder=encoder) as running:
            encoder.pause()
            encoder.batches.clear()
            with ThreadPoolExecutor(32) as pool:
                requests = [pool.submit(running.decode, prompt="the same") for _ in range(32)]
                until(lambda: running.service.dispatcher.open_jobs() == 32)
                encoder.resume()
                assert {request.result().status_code for request in requests} == {200}
            assert running.decode(prompt="the same").status_code == 200
            assert encoder.prompts == ["the same"]
            metrics = running.client.get("/metrics").text
            assert 'pid_prompts_total{source="memory"} 1.0' in metrics
            assert 'pid_prompts_total{source="encoder"} 32.0' in metrics
            assert "pid_caption_batch_size_count 1.0" in metrics

    def test_an_image_that_waited_reports_the_time(self, captioned: Captioned):
        assert "caption;dur=" in captioned.running.decode(prompt="not known").headers["Server-Timing"]
        assert "caption" not in captioned.running.decode(prompt="not known").headers["Server-Timing"]

    def test_a_restarted_server_finds_the_captions_on_disk(self, serve: Serve, tmp_path: Path):
        first, second, third = (ControlledTextEncoder() for _ in range(3))
        with serve(recording(), text_encoder=first, caption_cache=tmp_path) as running:
            assert running.decode(prompt="a cat").status_code == 200
            until(lambda: len(files(tmp_path)) == 2)  # and the empty prompt
        runtime = recording()
        with serve(runtime, text_encoder=second, caption_cache=tmp_path) as running:
            second.batches.clear()
            assert running.decode(prompt="a cat").status_code == 200
            assert second.batches == []
            assert torch.equal(runtime.captions[-1], second._embedding("a cat"))
            assert 'pid_prompts_total{source="disk"} 1.0' in running.client.get("/metrics").text
        for file in files(tmp_path):
            file.write_bytes(file.read_bytes()[:-1] + b"\0")
        runtime = recording()
        with serve(runtime, text_encoder=third, caption_cache=tmp_path) as running:
            third.batches.clear()
            assert running.decode(prompt="a cat").status_code == 200
            assert third.prompts == ["a cat"]
            assert torch.equal(runtime.captions[-1], third._embedding("a cat"))
            assert "pid_caption_files_damaged_total 1.0" in running.client.get("/metrics").text

    def test_a_cache_without_room_still_serves(self, serve: Serve):
        encoder, runtime = ControlledTextEncoder(), recording()
        with serve(runtime, text_encoder=encoder, caption_cache_bytes=0) as running:
            encoder.batches.clear()
            for _ in range(2):
                assert running.decode(prompt="a cat").status_code == 200
            assert encoder.prompts == ["a cat"] * 2
            assert torch.equal(runtime.captions[-1], encoder._embedding("a cat"))


def files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.safetensors"))


class TestScheduling:
    def test_prompts_that_wait_are_encoded_together(self, serve: Serve):
        encoder = ControlledTextEncoder(max_batch=4, seconds=0.02)  # a batch costs as much as one
        with serve(recording(), text_encoder=encoder) as running:
            encoder.pause()
            encoder.batches.clear()
            with ThreadPoolExecutor(5) as pool:
                first = pool.submit(running.decode, prompt="0")
                assert encoder.entered.wait(60)
                others = [pool.submit(running.decode, prompt=f"{number}") for number in range(1, 5)]
                until(lambda: running.service.dispatcher.open_jobs() == 5)
                encoder.resume()
                assert {request.result().status_code for request in (first, *others)} == {200}
            assert [len(batch) for batch in encoder.batches] == [1, 4]

    def test_images_without_a_prompt_do_not_wait_for_the_text_encoder(self, serve: Serve):
        encoder = ControlledTextEncoder()
        with serve(recording(), text_encoder=encoder) as running:
            encoder.pause()
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(running.decode, prompt="slow")
                assert encoder.entered.wait(60)
                assert running.decode().status_code == 200
                assert running.client.get("/metrics").status_code == 200
                assert not waiting.done()
                encoder.resume()
                assert waiting.result().status_code == 200

    def test_a_deadline_that_the_text_encoder_cannot_meet_is_rejected(self, serve: Serve):
        with serve(recording(), text_encoder=ControlledTextEncoder(seconds=0.5)) as running:
            response = running.decode(prompt="a cat", deadline_ms=300)
            assert response.status_code == 422
            assert response.json()["code"] == "deadline-too-short"
            assert running.decode(prompt="", deadline_ms=300).status_code == 200

    def test_a_deadline_can_pass_during_the_encoding(self, serve: Serve):
        encoder = ControlledTextEncoder()
        with serve(recording(), text_encoder=encoder) as running:
            encoder.pause()
            response = running.decode(prompt="a cat", deadline_ms=200)
            assert response.status_code == 504
            encoder.resume()
            assert running.decode(prompt="another").status_code == 200

    def test_a_prompt_whose_client_left_is_not_encoded(self, serve: Serve):
        encoder = ControlledTextEncoder()
        with serve(recording(), text_encoder=encoder) as running, ThreadPoolExecutor(1) as pool:
            encoder.pause()
            encoder.batches.clear()
            first = pool.submit(running.decode, prompt="first")
            assert encoder.entered.wait(60)
            waiting = running.service.dispatcher.query
            connect_and_disconnect(
                running, lambda: until(lambda: waiting(lambda s: s.waiting_prompts()) == 1), query="?prompt=abandoned"
            )
            until(lambda: waiting(lambda s: s.waiting_prompts()) == 0)
            encoder.resume()
            assert first.result().status_code == 200
            assert running.decode(prompt="last").status_code == 200
            assert encoder.prompts == ["first", "last"]


class TestFailures:
    def test_a_prompt_that_fails_fails_only_its_own_images(self, serve: Serve):
        encoder = ControlledTextEncoder(max_batch=4, seconds=0.02)
        encoder.errors["bad"] = DecodeError("The text encoder failed on this prompt.")
        with serve(recording(), text_encoder=encoder) as running:
            encoder.pause()
            with ThreadPoolExecutor(4) as pool:
                first = pool.submit(running.decode, prompt="first")
                assert encoder.entered.wait(60)
                requests = {prompt: pool.submit(running.decode, prompt=prompt) for prompt in ("good", "bad", "fine")}
                until(lambda: running.service.dispatcher.open_jobs() == 4)
                encoder.resume()
                assert first.result().status_code == 200
                statuses = {prompt: request.result().status_code for prompt, request in requests.items()}
            assert statuses == {"good": 200, "bad": 500, "fine": 200}
            assert running.client.get("/health/live").status_code == 200

    def test_an_unexpected_error_fails_the_server(self, serve: Serve):
        encoder = ControlledTextEncoder()
        encoder.errors["a cat"] = RuntimeError("a secret")
        with serve(recording(), text_encoder=encoder) as running:
            response = running.decode(prompt="a cat")
            assert response.status_code == 503
            assert "a secret" not in response.text
            assert running.client.get("/health/live").status_code == 503

    def test_a_stuck_text_encoder_fails_the_server(self, serve: Serve):
        encoder = ControlledTextEncoder()
        with serve(recording(), text_encoder=encoder, watchdog_seconds=0.2) as running:
            encoder.pause()
            assert running.decode(prompt="a cat").status_code == 503
            assert "text encoder" in running.client.get("/health/live").json()["reason"]
            encoder.resume()

    def test_the_server_is_not_ready_before_its_text_encoder(self, serve: Serve):
        encoder = ControlledTextEncoder()
        encoder.pause()
        with serve(recording(), text_encoder=encoder, wait=False) as running:
            assert encoder.entered.wait(60)
            assert running.client.get("/health/ready").status_code == 503
            encoder.resume()
            until(lambda: running.client.get("/health/ready").status_code == 200)


def test_info_describes_the_text_encoder(captioned: Captioned, server: Running):
    info = captioned.running.client.get("/info").json()
    assert info["text_encoder"] == {
        "name": "simulated",
        "device": "simulated",
        "identity": captioned.encoder.info.identity,
        "prefix_tokens": 1,
        "prompts_per_batch": 4,
        "cache_bytes": 256 * 2**20,
        "disk_cache_bytes": None,
    }
    assert {cost["batch"] for cost in info["costs"] if cost["stage"] == "caption"} == {1, 2, 3, 4}
    assert server.client.get("/info").json()["text_encoder"] is None
