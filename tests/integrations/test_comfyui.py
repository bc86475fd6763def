"""The ComfyUI nodes, called as ComfyUI calls them, with a real server."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from engines.errors import DecodeError
from engines.pid.released import LATENT_SPACES
from engines.runtime.protocol import CompleteRows, Sample, Slot
from loadtest.processes import free_port
from tests.clients.latent_server import MAX_LATENT, LatentRuntime, text_encoder
from tests.integrations.conftest import COMFYUI_NODES, load_package
from tests.server.conftest import run_server

SPACES = ("flux", "flux2", "sd3", "sdxl", "qwenimage")
CELLS = {"flux2": 4}  # of a latent of an image of 256×256; 8 in the other spaces
BROKEN_SEED = 13
EXAMPLE = COMFYUI_NODES / "example.json"


class RecordingRuntime(LatentRuntime):
    """Keeps the samples that it decodes; the image with the seed `BROKEN_SEED` fails."""

    def __init__(self, space: str) -> None:
        super().__init__(space)
        self.samples: list[Sample] = []
        self._broken: set[Slot] = set()

    def start(self, sample: Sample) -> Slot:
        self.samples.append(sample)
        slot = super().start(sample)
        if sample.seed == BROKEN_SEED:
            self._broken.add(slot)
        return slot

    def finish(self, slot: Slot) -> CompleteRows:
        rows = super().finish(slot)
        if slot in self._broken:
            self._broken.remove(slot)
            raise DecodeError("This image is broken.")
        return rows


class Server:
    """A server for a latent space."""

    def __init__(self, space: str, runtime: RecordingRuntime, url: str) -> None:
        self.space, self.runtime, self.url = space, runtime, url

    def state(self, batch: int = 1, seed: int = 0) -> torch.Tensor:
        """Return random latents [B, c, h, w] whose image does not depend on rounding errors."""
        cells = CELLS.get(self.space, 8)
        shape = (batch, LATENT_SPACES[self.space].channels, cells, cells)
        levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
        return (levels / 127.5 - 1) * MAX_LATENT

    def image(self, latent: torch.Tensor, **options: object) -> torch.Tensor:
        """Return the pixels [H, W, 3] that `POST /decode` returns for a latent [c, h, w]."""
        response = httpx.post(
            f"{self.url}/decode",
            content=save({"latent": latent.contiguous()}),
            headers={"Content-Type": "application/x-safetensors"},
            params={"format": "raw", **options},  # type: ignore[dict-item]
        ).raise_for_status()
        shape = tuple(map(int, response.headers["X-Shape"].split(",")))
        return torch.frombuffer(bytearray(response.content), dtype=torch.uint8).reshape(shape)


Serve = Callable[[str], Server]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Return a function that starts a server for a latent space, once."""
    servers: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:

        def start(space: str) -> Server:
            if space not in servers:
                runtime = RecordingRuntime(space)
                encoder = text_encoder({"simulated": runtime.info})
                running = stack.enter_context(run_server(runtime, text_encoder=encoder))
                servers[space] = Server(space, runtime, running.url)
            return servers[space]

        yield start


def sampler_output(space: str, state: torch.Tensor, sigma: float) -> dict[str, torch.Tensor]:
    """Return the LATENT of a sampler of ComfyUI that ended with `state` [B, c, h, w] at the noise level `sigma`.

    The formulas are those of `inverse_noise_scaling` (comfy/model_sampling.py) and `process_out`
    (comfy/latent_formats.py).
    """
    if space == "sdxl":
        return {"samples": state / 0.13025}
    latent = state / (1 - sigma)
    if space == "flux":
        latent = latent / 0.3611 + 0.1159
    elif space == "sd3":
        latent = latent / 1.5305 + 0.0609
    elif space == "qwenimage":
        statistics = LATENT_SPACES[space].statistics
        assert statistics is not None
        mean, scale = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (statistics.shift, statistics.scale))
        latent = (latent / scale + mean).unsqueeze(2)
    return {"samples": latent}


