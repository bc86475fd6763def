"""Decoding of the latents of diffusers' pipelines, including runs that were stopped early.

This module does not import diffusers or PyTorch. docs/diffusers.md of the server's repository is the guide.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import closing
from typing import Any, Unpack

from pid_client import DeadlineError, DecoderInfo, Image, Options, PidClient, PidError, Preview, ServerInfo, frames
from pid_client.pipelines import CHANNELS, Convention, class_name, convention, find_convention, latent_space
from pid_client.tensors import Tensor, to_tensor


class StopEarly:
    """Callback that stops a diffusion run after some steps and keeps its latents.

    Pass it as `callback_on_step_end` to a pipeline, with `output_type="latent"` to skip the VAE. It may be used for
    several runs; each replaces the results of the one before.

    Attributes:
        latents: Latents as the pipeline holds them after the last step, or None before a run is stopped.
        sigma: Noise level of these latents in the convention of the pipeline's scheduler.
        step: Number of steps that were run.
        convention: Convention of `sigma`, see `pid_client.pipelines.find_convention`.
    """

    latents: Any
    sigma: float
    step: int
    convention: Convention
    _source: Any  # sigmas of the scheduler, which replaces them for each run
    _sigmas: Sequence[float]

    def __init__(self, *, step: int | None = None, sigma: float | None = None) -> None:
        """Create the callback with one of two conditions.

        Args:
            step: Number of steps to run, at least 1.
            sigma: Stop after the first step that leaves at most this noise level, in the scheduler's convention.

        Raises:
            ValueError: Not exactly one of them is set, or its value is invalid.
        """
        if (step is None) == (sigma is None):
            raise ValueError("StopEarly needs exactly one of step and sigma.")
        if step is not None and step < 1:
            raise ValueError(f"StopEarly needs a step of at least 1, not {step}.")
        if sigma is not None and not 0 <= sigma < math.inf:
            raise ValueError(f"StopEarly needs a finite sigma of at least 0, not {sigma}.")
        self._stop_step, self._stop_sigma = step, sigma
        self._reset()

    def __call__(
        self, pipe: Any, step: int, timestep: object, callback_kwargs: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Stop the run if the condition is met; pipelines call this after each step.

        Raises:
            ValueError: The pipeline or its scheduler is not supported, or the run has fewer steps than required.
        """
        if step == 0 or pipe.scheduler.sigmas is not self._source:  # a new run
            self._reset()
            self._check(pipe, callback_kwargs)
            self._source = pipe.scheduler.sigmas
            self._sigmas = self._source.tolist()  # once, since they may be on a GPU
        sigma = self._sigmas[pipe.scheduler.step_index]
        if self.latents is None and self._reached(step + 1, sigma):
            self.latents = callback_kwargs["latents"].clone()  # the pipeline's output is the same tensor
            self.sigma, self.step = sigma, step + 1
            self.convention = convention(pipe.scheduler)
            pipe._interrupt = True
        return callback_kwargs

    def _reset(self) -> None:
        self.latents = self._source = None
        self.sigma, self.step = math.nan, 0
        self.convention = "flow"

    def _check(self, pipe: Any, callback_kwargs: MutableMapping[str, Any]) -> None:
        """Raise an error if this run cannot be stopped as required."""
        convention(pipe.scheduler)
        if not hasattr(pipe, "interrupt"):
            raise ValueError(f"{class_name(pipe)} cannot be stopped early.")
        if "latents" not in callback_kwargs:
            raise ValueError('StopEarly needs "latents" in callback_on_step_end_tensor_inputs.')
        if self._stop_step is not None and self._stop_step > pipe.num_timesteps:
            raise ValueError(f"The run has only {pipe.num_timesteps} steps; it cannot stop after {self._stop_step}.")

    def _reached(self, steps: int, sigma: float) -> bool:
        if self._stop_step is not None:
            return steps >= self._stop_step
        # Schedulers keep sigmas in float32, in which 0.2 is a little more than 0.2.
        return self._stop_sigma is not None and sigma <= self._stop_sigma * (1 + 1e-6)


