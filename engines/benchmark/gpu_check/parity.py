"""The network against reference vectors: outputs of the published implementation on small random networks.

A vector is a .npz file. It holds outputs and metadata, but neither weights nor inputs: both are drawn from a seed and
the name of the tensor, so that the published implementation and this one use the same.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engines.accuracy import largest, relative_error
from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Failed, Finding, Measurement, Skipped
from engines.pid import FoldedDecoder, PidConfig, PidDecoder, fold, sample
from engines.pid.config import PATCH
from engines.size import Size

TOLERANCE = 2e-5  # relative, in float32
DEVICE_TOLERANCE = 5 * TOLERANCE  # the kernels of other devices sum in another order


@dataclass(frozen=True)
class Case:
    """One vector: a small decoder, inputs, and the outputs of the published implementation."""

    decoder: PidDecoder
    size: Size
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]


def compare_vectors(config: RunConfig, tolerance: float = DEVICE_TOLERANCE) -> Iterator[Finding]:
    """Yield the relative errors of each vector in float32, without TF32, for the live and the folded network."""
    files = sorted(config.vectors.glob("*.npz"))
    if not files:
        yield Skipped(
            f"no reference vectors in {config.vectors}; start gpu_check in the root of a checkout, which has them in "
            "tests/parity, or pass --vectors DIR"
        )
        return
    torch.backends.cudnn.allow_tf32 = False
    for path in files:
        case = read_case(path, config.device)
        folded = fold(case.decoder, case.expected["t_list"][:-1].tolist())
        for form, decoder in (("live", case.decoder), ("folded", folded)):
            errors = relative_errors(case, decoder)
            shown = {name: f"{error:.1e}" for name, error in errors.items()}
            yield Measurement({"vector": path.stem, "network": form} | shown)
            worst = largest(errors.values())
            if not worst < tolerance:  # also true for NaN
                yield Failed(f"{path.stem}, {form}: error {worst:.1e} exceeds {tolerance:.0e}")


def read_case(path: Path, device: torch.device | str = "cpu") -> Case:
    """Read a vector and draw its weights and inputs; all tensors are on `device`, float32."""
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays.pop("meta")))
    decoder = PidDecoder(PidConfig.from_published(meta["config"]))
    decoder.load_state_dict({k: _weight(k, tuple(v.shape), meta["seed"]) for k, v in decoder.state_dict().items()})
    size = Size(meta["grid"][0] * PATCH, meta["grid"][1] * PATCH)
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
def relative_errors(case: Case, decoder: PidDecoder | FoldedDecoder) -> dict[str, float]:
    """Return ‖actual − expected‖ / ‖expected‖ of the first and last adapter tokens, the velocity and the image."""
    inputs, expected = case.inputs, case.expected
    conditioning = decoder.condition(inputs["latent"], inputs["caption"], size=case.size)
    last = conditioning.pixel if conditioning.pixel is not None else conditioning.adapter[-1]
    sigma = expected["sigma"]
    actual = {
        "adapter0": conditioning.adapter[0].flatten(1, 2),
        "adapter_last": last.flatten(1, 2),
        "velocity": decoder.velocity(inputs["x"], expected["t"], conditioning, sigma),
        "image": sample(decoder, conditioning, inputs["x"], sigma, [inputs[f"eps{i}"] for i in range(3)]),
    }
    return {key: relative_error(value, expected[key]) for key, value in actual.items()}


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