class TestPackage:
    def test_every_node_has_a_name_to_show(self, package: ModuleType):
        assert package.NODE_CLASS_MAPPINGS.keys() == package.NODE_DISPLAY_NAME_MAPPINGS.keys()

    @pytest.mark.parametrize("name", ["PidDecode", "PidStopEarly"])
    def test_the_inputs_are_the_parameters_of_the_function(self, package: ModuleType, name: str):
        node = package.NODE_CLASS_MAPPINGS[name]
        inputs = node.INPUT_TYPES()
        parameters = inspect.signature(getattr(node(), node.FUNCTION)).parameters
        optional = inputs.get("optional", {})
        assert list(parameters) == [*inputs["required"], *optional]
        assert {key: parameter.default for key, parameter in parameters.items() if key in optional} == {
            key: options["default"] for key, (_, options) in optional.items()
        }
        for kind, options in [*inputs["required"].values(), *optional.values()]:
            assert isinstance(kind, list) or kind in {"LATENT", "SIGMAS", "STRING", "INT", "FLOAT"}
            assert options["tooltip"].endswith(".")

    def test_the_order_of_the_inputs_is_that_of_saved_workflows(self, package: ModuleType):
        """ComfyUI's workflows list the values of a node without names, so a new input must be the last one."""
        inputs = package.NODE_CLASS_MAPPINGS["PidDecode"].INPUT_TYPES()
        assert [*inputs["required"], *inputs["optional"]] == [
            *("samples", "url", "sigma", "seed", "prompt", "priority", "deadline", "decoder")
        ]

    def test_a_missing_client_is_named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setitem(sys.modules, "pid_client", None)
        with pytest.raises(ImportError, match=r"need the package pid-decode-client .* see their README\.md"):
            load_package(tmp_path)

    def test_the_api_key_is_not_an_input(self, package: ModuleType):
        inputs = package.NODE_CLASS_MAPPINGS["PidDecode"].INPUT_TYPES()
        assert not [name for names in inputs.values() for name in names if "key" in name]


class TestDecode:
    @pytest.mark.parametrize("space", SPACES)
    def test_finished_latents_give_the_image_of_the_normalised_latent(self, call, serve: Serve, space: str):
        server = serve(space)
        state = server.state()
        (image,) = call("PidDecode", samples=sampler_output(space, state, 0), url=server.url, sigma=0.0, seed=7)
        assert image.dtype == torch.float32
        assert server.runtime.samples[-1].sigma == 0
        torch.testing.assert_close(server.runtime.samples[-1].latent, state[0])
        torch.testing.assert_close(image, server.image(state[0], seed=7)[None] / 255)

    @pytest.mark.parametrize("space", [space for space in SPACES if space != "sdxl"])
    def test_latents_of_a_flow_model_stopped_early_are_scaled_back(self, call, serve: Serve, space: str):
        server = serve(space)
        state = server.state()
        (image,) = call("PidDecode", samples=sampler_output(space, state, 0.75), url=server.url, sigma=0.75, seed=7)
        assert server.runtime.samples[-1].sigma == 0.75
        torch.testing.assert_close(server.runtime.samples[-1].latent, state[0])
        torch.testing.assert_close(image, server.image(state[0], seed=7, sigma=0.75)[None] / 255)

    def test_latents_of_sdxl_stopped_early_become_variance_preserving(self, call, serve: Serve):
        server = serve("sdxl")
        state, sigma = server.state(), 2.5  # √(1−s²)·x0 + s·ε with s = sigma / √(sigma² + 1)
        scale = (1 + sigma**2) ** 0.5
        samples = sampler_output("sdxl", state * scale, sigma)
        (image,) = call("PidDecode", samples=samples, url=server.url, sigma=sigma, seed=7)
        assert server.runtime.samples[-1].sigma == pytest.approx(sigma / scale)
        torch.testing.assert_close(server.runtime.samples[-1].latent, state[0])
        torch.testing.assert_close(image, server.image(state[0], seed=7, sigma=sigma / scale)[None] / 255)

    def test_a_batch_keeps_its_order_and_reports_its_progress(self, call, comfy: SimpleNamespace, serve: Serve):
        server = serve("flux")
        state = server.state(batch=3, seed=1)
        (images,) = call("PidDecode", samples=sampler_output("flux", state, 0), url=server.url, sigma=0.0, seed=20)
        expected = [server.image(latent, seed=20 + index) for index, latent in enumerate(state)]
        torch.testing.assert_close(images, torch.stack(expected) / 255)
        assert comfy.total == 3
        assert comfy.progress == sorted(comfy.progress)
        assert comfy.progress[-1] == 3

    def test_the_prompt_is_sent_unless_it_is_empty(self, call, serve: Serve):
        server = serve("flux")
        inputs = {"samples": sampler_output("flux", server.state(), 0), "url": server.url, "sigma": 0.0, "seed": 7}
        call("PidDecode", **inputs, prompt="")
        assert server.runtime.samples[-1].caption is None
        (image,) = call("PidDecode", **inputs, prompt="A red fox")
        torch.testing.assert_close(image, server.image(server.state()[0], seed=7, prompt="A red fox")[None] / 255)

    def test_a_failed_image_raises_and_names_the_image(self, call, serve: Serve):
        server = serve("flux")
        samples = sampler_output("flux", server.state(batch=3), 0)
        with pytest.raises(RuntimeError, match=r"Image 1 \(counted from 0\) failed: "):
            call("PidDecode", samples=samples, url=server.url, sigma=0.0, seed=BROKEN_SEED - 1)

    def test_an_interrupt_ends_a_batch(self, call, comfy: SimpleNamespace, serve: Serve):
        server = serve("flux")
        comfy.interrupted = True
        with pytest.raises(InterruptedError):
            call(
                "PidDecode", samples=sampler_output("flux", server.state(batch=3), 0), url=server.url, sigma=0.0, seed=7
            )
        assert len(comfy.progress) == 1


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Server]]:
    """One server with the decoders my-flux, my-sd3 and my-sdxl, by their latent spaces."""
    runtimes = {space: RecordingRuntime(space) for space in ("flux", "sd3", "sdxl")}
    with run_server(decoders={f"my-{space}": {"device": runtime} for space, runtime in runtimes.items()}) as running:
        yield {space: Server(space, runtime, running.url) for space, runtime in runtimes.items()}


