"""The network against outputs of the published one, on weights that both sides draw from the tensors' names."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.pid import PidConfig, PidDecoder, fold, sample

FILES = sorted((Path(__file__).parent.parent / "parity").glob("*.npz"))


@dataclass
class Case:
    decoder: PidDecoder
    size: tuple[int, int]
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    state = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    return np.asarray(state.standard_normal(shape))


def draw_weight(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    z = draw(key, shape, seed)
    if key.endswith("log_alpha"):
        z = np.log(5) + 0.1 * z
    elif len(shape) >= 2:
        z = z / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("weight"):
        z = 1 + 0.1 * z
    else:
        z = 0.1 * z
    return torch.tensor(z, dtype=torch.float32)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    arrays = dict(np.load(request.param))
    meta = json.loads(str(arrays.pop("meta")))
    decoder = PidDecoder(PidConfig.from_published(meta["config"]))
    decoder.load_state_dict({k: draw_weight(k, tuple(v.shape), meta["seed"]) for k, v in decoder.state_dict().items()})
    decoder.eval().requires_grad_(False)
    size = (meta["grid"][0] * 16, meta["grid"][1] * 16)
    image = (meta["batch"], 3, *size)
    shapes = {"x": image, "eps0": image, "eps1": image, "eps2": image, "latent": tuple(meta["latent_shape"])}
    shapes["caption"] = (meta["batch"], meta["caption_tokens"], meta["config"]["txt_embed_dim"])
    inputs = {k: torch.from_numpy(draw(f"input.{k}", shape, meta["seed"])).float() for k, shape in shapes.items()}
    return Case(decoder, size, inputs, {key: torch.from_numpy(value) for key, value in arrays.items()})


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_every_latent_family_and_generation_has_a_vector():
    assert len(FILES) == 7


@pytest.mark.parametrize("budget", [2**40, 1], ids=["whole", "chunked"])
@pytest.mark.parametrize("folded", [False, True], ids=["live", "folded"])
def test_velocity_and_image_match_the_published_network(case: Case, folded: bool, budget: int):
    times = case.expected["t_list"][:-1].tolist()
    decoder = fold(case.decoder, times) if folded else case.decoder
    decoder.pixel_memory_budget = budget
    conditioning = decoder.condition(case.inputs["latent"], case.inputs["caption"], size=case.size)
    last = conditioning.pixel if conditioning.pixel is not None else conditioning.adapter[-1]
    sigma = case.expected["sigma"]
    velocity = decoder.velocity(case.inputs["x"], case.expected["t"], conditioning, sigma)
    step_noise = [case.inputs[f"eps{i}"] for i in range(3)]
    image = sample(decoder, conditioning, case.inputs["x"], sigma, step_noise)

    assert relative(conditioning.adapter[0], case.expected["adapter0"]) < 2e-5
    assert relative(last, case.expected["adapter_last"]) < 2e-5
    assert relative(velocity, case.expected["velocity"]) < 2e-5
    assert relative(image, case.expected["image"]) < 2e-5
