"""The noise levels that `pid_client.diffusers` reads from the schedulers of diffusers.

The network is perfect: it always predicts the same image, so that each latent is exactly that image and noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from pid_client.diffusers import StopEarly, prepare

pytestmark = pytest.mark.clients

STEPS = 6
SHAPES = {"StableDiffusion3Pipeline": (1, 16, 64, 64), "StableDiffusionXLPipeline": (1, 4, 64, 64)}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

# Factors of the image and of the noise at a noise level of the scheduler.
Frame = Callable[[float], tuple[float, float]]
FRAMES: dict[str, Frame] = {
    "flow": lambda sigma: (1 - sigma, sigma),
    "euler": lambda sigma: (1, sigma),
    "variance-preserving": lambda sigma: ((sigma**2 + 1) ** -0.5, sigma * (sigma**2 + 1) ** -0.5),
}
SCHEDULERS = {
    "FlowMatchEuler": ("flow", FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "FlowMatchEuler, stochastic": ("flow", FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)),
    "DPM++, flow": ("flow", DPMSolverMultistepScheduler(**FLOW)),
    "UniPC, flow": ("flow", UniPCMultistepScheduler(**FLOW)),
    "Euler": ("euler", EulerDiscreteScheduler(**BETAS)),
    "Euler, Karras": ("euler", EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="trailing", **BETAS)),
    "Euler, ancestral": ("euler", EulerAncestralDiscreteScheduler(**BETAS)),
    "DPM++": ("variance-preserving", DPMSolverMultistepScheduler(**BETAS)),
    "DPM++, Karras": ("variance-preserving", DPMSolverMultistepScheduler(use_karras_sigmas=True, **BETAS)),
    "DPM++, SDE": ("variance-preserving", DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **BETAS)),
    "UniPC": ("variance-preserving", UniPCMultistepScheduler(**BETAS)),
}
STOCHASTIC = {"FlowMatchEuler, stochastic", "Euler, ancestral", "DPM++, SDE"}


class Pipeline:
    """The loop of a pipeline, with a network that always predicts `image`; the class name is that of diffusers."""

    interrupt = property(lambda self: self._interrupt)
    num_timesteps = STEPS

    def __init__(self, frame: Frame, scheduler: Any, velocity: bool) -> None:
        self.frame, self.scheduler, self.velocity = frame, scheduler, velocity
        shape = SHAPES[type(self).__name__]
        self.image = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        self._interrupt = False

    def __call__(self, stop: StopEarly) -> None:
        torch.manual_seed(2)  # for the noise of stochastic schedulers
        self.scheduler.set_timesteps(STEPS)
        image, noise = self.frame(float(self.scheduler.sigmas[0]))
        latents = image * self.image + noise * self.noise
        for step, timestep in enumerate(self.scheduler.timesteps):
            if self.interrupt:
                continue
            image, noise = self.frame(float(self.scheduler.sigmas[step]))
            residual = latents - (1 if self.velocity else image) * self.image
            latents = self.scheduler.step(residual / noise, timestep, latents, return_dict=False)[0]
            stop(self, step, timestep, {"latents": latents})


class StableDiffusion3Pipeline(Pipeline):
    pass


class StableDiffusionXLPipeline(Pipeline):
    pass


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("step", [1, 3, 4])
@pytest.mark.filterwarnings("ignore")
def test_the_latent_has_the_noise_that_sigma_says(name: str, step: int):
    convention, scheduler = SCHEDULERS[name]
    flow = convention == "flow"
    pipe = (StableDiffusion3Pipeline if flow else StableDiffusionXLPipeline)(FRAMES[convention], scheduler, flow)
    stop = StopEarly(step=step)
    pipe(stop)
    assert stop.sigma == float(scheduler.sigmas[step])

    latent, sigma = prepare(stop, pipe)
    assert 0 < sigma < 1
    image = 1 - sigma if flow else (1 - sigma**2) ** 0.5
    noise = (torch.from_numpy(latent) - image * pipe.image) / sigma
    if name in STOCHASTIC:
        assert float(noise.std()) == pytest.approx(1, abs=0.03)
        correlation = torch.corrcoef(torch.stack([noise.flatten(), pipe.image.flatten()]))[0, 1]
        assert float(correlation) == pytest.approx(0, abs=0.04)
    else:
        torch.testing.assert_close(noise, pipe.noise, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore")
def test_a_complete_run_leaves_the_image(name: str):
    convention, scheduler = SCHEDULERS[name]
    flow = convention == "flow"
    pipe = (StableDiffusion3Pipeline if flow else StableDiffusionXLPipeline)(FRAMES[convention], scheduler, flow)
    stop = StopEarly(sigma=0)
    pipe(stop)
    latent, sigma = prepare(stop, pipe)
    assert (stop.step, sigma) == (STEPS, 0)
    torch.testing.assert_close(torch.from_numpy(latent), pipe.image, rtol=0, atol=1e-4)