def prepare(
    latents: object, pipe: Any, *, sigma: float | None = None, height: int | None = None, width: int | None = None
) -> tuple[frames.Array, float]:
    """Convert the latents of a pipeline to the form that the decoder of its latent space expects.

    Args:
        latents: A `StopEarly` after a run; the output of a pipeline with `output_type="latent"`; or a tensor such as
            the output's `images` or the callback's `latents`.
        pipe: The pipeline. Without `sigma`, the noise level of an output is that of its scheduler, so call this before
            the scheduler is used for another run.
        sigma: Noise level in the scheduler's convention, 0 for finished latents. A tensor needs it.
        height: Height of the pipeline's image in pixels, as passed to the pipeline. Packed latents need it.
        width: Its width.

    Returns:
        The latent [B, c, h, w] and its noise level, for `client.decode_batch(latent, sigma=sigma)`.

    Raises:
        ValueError: The pipeline, its scheduler or the latents are not supported, or an argument is missing.
    """
    space = latent_space(pipe)
    _check_autoencoder(pipe, space)
    frame: Convention | None
    if isinstance(latents, StopEarly):
        values, noise, frame = _captured(latents, sigma)
    elif sigma is None:
        values, noise = _output(latents), _remaining_sigma(pipe)
        frame = find_convention(pipe.scheduler)
    else:
        values, noise = getattr(latents, "images", latents), sigma
        frame = convention(pipe.scheduler) if noise else None
    latent = _arrange(to_tensor(values), pipe, space, height, width)
    if noise == 0:  # all conventions agree
        return latent, 0.0
    if space == "sdxl" and frame == "euler":
        return frames.vp_from_euler(latent, noise)
    if space == "sdxl" and frame == "variance-preserving":
        return latent, noise / math.hypot(noise, 1)
    if space != "sdxl" and frame == "flow":
        return latent, noise
    raise ValueError(
        f"Latents of {class_name(pipe)} with {class_name(pipe.scheduler)} are supported only if the run is finished: "
        f"the decoder of {space} expects another kind of noise."
    )


def check_latent_space(pipe: object, info: ServerInfo, decoder: str | None = None) -> DecoderInfo:
    """Return the decoder of a server for the latents of a pipeline.

    The server does not notice other latents of the same shape: those of FLUX.1 and SD3 both have 16 channels.

    Args:
        pipe: The pipeline.
        info: Description of the server.
        decoder: Name of the decoder; by default, the only one that has the latent space of the pipeline.

    Raises:
        ValueError: The pipeline is not supported, the server has no decoder with this name, its decoders have other
            latent spaces, or several have that of the pipeline.
    """
    space = latent_space(pipe)
    candidates = info.decoders if decoder is None else (info.decoder(decoder),)
    found = [candidate for candidate in candidates if candidate.latent_space.name == space]
    if not found:
        served = ", ".join(f"decoder {other.name} needs those of {other.latent_space.name}" for other in candidates)
        raise ValueError(
            f"{class_name(pipe)} has latents of {space}, but the server's {served}; use a server with a decoder for "
            f"{space}."
        )
    if len(found) > 1:
        names = ", ".join(candidate.name for candidate in found)
        raise ValueError(f"The server has several decoders for latents of {space}; pass one of {names} as decoder.")
    return found[0]


