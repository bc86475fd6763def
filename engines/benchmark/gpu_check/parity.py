"""The network against outputs of the published one, on weights that both sides draw from the tensors' names."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engines.pid import FoldedDecoder, PidConfig, PidDecoder, sample
from engines.size import Size

VECTORS = Path(__file__).parents[3] / "tests" / "parity"  # of a checkout
TOLERANCE = 2e-5  # relative, in float32


@dataclass(frozen=True)
class Case:
    """One vector: a small decoder, what went into the published one, and what came out of it."""

    decoder: PidDecoder
    size: Size
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]


def read_case(path: Path, device: torch.device | str = "cpu") -> Case:
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays.pop("meta")))
    decoder = PidDecoder(PidConfig.from_published(meta["config"]))
    decoder.load_state_dict({k: _weight(k, tuple(v.shape), meta["seed"]) for k, v in decoder.state_dict().items()})
    size = Size(meta["grid"][0] * 16, meta["grid"][1] * 16)
    image = (meta["batch"], 3, *size)
    shapes = {"x": image, "eps0": image, "eps1": image, "eps2": image, "latent": tuple(meta["latent_shape"])}
    shapes["caption"] = (meta["batch"], meta["caption_tokens"], meta["config"]["txt_embed_dim"])
    inputs = {k: torch.from_numpy(_draw(f"input.{k}", shape, meta["seed"])).float() for k, shape in shapes.items()}
    return Case(
        decoder.eval().requires_grad_(False).to(device),
        size,
        {key: value.to(device) for key, value in inputs.items()},
        {key: torch.from_numpy(value).to(device) for key, value in arrays.items()},
    )


@torch.inference_mode()
def errors(case: Case, decoder: PidDecoder | FoldedDecoder) -> dict[str, float]:
    """Relative errors ‖difference‖ / ‖published‖ of the adapter's first and last tokens, the velocity, the image."""
    inputs, expected = case.inputs, case.expected
    conditioning = decoder.condition(inputs["latent"], inputs["caption"], size=case.size)
    last = conditioning.pixel if conditioning.pixel is not None else conditioning.adapter[-1]
    sigma = expected["sigma"]
    actual = {
        "adapter0": conditioning.adapter[0],
        "adapter_last": last,
        "velocity": decoder.velocity(inputs["x"], expected["t"], conditioning, sigma),
        "image": sample(decoder, conditioning, inputs["x"], sigma, [inputs[f"eps{i}"] for i in range(3)]),
    }
    return {key: ((value - expected[key]).norm() / expected[key].norm()).item() for key, value in actual.items()}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    state = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    return np.asarray(state.standard_normal(shape))


def _weight(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    z = _draw(key, shape, seed)
    if key.endswith("log_alpha"):
        z = np.log(5) + 0.1 * z
    elif len(shape) >= 2:
        z = z / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("weight"):
        z = 1 + 0.1 * z
    else:
        z = 0.1 * z
    return torch.tensor(z, dtype=torch.float32)
