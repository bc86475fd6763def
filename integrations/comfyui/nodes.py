"""The nodes. ComfyUI reads their inputs and outputs from INPUT_TYPES and RETURN_TYPES, and calls FUNCTION."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import closing
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch

from pid_client import DeadlineError, Options, PidClient, PidError, Preview, UnauthorizedError

from .latents import choose_decoder, decoder_input

API_KEY = "PID_API_KEY"  # not an input of the node: ComfyUI writes inputs into the images that it saves

Priority = Literal["interactive", "standard", "batch"]
Inputs = dict[str, dict[str, tuple[Any, ...]]]


class PidDecode:
    """Decodes latents on a PiD decode server, instead of "VAE Decode"."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    CATEGORY = "PiD"
    DESCRIPTION = (
        "Decodes latents on a PiD decode server, to images four times as wide and high as those of VAE Decode."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Return the inputs, by name."""
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "Latents of a model that the server has a decoder for."}),
                "url": ("STRING", {"default": "http://127.0.0.1:8000", "tooltip": "Address of the server."}),
                "sigma": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1000.0,
                        "step": 0.001,
                        "round": False,
                        "tooltip": "Noise level of the latents, from the node PiD stop early; 0 after a complete run.",
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2**64 - 1,
                        "control_after_generate": True,
                        "tooltip": "Seed of the decoder's noise. Image i of a batch uses seed + i.",
                    },
                ),
            },
            "optional": {
                "prompt": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "The prompt of the images, if the server encodes prompts; otherwise leave it empty.",
                    },
                ),
                "priority": (
                    list(get_args(Priority)),
                    {"default": "standard", "tooltip": "Scheduling class on the server."},
                ),
                "deadline": (
                    "FLOAT",
                    {"default": 60.0, "min": 1.0, "max": 3600.0, "tooltip": "Seconds that the decode may last."},
                ),
                "decoder": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Name of the decoder, if the server has several for latents of the same shape.",
                    },
                ),
            },
        }

    def decode(
        self,
        samples: Mapping[str, torch.Tensor],
        url: str,
        sigma: float,
        seed: int,
        prompt: str = "",
        priority: Priority = "standard",
        deadline: float = 60.0,
        decoder: str = "",
    ) -> tuple[torch.Tensor]:
        """Return images [B, H, W, 3] float32 in 0..1.

        Raises:
            RuntimeError: an image could not be decoded, or the API key is missing or unknown.
            PidError: the request failed.
            ValueError: an input is invalid.
        """
        # Raw pixels are exact, and neither the server nor this process spends time on compression.
        options: Options = {"seed": seed, "priority": priority, "format": "raw"}
        if prompt:
            options["prompt"] = prompt
        try:
            client, began = _client(url, os.environ.get(API_KEY) or None), time.monotonic()
            chosen = choose_decoder(samples["samples"], client.info(deadline), decoder)
            options["decoder"] = chosen.name
            latents, options["sigma"] = decoder_input(samples["samples"], sigma, chosen.latent_space)
            options["deadline"] = deadline - (time.monotonic() - began)
            if options["deadline"] <= 0:
                raise DeadlineError("The deadline passed before the latents were sent.")
            return (_decode(client, latents, options),)
        except UnauthorizedError as error:
            raise RuntimeError(
                f"The server requires a valid API key; set the environment variable {API_KEY} and restart ComfyUI."
            ) from error


class PidStopEarly:
    """Shortens a schedule, so that a sampler stops early, and returns the noise level at its end."""

    RETURN_TYPES = ("SIGMAS", "FLOAT")
    RETURN_NAMES = ("sigmas", "sigma")
    FUNCTION = "stop"
    CATEGORY = "PiD"
    DESCRIPTION = "Stops a sampler after a step. Connect sigmas to the sampler, and its latent and sigma to PiD decode."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Return the inputs, by name."""
        return {
            "required": {
                "sigmas": ("SIGMAS", {"tooltip": "The complete schedule."}),
                "step": (
                    "INT",
                    {"default": 24, "min": 1, "max": 10000, "tooltip": "Number of steps that the sampler performs."},
                ),
            }
        }

    def stop(self, sigmas: torch.Tensor, step: int) -> tuple[torch.Tensor, float]:
        """Return the sigmas of the first `step` steps, [step + 1], and the last of them.

        Raises:
            ValueError: the schedule has fewer steps.
        """
        steps = len(sigmas) - 1
        if not 1 <= step <= steps:
            raise ValueError(f"step is {step}, but the schedule has {max(steps, 0)} steps; choose one of them.")
        return sigmas[: step + 1], float(sigmas[step])


@cache
def _client(url: str, api_key: str | None) -> PidClient:
    """Return one client per server, which reuses its connections."""
    return PidClient(url, api_key)


def _decode(client: PidClient, latents: np.ndarray[Any, np.dtype[np.float32]], options: Options) -> torch.Tensor:
    """Decode latents [B, c, h, w] to images [B, H, W, 3]. ComfyUI shows previews, and can cancel after each step."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    progress, pixels = ProgressBar(len(latents)), {}
    done = [0.0] * len(latents)  # fraction of each image

    def show(preview: Preview) -> None:
        done[preview.index] = preview.step / preview.steps
        progress.update_absolute(sum(done), preview=("JPEG", preview.pil(), None))
        throw_exception_if_processing_interrupted()

    with closing(client.decode_batch(latents, on_preview=show, **options)) as results:
        for image in results:
            if isinstance(image, PidError):
                raise RuntimeError(f"Image {image.index} (counted from 0) failed: {image}") from image
            pixels[image.index] = image.numpy()
            done[image.index] = 1
            progress.update_absolute(sum(done))
            throw_exception_if_processing_interrupted()
    return torch.from_numpy(np.stack([pixels[index] for index in range(len(latents))])).float() / 255
