"""`pid_client.diffusers` with the pipelines of diffusers, whose networks are tiny and random."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from pid_client import PidClient, frames
from pid_client.diffusers import StopEarly, decode, prepare
from pid_client.pipelines import CHANNELS, LATENT_SPACES
from tests.clients.latents import decode as decode_directly
from tests.clients.latents import pixels
from tests.clients.tiny_pipelines import HEIGHT, PIPELINES, WIDTH, Pipeline, create

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

STEPS, STOPPED = 5, 3
SEED = 11
CELLS = (HEIGHT // 8, WIDTH // 8)


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    return create(request.param)


def stopped(pipeline: Pipeline, **arguments: Any) -> StopEarly:
    """Return the state after a run of a batch of two that was stopped early."""
    stop = StopEarly(step=STOPPED)
    pipeline.run(2, num_inference_steps=STEPS, output_type="latent", callback_on_step_end=stop, **arguments)
    return stop


def latents_of_each_step(pipeline: Pipeline) -> list[torch.Tensor]:
    """Return the latents after each step of a complete run."""
    latents = []

    def keep(pipe: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].clone())
        return tensors

    pipeline.run(2, num_inference_steps=STEPS, output_type="latent", callback_on_step_end=keep)
    return latents


def input_of_the_autoencoder(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> torch.Tensor:
    """Run a pipeline to the end, also with its VAE; return the raw latents [B, c, h, w] that the VAE decodes."""
    inputs = []
    vae_decode = pipeline.pipe.vae.decode

    def spy(latents: torch.Tensor, *rest: Any, **options: Any) -> Any:
        inputs.append(latents)
        return vae_decode(latents, *rest, **options)

    monkeypatch.setattr(pipeline.pipe.vae, "decode", spy)
    pipeline.run(2, num_inference_steps=STEPS, output_type="pt", **arguments)
    (raw,) = inputs
    return raw[:, :, 0] if raw.ndim == 5 else raw


def normalised(pipeline: Pipeline, raw: torch.Tensor) -> np.ndarray:
    """Return the normalised latents of those that a VAE decodes."""
    if pipeline.latent_space != "flux2":
        return frames.normalise(raw, pipeline.latent_space)
    bn = pipeline.pipe.vae.bn
    return frames.batch_norm(frames.patchify(raw), bn.running_mean, bn.running_var)


class TestStoppingEarly:
    def test_the_latents_are_those_of_a_plain_run_at_that_step(self, pipeline: Pipeline):
        plain = latents_of_each_step(pipeline)
        stop = stopped(pipeline)
        assert torch.equal(stop.latents, plain[STOPPED - 1])
        assert not torch.equal(stop.latents, plain[STOPPED - 2])

    def test_sigma_is_that_of_the_scheduler(self, pipeline: Pipeline):
        stop = stopped(pipeline)
        assert stop.step == STOPPED
        assert stop.sigma == float(pipeline.pipe.scheduler.sigmas[STOPPED]) > 0

    def test_the_remaining_steps_are_skipped(self, pipeline: Pipeline):
        calls = []
        hook = pipeline.network.register_forward_hook(lambda *_: calls.append(None))
        stopped(pipeline)
        hook.remove()
        assert len(calls) == STOPPED * pipeline.calls_per_step

    def test_a_noise_level_determines_the_step(self, pipeline: Pipeline):
        first = stopped(pipeline)
        second = StopEarly(sigma=first.sigma)
        pipeline.run(2, num_inference_steps=STEPS, output_type="latent", callback_on_step_end=second)
        assert (second.step, second.sigma) == (first.step, first.sigma)
        assert torch.equal(second.latents, first.latents)

    def test_it_serves_several_runs(self, pipeline: Pipeline):
        stop = stopped(pipeline)
        first = stop.latents
        pipeline.run(1, num_inference_steps=STEPS + 1, output_type="latent", callback_on_step_end=stop)
        assert stop.step == STOPPED
        assert stop.sigma == float(pipeline.pipe.scheduler.sigmas[STOPPED])
        assert (len(first), len(stop.latents)) == (2, 1)

    def test_too_few_steps_are_an_error(self, pipeline: Pipeline):
        with pytest.raises(ValueError, match=f"has only {STEPS} steps"):
            pipeline.run(num_inference_steps=STEPS, callback_on_step_end=StopEarly(step=STEPS + 1))


class TestPreparing:
    def test_a_stopped_latent_is_that_which_the_pipeline_would_decode(
        self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
    ):
        stop = StopEarly(step=STOPPED)
        raw = input_of_the_autoencoder(pipeline, monkeypatch, callback_on_step_end=stop)
        expected, expected_sigma = normalised(pipeline, raw), stop.sigma
        if pipeline.latent_space == "sdxl":
            scale = (stop.sigma**2 + 1) ** -0.5
            expected, expected_sigma = expected * np.float32(scale), stop.sigma * scale
        latent, sigma = prepare(stop, pipeline.pipe, **pipeline.size)
        assert sigma == pytest.approx(expected_sigma)
        assert latent.shape[1] == CHANNELS[pipeline.latent_space]
        np.testing.assert_allclose(latent, expected, rtol=1e-5, atol=1e-6)

    def test_a_finished_latent_is_that_which_the_pipeline_would_decode(
        self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
    ):
        raw = input_of_the_autoencoder(pipeline, monkeypatch)
        output = pipeline.run(2, num_inference_steps=STEPS, output_type="latent")
        latent, sigma = prepare(output, pipeline.pipe, **pipeline.size)
        assert sigma == 0
        np.testing.assert_allclose(latent, normalised(pipeline, raw), rtol=1e-5, atol=1e-6)

    def test_the_output_of_a_stopped_run_has_its_noise_level(self, pipeline: Pipeline):
        stop = StopEarly(step=STOPPED)
        run = {"num_inference_steps": STEPS, "output_type": "latent"}
        output = pipeline.run(2, callback_on_step_end=stop, **run)
        latent, sigma = prepare(output, pipeline.pipe, **pipeline.size)
        expected, expected_sigma = prepare(stop, pipeline.pipe, **pipeline.size)
        assert sigma == expected_sigma > 0
        np.testing.assert_allclose(latent, expected, rtol=1e-5, atol=1e-6)

    def test_packed_latents_need_the_size(self, pipeline: Pipeline):
        stop = stopped(pipeline)
        if pipeline.packed:
            with pytest.raises(ValueError, match="pass height and width"):
                prepare(stop, pipeline.pipe)
            with pytest.raises(ValueError, match="pass the height and width that the pipeline used"):
                prepare(stop, pipeline.pipe, height=HEIGHT, width=WIDTH + 16)
        else:
            assert prepare(stop, pipeline.pipe)[0].shape[2:] == CELLS


class TestDecoding:
    def test_the_server_decodes_a_stopped_latent(self, pipeline: Pipeline, serve_space: Callable[[str], str]):
        url, stop = serve_space(pipeline.latent_space), stopped(pipeline)
        with PidClient(url) as client:
            images = decode(stop, pipeline.pipe, client, seed=SEED, metadata=True, **pipeline.size)
        latents, sigma = prepare(stop, pipeline.pipe, **pipeline.size)
        assert [image.seed for image in images] == [SEED, SEED + 1]
        for image, latent in zip(images, latents, strict=True):
            expected = decode_directly(url, torch.from_numpy(latent), seed=image.seed, sigma=sigma)
            assert np.array_equal(image.numpy(), pixels(expected))
            assert float(image.pil().text["Sigma"]) == pytest.approx(sigma, rel=1e-5)
        assert not np.array_equal(images[0].numpy()[..., 0], images[1].numpy()[..., 0])

    def test_the_server_decodes_a_finished_latent(self, pipeline: Pipeline, serve_space: Callable[[str], str]):
        url = serve_space(pipeline.latent_space)
        output = pipeline.run(num_inference_steps=STEPS, output_type="latent")
        with PidClient(url) as client:
            (image,) = decode(output, pipeline.pipe, client, seed=SEED, **pipeline.size)
        (latent,), _ = prepare(output, pipeline.pipe, **pipeline.size)
        assert image.data == decode_directly(url, torch.from_numpy(latent), seed=SEED)

    def test_a_server_of_another_latent_space_is_rejected(self, pipeline: Pipeline, serve_space: Callable[[str], str]):
        other = "sd3" if pipeline.latent_space == "flux" else "flux"
        with PidClient(serve_space(other)) as client, pytest.raises(ValueError, match=f"needs those of {other}"):
            decode(stopped(pipeline), pipeline.pipe, client, **pipeline.size)


def test_stopping_needs_no_autoencoder():
    pipeline = create("FLUX.1")
    with_vae, _ = prepare(stopped(pipeline), pipeline.pipe, **pipeline.size)
    pipeline.pipe.register_modules(vae=None)
    without, _ = prepare(stopped(pipeline), pipeline.pipe, **pipeline.size)
    np.testing.assert_array_equal(without, with_vae)


def test_bfloat16_latents_are_prepared_without_loss():
    pipeline = create("FLUX.1")
    pipeline.pipe.to(torch.bfloat16)
    embeddings = {name: tensor.bfloat16() for name, tensor in pipeline.embeddings(2).items()}
    stop = stopped(pipeline, **embeddings)
    latent, _ = prepare(stop, pipeline.pipe, **pipeline.size)
    expected = pipeline.pipe._unpack_latents(stop.latents, HEIGHT, WIDTH, 8)
    assert stop.latents.dtype == torch.bfloat16
    assert torch.equal(torch.from_numpy(latent).bfloat16(), expected)


class TestRunsThatAreNotComplete:
    """The noise level of an output follows from the scheduler."""

    def test_image_to_image_starts_within_the_schedule(self):
        pipeline = create("FLUX.1")
        components = {**pipeline.pipe.components, "image_encoder": None, "feature_extractor": None}
        pipe = FluxImg2ImgPipeline(**components)
        pipe.set_progress_bar_config(disable=True)
        stop = StopEarly(step=2)
        image = torch.rand(1, 3, HEIGHT, WIDTH)
        run = {**pipeline.embeddings(1), "height": HEIGHT, "width": WIDTH, "output_type": "latent"}
        output = pipe(image=image, strength=0.5, num_inference_steps=8, callback_on_step_end=stop, **run)
        assert stop.sigma == float(pipe.scheduler.sigmas[4 + 2])
        assert prepare(output, pipe, **pipeline.size)[1] == stop.sigma
        with pytest.raises(ValueError, match="only 4 steps"):
            pipe(image=image, strength=0.5, num_inference_steps=8, callback_on_step_end=StopEarly(step=5), **run)

    def test_a_base_model_leaves_noise_for_its_refiner(self):
        pipeline = create("SDXL")
        output = pipeline.run(num_inference_steps=10, denoising_end=0.8, output_type="latent")
        scheduler = pipeline.pipe.scheduler
        remaining = float(scheduler.sigmas[scheduler.step_index])
        _, sigma = prepare(output, pipeline.pipe)
        assert sigma == pytest.approx(remaining / (remaining**2 + 1) ** 0.5)
        assert 0 < scheduler.step_index < 10

    @pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler])
    def test_the_noise_of_other_schedulers_is_not_known(self, scheduler: Any):
        pipeline = create("SDXL")
        pipeline.pipe.scheduler = scheduler.from_config(pipeline.pipe.scheduler.config)
        output = pipeline.run(num_inference_steps=10, denoising_end=0.8, output_type="latent")
        with pytest.raises(ValueError, match="not known during a run"):
            prepare(output, pipeline.pipe)
        with pytest.raises(ValueError, match="not known during a run"):
            pipeline.run(num_inference_steps=4, callback_on_step_end=StopEarly(step=1))


@pytest.mark.parametrize(
    "scheduler",
    [
        *(EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler),
        *(DDIMScheduler, PNDMScheduler, HeunDiscreteScheduler, LCMScheduler),
    ],
)
def test_the_output_of_a_complete_run_has_no_noise(scheduler: Any):
    pipeline = create("SDXL")
    pipeline.pipe.scheduler = scheduler.from_config(pipeline.pipe.scheduler.config)
    output = pipeline.run(num_inference_steps=4, output_type="latent")
    latent, sigma = prepare(output, pipeline.pipe)
    assert sigma == 0
    np.testing.assert_array_equal(latent, output.images.numpy())


@pytest.mark.parametrize("name", LATENT_SPACES)
def test_a_listed_pipeline_can_be_stopped(name: str):
    pipeline = getattr(diffusers, name)
    parameters = inspect.signature(pipeline.__call__).parameters
    assert {"callback_on_step_end", "output_type"} <= parameters.keys()
    assert "latents" in pipeline._callback_tensor_inputs
    assert isinstance(pipeline.interrupt, property)
    assert isinstance(pipeline.num_timesteps, property)
