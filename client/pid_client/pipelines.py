"""Latent spaces of diffusers' pipelines and noise conventions of its schedulers, by the names of their classes.

The lookup includes base classes, so subclasses work too. A pipeline is listed only if the source of diffusers 0.42.1
shows that its latents are in the same frame as those of the first pipeline of the latent space.
"""

from __future__ import annotations

from typing import Any, Literal

Convention = Literal["flow", "variance-preserving", "euler"]

CHANNELS = {"flux": 16, "flux2": 128, "sd3": 16, "sdxl": 4, "qwenimage": 16}

_PIPELINES = {
    "flux": (
        *("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline"),
        *("FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"),
        *("FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline"),
        *("FluxKontextPipeline", "FluxKontextInpaintPipeline"),
        *("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
        *("ZImageControlNetPipeline", "ZImageControlNetInpaintPipeline"),
    ),
    "flux2": ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"),
    "sd3": (
        *("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        *("StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetInpaintingPipeline"),
        *("StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline"),
    ),
    "sdxl": (
        *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        *("StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetImg2ImgPipeline"),
        *("StableDiffusionXLControlNetInpaintPipeline", "StableDiffusionXLControlNetUnionPipeline"),
        *("StableDiffusionXLControlNetUnionImg2ImgPipeline", "StableDiffusionXLControlNetUnionInpaintPipeline"),
        *("StableDiffusionXLPAGPipeline", "StableDiffusionXLPAGImg2ImgPipeline", "StableDiffusionXLPAGInpaintPipeline"),
    ),
    "qwenimage": (
        *("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        *("QwenImageControlNetPipeline", "QwenImageControlNetInpaintPipeline"),
        *("QwenImageEditPipeline", "QwenImageEditInpaintPipeline", "QwenImageEditPlusPipeline"),
    ),
}
LATENT_SPACES = {pipeline: space for space, pipelines in _PIPELINES.items() for pipeline in pipelines}

# Schedulers with one step per noise level, which keep the latent at `sigmas[step_index]`. Second-order ones, such as
# Heun, step to levels in between, and those of DDIM's kind have no list of noise levels.
_CONVENTIONS: dict[str, Convention] = {
    "FlowMatchEulerDiscreteScheduler": "flow",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "variance-preserving",  # unless use_flow_sigmas
    "UniPCMultistepScheduler": "variance-preserving",  # unless use_flow_sigmas
}


def latent_space(pipe: object) -> str:
    """Return the name of the latent space of a pipeline, as in the server's `/info`.

    Raises:
        ValueError: The pipeline is not supported.
    """
    for name in _class_names(pipe):
        if name in LATENT_SPACES:
            return LATENT_SPACES[name]
    raise ValueError(
        f"The latents of {class_name(pipe)} are not known; convert them with pid_client.frames and send them with "
        "client.decode."
    )


def find_convention(scheduler: Any) -> Convention | None:
    """Return the convention of a scheduler's latents and noise levels σ, or None if it is not known.

    It is "flow" for (1−σ)x0 + σε, "euler" for x0 + σε, and "variance-preserving" for (x0 + σε) / √(σ²+1).
    """
    known = [_CONVENTIONS[name] for name in _class_names(scheduler) if name in _CONVENTIONS]
    config = getattr(scheduler, "config", None)
    if not known or getattr(config, "invert_sigmas", False):
        return None
    return "flow" if getattr(config, "use_flow_sigmas", False) else known[0]


def convention(scheduler: object) -> Convention:
    """Return the convention of a scheduler as `find_convention`.

    Raises:
        ValueError: It is not known.
    """
    found = find_convention(scheduler)
    if found is None:
        raise ValueError(
            f"The noise level of latents of {class_name(scheduler)} is not known during a run; use one of "
            f"{', '.join(_CONVENTIONS)}, or decode only finished latents."
        )
    return found


def class_name(value: object) -> str:
    """Return the name of the class of a value."""
    return type(value).__name__


def _class_names(value: object) -> list[str]:
    return [base.__name__ for base in type(value).__mro__]