class TestSeveralDecoders:
    @pytest.mark.parametrize(("space", "decoder"), [("flux", "my-flux"), ("sd3", "my-sd3"), ("sdxl", "")])
    def test_the_latents_are_converted_for_the_chosen_decoder(
        self, call, servers: dict[str, Server], space: str, decoder: str
    ):
        server = servers[space]
        state, name = server.state(), f"my-{space}"
        samples = sampler_output(space, state, 0)
        (image,) = call("PidDecode", samples=samples, url=server.url, sigma=0.0, seed=7, decoder=decoder)
        torch.testing.assert_close(server.runtime.samples[-1].latent, state[0])
        torch.testing.assert_close(image, server.image(state[0], seed=7, decoder=name)[None] / 255)

    @pytest.mark.parametrize(
        ("shape", "decoder", "message"),
        [
            ((1, 16, 8, 8), "", "several decoders for latents of this shape; set decoder to one of my-flux, my-sd3"),
            ((1, 8, 8, 8), "", "8 channels and 8 x 8 cells; its decoders are my-flux (flux), my-sd3 (sd3), my-sdxl"),
            ((1, 4, 8, 10), "", "4 channels and 10 x 8 cells"),
            ((1, 16, 8, 8), "sdxl", "no decoder 'sdxl', only my-flux, my-sd3, my-sdxl"),
            ((1, 16, 8, 8), "my-sdxl", "A raw latent of sdxl is [4, h, w]"),
        ],
    )
    def test_a_decoder_that_does_not_suit_the_latents_is_an_error(
        self, call, servers: dict[str, Server], shape: tuple[int, ...], decoder: str, message: str
    ):
        samples, url = {"samples": torch.zeros(shape)}, servers["flux"].url
        with pytest.raises(ValueError, match=re.escape(message)):
            call("PidDecode", samples=samples, url=url, sigma=0.0, seed=7, decoder=decoder)


