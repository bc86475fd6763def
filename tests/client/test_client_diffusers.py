"""Errors and schedulers of `pid_client.diffusers`, with classes named as those of diffusers.

tests/clients/test_diffusers_pipelines.py runs the real pipelines.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pid_client import DeadlineError, DecoderInfo, PidError, ServerInfo
from pid_client.diffusers import StopEarly, check_latent_space, decode, prepare
from pid_client.server_info import LatentSpace

SIGMAS = [1.0, 0.75, 0.5, 0.2, 0.0]
TOKENS = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0))
SIZE = {"height": 64, "width": 96}


class FlowMatchEulerDiscreteScheduler:
    def __init__(self, **config: Any) -> None:
        self.sigmas = torch.tensor(SIGMAS)
        self.step_index: int | None = None
        self.config = SimpleNamespace(**config)


class EulerDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
    """A scheduler of another convention; its base class does not matter."""


class HeunDiscreteScheduler:
    """A scheduler whose noise levels are not known during a run."""

    sigmas = torch.tensor(SIGMAS)
    step_index = 2


class FluxPipeline:
    """A pipeline whose latent after step k is k + 1 everywhere, in all respects that `StopEarly` uses."""

    def __init__(self, scheduler: Any = None) -> None:
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        return len(SIGMAS) - 1

    def __call__(self, callback: Any, inputs: tuple[str, ...] = ("latents",)) -> SimpleNamespace:
        self._interrupt = False
        latents = TOKENS
        for step in range(self.num_timesteps):
            if self.interrupt:
                continue
            latents = torch.full_like(TOKENS, step + 1)
            self.scheduler.step_index = step + 1
            tensors = {"latents": latents}
            latents = callback(self, step, 0, {name: tensors[name] for name in inputs}).pop("latents", latents)
        return SimpleNamespace(images=latents)


class StableDiffusionXLPipeline(FluxPipeline):
    """A subclass of another pipeline counts as what it is itself."""


class CustomFluxPipeline(FluxPipeline):
    """A pipeline of a user."""


class AuraFlowPipeline:
    """A pipeline that is not supported."""

    scheduler = FlowMatchEulerDiscreteScheduler()


class TestStopping:
    @pytest.mark.parametrize("step", [1, 3, 4])
    def test_a_run_stops_after_a_number_of_steps(self, step: int):
        stop, pipe = StopEarly(step=step), FluxPipeline()
        output = pipe(stop)
        assert (stop.step, stop.sigma) == (step, pytest.approx(SIGMAS[step]))
        assert torch.equal(stop.latents, torch.full_like(TOKENS, step))
        assert torch.equal(output.images, stop.latents)

    @pytest.mark.parametrize(
        ("sigma", "step"), [(5.0, 1), (0.75, 1), (0.7, 2), (0.5, 2), (0.2, 3), (0.19, 4), (0.0, 4)]
    )
    def test_a_run_stops_at_a_noise_level(self, sigma: float, step: int):
        stop = StopEarly(sigma=sigma)
        FluxPipeline()(stop)
        assert (stop.step, stop.sigma) == (step, pytest.approx(SIGMAS[step]))

    def test_it_may_be_called_from_a_later_step_on(self):
        stop, second = StopEarly(step=3), FluxPipeline()
        FluxPipeline()(lambda pipe, step, *rest: stop(pipe, step, *rest) if step >= 1 else rest[-1])
        assert (stop.step, stop.sigma) == (3, pytest.approx(SIGMAS[3]))
        second.scheduler.sigmas = second.scheduler.sigmas * 0.5
        second(lambda pipe, step, *rest: stop(pipe, step, *rest) if step >= 1 else rest[-1])
        assert (stop.step, stop.sigma) == (3, pytest.approx(SIGMAS[3] * 0.5))

    def test_the_latents_are_not_changed_with_the_output(self):
        stop = StopEarly(step=2)
        FluxPipeline()(stop).images.zero_()
        assert torch.equal(stop.latents, torch.full_like(TOKENS, 2))

    def test_it_serves_several_runs(self):
        stop = StopEarly(step=2)
        FluxPipeline()(stop)
        first = stop.latents
        stopped_sooner = FluxPipeline()
        stopped_sooner.scheduler.sigmas = torch.tensor(SIGMAS) / 2
        stopped_sooner(stop)
        assert stop.sigma == 0.25
        assert stop.latents is not first

    def test_a_run_with_an_error_leaves_nothing_of_the_one_before(self):
        stop = StopEarly(step=2)
        FluxPipeline()(stop)
        with pytest.raises(ValueError, match="is not known during a run"):
            FluxPipeline(HeunDiscreteScheduler())(stop)
        with pytest.raises(ValueError, match="no run has reached its condition"):
            prepare(stop, FluxPipeline(), **SIZE)


class TestErrorsOfStopping:
    @pytest.mark.parametrize("arguments", [{}, {"step": 1, "sigma": 0.5}])
    def test_there_must_be_one_condition(self, arguments: dict[str, Any]):
        with pytest.raises(ValueError, match="exactly one of step and sigma"):
            StopEarly(**arguments)

    @pytest.mark.parametrize("arguments", [{"step": 0}, {"sigma": -0.1}, {"sigma": float("nan")}])
    def test_the_condition_must_be_valid(self, arguments: dict[str, Any]):
        with pytest.raises(ValueError, match="at least"):
            StopEarly(**arguments)

    def test_a_run_with_fewer_steps_fails_at_its_first(self):
        pipe = FluxPipeline()
        with pytest.raises(ValueError, match="has only 4 steps; it cannot stop after 5"):
            pipe(StopEarly(step=5))
        assert pipe.scheduler.step_index == 1

    def test_the_latents_must_be_passed_to_the_callback(self):
        with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
            FluxPipeline()(StopEarly(step=1), inputs=())

    def test_a_pipeline_that_cannot_be_interrupted_is_rejected(self):
        scheduler = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ValueError, match="SimpleNamespace cannot be stopped early"):
            StopEarly(step=1)(SimpleNamespace(scheduler=scheduler), 0, 0, {"latents": TOKENS})

    @pytest.mark.parametrize(
        "scheduler", [HeunDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True)]
    )
    def test_a_scheduler_of_unknown_noise_levels_is_rejected(self, scheduler: Any):
        with pytest.raises(ValueError, match="is not known during a run"):
            FluxPipeline(scheduler)(StopEarly(step=1))


class TestPreparing:
    def run(self, pipe: Any, step: int) -> Any:
        """Run a pipeline whose output has the noise level of a step."""
        return pipe(StopEarly(step=step))

    @pytest.mark.parametrize("step", [2, 4])
    def test_the_noise_level_of_an_output_is_that_of_the_scheduler(self, step: int):
        pipe = FluxPipeline()
        _, sigma = prepare(self.run(pipe, step), pipe, **SIZE)
        assert sigma == pytest.approx(SIGMAS[step])

    def test_a_subclass_is_a_pipeline_of_the_same_kind(self):
        pipe = CustomFluxPipeline()
        latent, _ = prepare(self.run(pipe, 2), pipe, **SIZE)
        assert latent.shape == (1, 16, 8, 12)

    def test_a_finished_output_of_any_scheduler_has_no_noise(self):
        pipe = FluxPipeline(HeunDiscreteScheduler())
        _, sigma = prepare(SimpleNamespace(images=TOKENS), pipe, **SIZE)
        assert sigma == 0

    def test_an_interrupted_output_of_an_unknown_scheduler_is_rejected(self):
        pipe = FluxPipeline(HeunDiscreteScheduler())
        pipe._interrupt = True
        with pytest.raises(ValueError, match="HeunDiscreteScheduler is not known during a run"):
            prepare(SimpleNamespace(images=TOKENS), pipe, **SIZE)

    def test_an_output_of_another_pipeline_is_rejected(self):
        with pytest.raises(ValueError, match="has not run; pass sigma"):
            prepare(SimpleNamespace(images=TOKENS), FluxPipeline(), **SIZE)

    def test_a_tensor_needs_its_noise_level(self):
        with pytest.raises(ValueError, match="noise level of a tensor is not known; pass sigma"):
            prepare(TOKENS, FluxPipeline(), **SIZE)

    @pytest.mark.parametrize("sigma", [0, 0.25])
    def test_the_noise_level_of_a_tensor_can_be_passed(self, sigma: float):
        latent, used = prepare(TOKENS, FluxPipeline(), sigma=sigma, **SIZE)
        assert (latent.shape, used) == ((1, 16, 8, 12), sigma)

    def test_the_noise_level_of_stop_early_cannot_be_replaced(self):
        stop, pipe = StopEarly(step=1), FluxPipeline()
        pipe(stop)
        with pytest.raises(ValueError, match="omit sigma"):
            prepare(stop, pipe, sigma=0.5, **SIZE)

    @pytest.mark.parametrize("size", [{}, {"height": 64}, {"width": 96}])
    def test_packed_latents_need_height_and_width(self, size: dict[str, int]):
        with pytest.raises(ValueError, match="FluxPipeline are packed; pass height and width"):
            prepare(TOKENS, FluxPipeline(), sigma=0, **size)

    @pytest.mark.parametrize("shape", [(1, 4, 8, 12), (16, 8, 12), (1, 16, 2, 8, 12)])
    def test_latents_of_another_shape_are_rejected(self, shape: tuple[int, ...]):
        with pytest.raises(ValueError, match="shape"):
            prepare(torch.zeros(shape), FluxPipeline(), sigma=0, **SIZE)

    def test_images_are_rejected(self):
        with pytest.raises(ValueError, match='output_type="latent"'):
            prepare(SimpleNamespace(images=["an image"]), FluxPipeline(), **SIZE)

    def test_other_pipelines_are_rejected(self):
        with pytest.raises(ValueError, match="latents of AuraFlowPipeline are not known"):
            prepare(TOKENS, AuraFlowPipeline(), sigma=0, **SIZE)


class TestConventions:
    LATENT = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))

    def test_sdxl_needs_the_euler_frame(self):
        latent, sigma = prepare(self.LATENT, StableDiffusionXLPipeline(EulerDiscreteScheduler()), sigma=0.75)
        assert sigma == pytest.approx(0.6)
        np.testing.assert_allclose(latent, 0.8 * self.LATENT.numpy(), rtol=1e-6)

    @pytest.mark.parametrize(
        ("pipe", "latents"),
        [
            (StableDiffusionXLPipeline(FlowMatchEulerDiscreteScheduler()), LATENT),
            (StableDiffusionXLPipeline(EulerDiscreteScheduler(use_flow_sigmas=True)), LATENT),
            (FluxPipeline(EulerDiscreteScheduler()), TOKENS),
        ],
        ids=["flow", "flow sigmas", "euler"],
    )
    def test_another_kind_of_noise_is_accepted_only_in_finished_latents(self, pipe: Any, latents: torch.Tensor):
        assert prepare(latents, pipe, sigma=0, **SIZE)[1] == 0
        with pytest.raises(ValueError, match="only if the run is finished"):
            prepare(latents, pipe, sigma=0.5, **SIZE)

    def test_an_autoencoder_of_another_latent_space_is_rejected(self):
        pipe: Any = StableDiffusionXLPipeline(EulerDiscreteScheduler())
        pipe.vae = SimpleNamespace(config=SimpleNamespace(latents_mean=[0.1] * 4))
        with pytest.raises(ValueError, match="its latents are not SDXL's"):
            prepare(self.LATENT, pipe, sigma=0)


def server(**spaces: str) -> ServerInfo:
    """Return the description of a server with these latent spaces, by the names of its decoders."""

    def decoder(name: str, space: str) -> DecoderInfo:
        return DecoderInfo(name, f"{space}-2k", LatentSpace(space, 16, 8, "flow"), 4, (), {})

    return ServerInfo(tuple(decoder(name, space) for name, space in spaces.items()), {})


class TestLatentSpace:
    def test_a_decoder_of_another_latent_space_is_rejected(self):
        assert check_latent_space(FluxPipeline(), server(a="flux")).name == "a"
        expected = "FluxPipeline has latents of flux, but the server's decoder a needs those of sd3; use a server"
        with pytest.raises(ValueError, match=expected):
            check_latent_space(FluxPipeline(), server(a="sd3"))

    def test_the_only_decoder_of_the_latent_space_is_chosen(self):
        assert check_latent_space(FluxPipeline(), server(a="sd3", b="flux", c="sdxl")).name == "b"

    def test_all_decoders_are_named_if_none_has_the_latent_space(self):
        with pytest.raises(ValueError, match="decoder a needs those of sd3, decoder b needs those of sdxl; use"):
            check_latent_space(FluxPipeline(), server(a="sd3", b="sdxl"))

    def test_several_decoders_of_the_latent_space_need_a_name(self):
        info = server(a="flux", b="sd3", c="flux")
        with pytest.raises(ValueError, match="several decoders for latents of flux; pass one of a, c as decoder"):
            check_latent_space(FluxPipeline(), info)
        assert check_latent_space(FluxPipeline(), info, "c").name == "c"

    def test_a_decoder_that_was_named_is_checked_too(self):
        info = server(a="flux", b="sd3")
        with pytest.raises(ValueError, match="the server's decoder b needs those of sd3"):
            check_latent_space(FluxPipeline(), info, "b")
        with pytest.raises(ValueError, match="no decoder 'c', only a, b"):
            check_latent_space(FluxPipeline(), info, "c")


class Client:
    """A client of a server with a decoder for FLUX.1 that yields given results."""

    deadline = 60.0

    def __init__(self, *results: Any, seconds: float = 0.0) -> None:
        self.results, self.seconds = results, seconds
        self.call: tuple[Any, dict[str, Any]] | None = None

    def info(self, deadline: float | None = None) -> Any:
        self.info_deadline = deadline
        time.sleep(self.seconds)
        return server(a="sd3", b="flux", c="sd3")

    def decode_batch(self, latents: Any, **options: Any) -> Any:
        self.call = (latents, options)
        yield from self.results


class TestDecoding:
    def test_options_are_passed_on(self):
        client: Any = Client(SimpleNamespace(index=0))
        decode(TOKENS, FluxPipeline(), client, sigma=0.25, on_preview=print, seed=7, format="webp", **SIZE)
        latents, options = client.call
        assert latents.shape == (1, 16, 8, 12)
        assert 0 < options.pop("deadline") <= client.deadline == client.info_deadline
        assert options == {"decoder": "b", "sigma": 0.25, "on_preview": print, "seed": 7, "format": "webp"}

    def test_the_decoder_may_be_named(self):
        client: Any = Client(SimpleNamespace(index=0))
        decode(TOKENS, FluxPipeline(), client, sigma=0, decoder="b", **SIZE)
        assert client.call[1]["decoder"] == "b"
        with pytest.raises(ValueError, match="decoder c needs those of sd3"):
            decode(TOKENS, FluxPipeline(), client, sigma=0, decoder="c", **SIZE)

    def test_both_requests_share_the_deadline(self):
        client: Any = Client(SimpleNamespace(index=0))
        decode(TOKENS, FluxPipeline(), client, sigma=0, deadline=5.0, **SIZE)
        assert client.info_deadline == 5.0
        assert 0 < client.call[1]["deadline"] <= 5.0

    def test_nothing_is_sent_after_the_deadline(self):
        client: Any = Client(SimpleNamespace(index=0), seconds=0.01)
        with pytest.raises(DeadlineError):
            decode(TOKENS, FluxPipeline(), client, sigma=0, deadline=0.001, **SIZE)
        assert client.call is None

    def test_images_are_in_the_order_of_the_latents(self):
        client: Any = Client(*(SimpleNamespace(index=index) for index in (2, 0, 1)))
        images = decode(TOKENS.repeat(3, 1, 1), FluxPipeline(), client, sigma=0, **SIZE)
        assert [image.index for image in images] == [0, 1, 2]

    def test_the_error_of_an_image_is_raised(self):
        client: Any = Client(SimpleNamespace(index=1), PidError("failed", index=0))
        with pytest.raises(PidError, match="failed"):
            decode(TOKENS.repeat(2, 1, 1), FluxPipeline(), client, sigma=0, **SIZE)
