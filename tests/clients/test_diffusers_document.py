"""The examples in docs/diffusers.md and the README, run with a tiny FLUX.1 pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from tests.clients.examples import example, examples, replace, run_python
from tests.clients.latents import decode, pixels
from tests.clients.tiny_pipelines import FEATURES, TOKENS, create

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

SIZE = {"height": 64, "width": 64}

TEXT_ENCODERS = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))  # none of them

SETUP = f"""
import torch
from diffusers import FluxPipeline

TEXT_ENCODERS = {TEXT_ENCODERS}

def encode_prompt(self, prompt, num_images_per_prompt, **options):
    assert prompt == "A red fox in the snow"
    words, pooled = torch.ones(num_images_per_prompt, {TOKENS}, {FEATURES}), torch.ones(num_images_per_prompt, 8)
    return words.bfloat16(), pooled.bfloat16(), torch.zeros({TOKENS}, 3).bfloat16()

FluxPipeline.encode_prompt = encode_prompt
"""


def latent_after(steps: int, folder: Path) -> tuple[torch.Tensor, float]:
    """Return the latent [16, h, w] after some of 28 steps of a complete run, and its noise level."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16, **TEXT_ENCODERS)
    words, pooled = torch.ones(1, TOKENS, FEATURES).bfloat16(), torch.ones(1, 8).bfloat16()
    latents: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        return tensors

    pipe(
        prompt_embeds=words,
        pooled_prompt_embeds=pooled,
        **SIZE,
        num_inference_steps=28,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        callback_on_step_end=keep,
    )
    (latent,) = pipe._unpack_latents(latents[steps - 1], 64, 64, 8)
    return latent, float(pipe.scheduler.sigmas[steps])


def test_the_example_in_the_readme(flux: str, tmp_path: Path):
    create("FLUX.1").pipe.save_pretrained(tmp_path / "model")
    setup = f"""{SETUP}
from pid_client import PidClient

prompt = "A red fox in the snow"
torch.manual_seed(7)
pipe = FluxPipeline.from_pretrained({str(tmp_path / "model")!r}, dtype=torch.bfloat16, **TEXT_ENCODERS)
client = PidClient({flux!r})
"""
    code = replace(example("../README.md", "python", "StopEarly"), **{"height=512, width=512": "height=64, width=64"})
    run_python(tmp_path, setup, f'{code}image.save("image.png")\n')
    latent, sigma = latent_after(24, tmp_path / "model")
    expected = decode(flux, latent, seed=0, sigma=sigma)
    assert np.array_equal(pixels((tmp_path / "image.png").read_bytes())[..., 0], pixels(expected)[..., 0])


def test_the_examples(flux: str, tmp_path: Path):
    create("FLUX.1").pipe.save_pretrained(tmp_path / "model")
    code = replace(
        "\n".join(examples("diffusers.md", "python")),
        **{
            "http://127.0.0.1:8000": flux,
            "black-forest-labs/FLUX.1-dev": str(tmp_path / "model"),
            "vae=None": "vae=None, **TEXT_ENCODERS",
            '.to("cuda")': "",
            '"height": 512, "width": 512': '"height": 64, "width": 64',
        },
    )
    run_python(tmp_path, SETUP, code)

    image = (tmp_path / "fox.png").read_bytes()
    latent, sigma = latent_after(24, tmp_path / "model")
    assert image == decode(flux, latent, seed=7, sigma=sigma)
    assert pixels(image).shape == (4 * 64, 4 * 64, 3)
    first, second = (pixels((tmp_path / f"fox-{index}.png").read_bytes()) for index in range(2))
    assert not np.array_equal(first[..., 0], second[..., 0])
    for index in range(2):
        assert (tmp_path / f"fox-async-{index}.png").read_bytes() == (tmp_path / f"fox-{index}.png").read_bytes()
