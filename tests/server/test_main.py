"""Starting the server: what prevents it, and what it does when memory or threads run out."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines.bundle import WEIGHTS, Bundle, write_bundle
from engines.errors import BundleError, ConfigError, DecodeError, DeviceLostError, DeviceMemoryError, PidError
from engines.runtime import devices
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.simulated import SimulatedCost
from server import bundles, main, start
from server.bundles import device_names
from server.http.app import create_app
from server.http.connections import http_config
from server.images import png
from server.lifecycle import State
from server.main import Server, limit_connections, load_text_encoder, serve
from server.process.descriptors import RESERVE
from server.process.failure import FailureExit
from server.process.listen import Listener, bind
from server.service import DecodeService
from server.settings import Settings
from server.stream import ImageStream
from server.swaps import Candidate, DecoderSource, FixedDecoders, Swaps
from tests.server.conftest import SIZE, Serve, simulated
from tests.server.runtimes import ControlledRuntime
from tests.tiny import manifest
from tests.waiting import until

COSTS = {SIZE: SimulatedCost()}


@contextmanager
def running_server() -> Iterator[Server]:
    """Run a `Server` on a thread, where it handles no signals."""
    settings = Settings(bundle=".", port=0, encoder_threads=1)
    service = DecodeService(settings, {"simulated": {"device": simulated()}})
    server = Server(http_config(create_app(service), service), service, Swaps(service, FixedDecoders({}), {}))
    thread = threading.Thread(target=server.run, args=(bind("127.0.0.1", 0),))
    thread.start()
    try:
        until(lambda: server.started and service.lifecycle.state is not State.STARTING)
        yield server
    finally:
        server.should_exit = True
        thread.join()


class FailingSource(FixedDecoders):
    def __init__(self, error: Exception) -> None:
        super().__init__({})
        self.error = error

    def find_all(self) -> Mapping[str, Candidate]:
        raise self.error


class TestStart:
    def failure(self, source: DecoderSource, **changes: object) -> str:
        with pytest.raises((ConfigError, BundleError)) as caught:
            serve(Settings(bundle=".", **changes), Listener(bind("127.0.0.1", 0)), source)  # type: ignore[arg-type]
        message = str(caught.value)
        assert message.endswith(".")
        assert "\n" not in message
        return message

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (MemoryError(), "not enough memory"),
            (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files"),
            (RuntimeError("can't start new thread"), "raise the limit of processes"),
            (BundleError("The bundle is damaged."), "The bundle is damaged."),
        ],
    )
    def test_an_error_of_the_system_is_one_sentence(self, error: Exception, expected: str):
        assert expected in self.failure(FailingSource(error))

    def test_a_missing_key_file_is_one_sentence(self, tmp_path: Path):
        assert "keys" in self.failure(FixedDecoders({"simulated": {"device": simulated()}}), api_keys=tmp_path / "keys")

    def test_any_other_error_is_not_disguised(self):
        with pytest.raises(RuntimeError, match="a bug"):
            serve(Settings(bundle="."), Listener(bind("127.0.0.1", 0)), FailingSource(RuntimeError("a bug")))


class TestTextEncoder:
    def failure(self, info: RuntimeInfo | None = None, **changes: object) -> str:
        with pytest.raises(ConfigError) as caught:
            load_text_encoder(Settings(bundle=".", **changes), {"tiny": info or simulated().info})  # type: ignore[arg-type]
        return str(caught.value)

    def test_without_the_option_there_is_none(self):
        assert load_text_encoder(Settings(bundle="."), {"tiny": simulated().info}) is None

    @pytest.mark.parametrize("name", ["caption_prefix", "caption_cache"])
    def test_its_other_options_need_it(self, name: str, tmp_path: Path):
        assert "needs --text-encoder" in self.failure(**{name: tmp_path})

    def test_a_decoder_without_captions_needs_none(self, tmp_path: Path):
        info = replace(simulated().info, caption_tokens=0)
        assert "has no captions" in self.failure(info, text_encoder=tmp_path)

    def test_the_width_must_be_that_of_the_decoder(self, tiny_text_encoder: Path):
        assert "width 16, but the decoder simulated needs 2304" in self.failure(text_encoder=tiny_text_encoder)

    def test_a_directory_without_a_model_is_one_sentence(self, tmp_path: Path):
        message = self.failure(text_encoder=tmp_path)
        assert str(tmp_path) in message
        assert "\n" not in message

    def test_the_embeddings_have_the_tokens_of_the_decoder(
        self, tiny_text_encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        info = replace(simulated().info, caption_tokens=7, caption_width=16)
        encoder = load_text_encoder(Settings(bundle=".", text_encoder=tiny_text_encoder), {"tiny": info})
        assert encoder is not None
        assert encoder.encode(["a cat"]).shape == (1, 7, 16)
        assert "--caption-prefix" in caplog.text
        prefix = tmp_path / "prefix.txt"
        prefix.write_text("the photo of ")
        settings = Settings(bundle=".", text_encoder=tiny_text_encoder, caption_prefix=prefix)
        prefixed = load_text_encoder(settings, {"tiny": info})
        assert prefixed is not None
        assert prefixed.info.prefix_tokens > encoder.info.prefix_tokens
        assert prefixed.info.identity != encoder.info.identity


def make_bundle(target: str, kind: str = "torch") -> Bundle:
    """Return what `device_names` reads of a bundle."""
    content = SimpleNamespace(target=target, runtime=SimpleNamespace(kind=kind))
    return SimpleNamespace(path=Path("bundles/flux"), manifest=content)  # type: ignore[return-value]


class TestDeviceNames:
    PROBLEM = "this machine has no NVIDIA GPU"

    @pytest.fixture
    def no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bundles, "cuda_problem", lambda: self.PROBLEM)
        monkeypatch.setattr(bundles, "gpu_present", lambda: False)
        monkeypatch.setattr(devices, "cuda_problem", lambda index, system: self.PROBLEM)

    @pytest.mark.parametrize("target", ["cpu", "cuda", "h200"])
    def test_auto_is_the_first_gpu_for_any_target(self, monkeypatch: pytest.MonkeyPatch, target: str):
        monkeypatch.setattr(bundles, "cuda_problem", lambda: None)
        assert device_names("auto", make_bundle(target)) == ["cuda:0"]

    @pytest.mark.usefixtures("no_gpu")
    def test_without_a_gpu_auto_is_the_cpu_for_a_bundle_built_for_it(self, caplog: pytest.LogCaptureFixture):
        assert device_names("auto", make_bundle("cpu")) == ["cpu"]
        assert not caplog.messages

    @pytest.mark.usefixtures("no_gpu")
    def test_a_gpu_that_is_not_used_is_logged(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
        monkeypatch.setattr(bundles, "gpu_present", lambda: True)
        assert device_names("auto", make_bundle("cpu")) == ["cpu"]
        assert caplog.messages == [f"decoding on the CPU: {self.PROBLEM}"]

    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize(
        ("target", "kind", "remedy"), [("cuda", "torch", " Pass --devices cpu"), ("h200", "tensorrt", "")]
    )
    def test_without_a_gpu_other_bundles_are_not_served_unless_the_cpu_is_requested(
        self, target: str, kind: str, remedy: str
    ):
        bundle = make_bundle(target, kind)
        with pytest.raises(ConfigError) as caught:
            device_names("auto", bundle)
        sentence = f"bundles/flux was built for the target {target}, but {self.PROBLEM}."
        assert str(caught.value).startswith(sentence + remedy)
        assert ("--devices" in str(caught.value)) == bool(remedy)
        assert device_names("cpu", bundle) == ["cpu"]

    @pytest.mark.usefixtures("no_gpu")
    def test_a_requested_gpu_that_cannot_be_used_is_an_error(self):
        with pytest.raises(ConfigError, match=r"--devices cuda:0: .*this machine has no NVIDIA GPU\.$"):
            device_names("cuda:0", make_bundle("cpu"))

    def test_several_gpus_are_checked_one_by_one(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(devices, "cuda_problem", lambda index, system: None if index < 2 else "there is none")
        bundle = make_bundle("cuda")
        assert device_names("cuda:1, cuda:0", bundle) == ["cuda:1", "cuda:0"]
        with pytest.raises(ConfigError, match="cuda:2 is not available: there is none"):
            device_names("cuda:0,cuda:2", bundle)
        with pytest.raises(ConfigError, match="twice"):
            device_names("cuda,cuda:0", bundle)

    @pytest.mark.usefixtures("no_gpu")
    def test_the_program_ends_with_one_line_and_status_2(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
        write_bundle(
            tmp_path / "tiny", manifest(target="cuda"), dict.fromkeys((WEIGHTS, "caption.safetensors"), Path.touch)
        )
        assert start.main(["--bundle", str(tmp_path / "tiny"), "--port", "0"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"server: {tmp_path / 'tiny'} was built for the target cuda, but {self.PROBLEM}.")


class TestWarmUp:
    """A device that works but cannot be warmed up is an error of the configuration; a lost device is not."""

    @pytest.fixture(autouse=True)
    def never_force_the_exit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(main, "FailureExit", partial(FailureExit, force_exit=lambda status: None))

    def serve(self, error: Exception) -> int:
        runtime = ControlledRuntime(COSTS)
        runtime.error = error
        settings = Settings(bundle=".", encoder_threads=1, failure_exit_delay=0)
        return serve(settings, Listener(bind("127.0.0.1", 0)), FixedDecoders({"simulated": {"device": runtime}}))

    @pytest.mark.parametrize("error", [DeviceMemoryError("Use a smaller size."), ConfigError("Omit --compile.")])
    def test_an_error_with_a_remedy_is_raised(self, error: PidError, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.INFO, "server"), pytest.raises(type(error), match=str(error)):
            self.serve(error)
        assert f"device device cannot be used: {error}" in caplog.messages
        assert not any(record.exc_info for record in caplog.records)

    @pytest.mark.parametrize(
        "error", [DeviceLostError("CUDA error."), DecodeError("It failed."), RuntimeError("a bug")]
    )
    def test_a_lost_device_ends_with_status_1(self, error: Exception, caplog: pytest.LogCaptureFixture):
        assert self.serve(error) == 1
        assert any(type(error).__name__ in message for message in caplog.messages)


class TestDescriptors:
    SETTINGS = Settings(bundle=".", max_connections=1000)

    def test_a_sufficient_limit_changes_nothing(self, caplog: pytest.LogCaptureFixture):
        assert limit_connections(self.SETTINGS, 1000 + 30 + RESERVE, 30) is self.SETTINGS
        assert not caplog.messages

    def test_a_lower_limit_leaves_a_reserve_and_is_logged_once(self, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.WARNING):
            settings = limit_connections(self.SETTINGS, 512, 30)
        assert settings.max_connections == 512 - 30 - RESERVE
        (message,) = caplog.messages
        assert f"from 1000 to {512 - 30 - RESERVE}" in message
        assert "open files is 512" in message

    def test_no_descriptor_for_connections_is_an_error(self):
        with pytest.raises(ConfigError, match="ulimit -n"):
            limit_connections(self.SETTINGS, 94, 30)


def raise_memory_error(*arguments: object, **keywords: object) -> None:
    raise MemoryError


class TestOutOfMemory:
    """Every admitted request still gets 503, and the server fails."""

    def test_on_the_device_thread(self, serve: Serve):
        runtime = ControlledRuntime(COSTS)
        with serve(runtime) as running:
            runtime.error = MemoryError()
            assert running.decode().status_code == 503
            until(lambda: running.service.lifecycle.state is State.FAILED)

    @pytest.mark.parametrize("image_format", ["png", "jpeg"])
    def test_on_an_encoder_thread(self, serve: Serve, monkeypatch: pytest.MonkeyPatch, image_format: str):
        with serve() as running:
            monkeypatch.setattr(png, "encode_strip", raise_memory_error)
            monkeypatch.setattr("server.images.encoding.encode_jpeg", raise_memory_error)
            response = running.decode(format=image_format)
            assert (response.status_code, response.json()["code"]) == (503, "unavailable")
            until(lambda: running.service.lifecycle.state is State.FAILED)

    def test_in_a_request_on_the_event_loop(self, serve: Serve, monkeypatch: pytest.MonkeyPatch):
        with serve() as running:
            monkeypatch.setattr(running.service, "submit", raise_memory_error)
            response = running.decode()
            assert (response.status_code, response.json()["code"]) == (503, "unavailable")
            assert running.service.lifecycle.state is State.FAILED

    def test_while_the_other_images_are_failed(self, serve: Serve, monkeypatch: pytest.MonkeyPatch):
        """The watchdog repeats what the thread that failed could not finish."""
        runtime = ControlledRuntime(COSTS)
        with serve(runtime, watchdog_seconds=0.2) as running, ThreadPoolExecutor(1) as pool:
            fail_all, errors = running.service.dispatcher.fail_all, []

            def first_fails(error: PidError) -> None:
                errors.append(error)
                if len(errors) == 1:
                    raise MemoryError
                fail_all(error)

            monkeypatch.setattr(running.service.dispatcher, "fail_all", first_fails)
            runtime.pause()
            response = pool.submit(running.decode)
            assert runtime.entered.wait(60)
            with pytest.raises(MemoryError):
                running.service.out_of_memory()
            assert response.result().status_code == 503
            runtime.resume()

    def test_when_a_stream_ends_its_end_is_sent_again(self):
        async def end_twice() -> None:
            stream = ImageStream(0, "image/png")
            loop = asyncio.get_running_loop()
            send = loop.call_soon_threadsafe
            loop.call_soon_threadsafe = raise_memory_error  # type: ignore[method-assign]
            with pytest.raises(MemoryError):
                stream.fail(PidError("first"))
            loop.call_soon_threadsafe = send  # type: ignore[method-assign]
            stream.fail(PidError("second"))
            with pytest.raises(PidError, match="second"):
                await stream.chunk()

        asyncio.run(end_twice())

    def test_in_a_callback_of_the_event_loop(self):
        with running_server() as server:
            server.servers[0].get_loop().call_soon_threadsafe(raise_memory_error)
            until(lambda: server.service.lifecycle.state is State.FAILED)