class TestErrors:
    def message(self, call, url: str, samples: torch.Tensor, sigma: float = 0.0, **inputs: object) -> str:
        """Return the message of the error, which is one or two sentences."""
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call("PidDecode", samples={"samples": samples}, url=url, sigma=sigma, seed=7, **inputs)
        message = str(caught.value)
        assert len(message) < 300
        assert "\n" not in message
        return message

    def test_an_invalid_url(self, call):
        assert "must begin with http:// or https://" in self.message(call, "127.0.0.1:8000", torch.zeros(1, 16, 8, 8))

    def test_no_server_at_the_url(self, call):
        url = f"http://127.0.0.1:{free_port()}"
        assert url in self.message(call, url, torch.zeros(1, 16, 8, 8), deadline=2.0)

    @pytest.mark.parametrize("key", ["", "wrong-0123456789abcdef"])
    def test_a_missing_or_unknown_key_names_the_variable(self, call, monkeypatch, tmp_path: Path, key: str):
        keys = tmp_path / "keys"
        keys.write_text("alice: alice-0123456789abcdef\n")
        with run_server(RecordingRuntime("flux"), api_keys=keys) as running:
            monkeypatch.setenv("PID_API_KEY", key)
            assert "PID_API_KEY" in self.message(call, running.url, torch.zeros(1, 16, 8, 8))
            monkeypatch.setenv("PID_API_KEY", "alice-0123456789abcdef")
            call("PidDecode", samples={"samples": torch.zeros(1, 16, 8, 8)}, url=running.url, sigma=0.0, seed=7)

    @pytest.mark.parametrize("space", SPACES)
    def test_latents_of_another_model(self, call, serve: Serve, space: str):
        channels = LATENT_SPACES[space].channels
        assert str(channels) in self.message(call, serve(space).url, torch.zeros(1, 8, 8, 8))

    def test_several_frames(self, call, serve: Serve):
        assert "one frame" in self.message(call, serve("qwenimage").url, torch.zeros(1, 16, 5, 8, 8))

    def test_an_unsupported_size(self, call, serve: Serve):
        assert "(422 invalid-latent)" in self.message(call, serve("flux").url, torch.zeros(1, 16, 10, 10))

    def test_a_prompt_without_a_text_encoder(self, call):
        with run_server(RecordingRuntime("flux")) as running:
            assert "prompt" in self.message(call, running.url, torch.zeros(1, 16, 8, 8), prompt="A red fox")

    @pytest.mark.parametrize("sigma", [1.0, 14.6, -0.1])
    def test_a_noise_level_that_no_step_ends_with(self, call, serve: Serve, sigma: float):
        assert "0 <= sigma < 1" in self.message(call, serve("flux").url, torch.zeros(1, 16, 8, 8), sigma)

    def test_a_latent_space_without_a_format_in_comfyui(self, call, serve: Serve):
        assert "dinov2" in self.message(call, serve("dinov2").url, torch.zeros(1, 768, 4, 4))


class TestStopEarly:
    SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.4, 0.0])

    def test_the_schedule_ends_after_the_step_with_its_noise_level(self, call):
        sigmas, sigma = call("PidStopEarly", sigmas=self.SIGMAS, step=2)
        assert sigmas.tolist() == self.SIGMAS[:3].tolist()
        assert sigma == 0.75

    def test_the_last_step_completes_the_run(self, call):
        sigmas, sigma = call("PidStopEarly", sigmas=self.SIGMAS, step=4)
        assert sigmas.tolist() == self.SIGMAS.tolist()
        assert sigma == 0

    @pytest.mark.parametrize("step", [0, 5])
    def test_a_step_that_the_schedule_does_not_have(self, call, step: int):
        with pytest.raises(ValueError, match="the schedule has 4 steps"):
            call("PidStopEarly", sigmas=self.SIGMAS, step=step)

    def test_an_empty_schedule(self, call):
        with pytest.raises(ValueError, match="the schedule has 0 steps"):
            call("PidStopEarly", sigmas=torch.tensor([]), step=1)


@pytest.fixture
def graph() -> dict[str, dict[str, Any]]:
    """The example, in ComfyUI's API format: nodes by number, whose links are [number, output]."""
    graph: dict[str, dict[str, Any]] = json.loads(EXAMPLE.read_text())
    return graph


class TestExample:
    def test_every_link_leads_to_a_node(self, graph: dict[str, dict[str, Any]]):
        links = [value for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
        assert {source for source, _ in links} <= graph.keys()

    def test_the_nodes_of_this_package_get_their_inputs(self, package: ModuleType, graph: dict[str, dict[str, Any]]):
        checked = set()
        for node in graph.values():
            if node["class_type"] in package.NODE_CLASS_MAPPINGS:
                inputs = package.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
                assert inputs["required"].keys() <= node["inputs"].keys()
                assert node["inputs"].keys() <= inputs["required"].keys() | inputs.get("optional", {}).keys()
                checked.add(node["class_type"])
        assert checked == package.NODE_CLASS_MAPPINGS.keys()

    def test_the_sampler_and_the_decode_get_the_outputs_of_the_early_stop(self, graph: dict[str, dict[str, Any]]):
        by_class = {node["class_type"]: (number, node["inputs"]) for number, node in graph.items()}
        stop, sampler = by_class["PidStopEarly"][0], by_class["SamplerCustomAdvanced"]
        decode = by_class["PidDecode"][1]
        assert sampler[1]["sigmas"] == [stop, 0]
        assert decode["sigma"] == [stop, 1]
        assert decode["samples"] == [sampler[0], 0]