def decode(
    latents: object,
    pipe: object,
    client: PidClient,
    *,
    height: int | None = None,
    width: int | None = None,
    on_preview: Callable[[Preview], None] | None = None,
    **options: Unpack[Options],
) -> list[Image]:
    """Decode the latents of a pipeline, after a check of the server's latent space with GET /info.

    Args:
        latents: As for `prepare`.
        pipe: As for `prepare`.
        client: Client of a server with a decoder for the latent space of the pipeline.
        height: As for `prepare`.
        width: As for `prepare`.
        on_preview: As for `client.decode_batch`.
        options: Options of `client.decode_batch`; `sigma` is as for `prepare`, `decoder` as for `check_latent_space`.

    Returns:
        The images in the order of the pipeline's batch.

    Raises:
        ValueError: As `prepare` and `check_latent_space`.
        PidError: The request, or one of its images, failed.
    """
    latent, options["sigma"] = prepare(latents, pipe, sigma=options.get("sigma"), height=height, width=width)
    deadline, began = options.get("deadline", client.deadline), time.monotonic()
    options["decoder"] = check_latent_space(pipe, client.info(deadline), options.get("decoder")).name
    options["deadline"] = deadline - (time.monotonic() - began)
    if options["deadline"] <= 0:
        raise DeadlineError("The deadline passed before the latents were sent.")
    images: dict[int, Image] = {}
    with closing(client.decode_batch(latent, on_preview=on_preview, **options)) as results:
        for image in results:
            if isinstance(image, PidError):
                raise image
            images[image.index] = image
    return [images[index] for index in sorted(images)]


def _captured(stop: StopEarly, sigma: float | None) -> tuple[Any, float, Convention]:
    if stop.latents is None:
        raise ValueError("StopEarly has no latents: no run has reached its condition yet.")
    if sigma is not None:
        raise ValueError("StopEarly knows the noise level of its latents; omit sigma.")
    return stop.latents, stop.sigma, stop.convention


def _output(output: object) -> object:
    """Return the latents of a pipeline's output."""
    latents = getattr(output, "images", None)
    if latents is None:
        raise ValueError("The noise level of a tensor is not known; pass sigma, which is 0 for finished latents.")
    if isinstance(latents, list):
        raise ValueError('The output contains images; call the pipeline with output_type="latent".')
    return latents


def _remaining_sigma(pipe: Any) -> float:
    """Return the noise level, in the scheduler's convention, that the last run has left in its output."""
    scheduler = pipe.scheduler
    if find_convention(scheduler) is not None:
        if scheduler.step_index is None:
            raise ValueError(f"The scheduler of this {class_name(pipe)} has not run; pass sigma.")
        return float(scheduler.sigmas[scheduler.step_index])
    if getattr(pipe, "interrupt", False) or getattr(pipe, "denoising_end", None) is not None:
        convention(scheduler)  # raises the error
    return 0.0


def _check_autoencoder(pipe: object, space: str) -> None:
    """Reject models of SDXL's architecture with other latents, such as Playground v2.5."""
    config = getattr(getattr(pipe, "vae", None), "config", None)
    if space == "sdxl" and getattr(config, "latents_mean", None) is not None:
        raise ValueError("The autoencoder of this pipeline has its own latents_mean, so its latents are not SDXL's.")


def _arrange(tensor: Tensor, pipe: Any, space: str, height: int | None, width: int | None) -> frames.Array:
    """Return the latent [B, c, h, w] of one of the shapes in which pipelines hold it."""
    shape, channels = tensor.shape, CHANNELS[space]
    packed = (shape[0], shape[1], channels if space == "flux2" else 4 * channels) if len(shape) == 3 else None
    if shape == packed and space in ("flux", "flux2", "qwenimage"):
        if height is None or width is None:
            raise ValueError(
                f"The latents of {class_name(pipe)} are packed; pass height and width in pixels, as to the pipeline."
            )
        unpack = frames.unpack_cells if space == "flux2" else frames.unpack
        return unpack(tensor, height, width)
    if space == "flux2" and len(shape) == 4 and 4 * shape[1] == channels:
        vae = pipe.vae  # FLUX.2 klein returns the raw latents of its autoencoder
        patches = frames.patchify(tensor)
        return frames.batch_norm(patches, vae.bn.running_mean, vae.bn.running_var, vae.config.batch_norm_eps)
    latent = frames.drop_frame(tensor) if len(shape) == 5 else frames.to_array(tensor)
    if latent.ndim != 4 or latent.shape[1] != channels:
        raise ValueError(f"Latents of {class_name(pipe)} have the shape [batch, {channels}, h, w], not {shape}.")
    return latent
