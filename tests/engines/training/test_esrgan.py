"""ESRGAN: reading of a TensorFlow.js model, its arithmetic, and its place in the evaluation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engines.errors import CheckpointError
from engines.size import Size
from engines.training import esrgan, evaluate, photo_sources

FEATURES, GROWTH = 4, 3
BLOCKS, DENSE_BLOCKS, LAYERS = 3, 2, 2  # the counts differ, so that a confusion is noticed
Weights = dict[str, np.ndarray]


def layer_shapes() -> dict[str, tuple[int, int]]:
    """Return input and output channels of each convolution."""
    shapes = {"Pre_blocks_conv": (3, FEATURES), "post_blocks_conv": (FEATURES, FEATURES)}
    for block in range(1, BLOCKS + 1):
        for dense in range(1, DENSE_BLOCKS + 1):
            for layer in range(1, LAYERS + 1):
                shapes[f"F_{block}_{dense}_{layer}"] = (FEATURES + (layer - 1) * GROWTH, GROWTH)
            shapes[f"LFF_{block}_{dense}"] = (FEATURES + LAYERS * GROWTH, FEATURES)
    return {**shapes, "PreShuffle": (FEATURES, 48), "SR": (3, 3)}


def random_weights() -> Weights:
    numbers, weights = np.random.default_rng(0), {}
    for name, (inputs, outputs) in layer_shapes().items():
        weights[f"{name}/kernel"] = numbers.normal(0, 0.3, (3, 3, inputs, outputs)).astype(np.float32)
        weights[f"{name}/bias"] = numbers.normal(0, 0.1, outputs).astype(np.float32)
    return weights


def copying_weights() -> Weights:
    """Return the weights of a network that repeats each pixel 4×4 times."""
    weights = {name: np.zeros_like(values) for name, values in random_weights().items()}
    weights["Pre_blocks_conv/kernel"][1, 1] = np.eye(3, FEATURES)
    weights["PreShuffle/kernel"][1, 1, :3] = np.tile(np.eye(3), 16)
    weights["SR/kernel"][1, 1] = np.eye(3)
    return weights


def write_package(folder: Path, weights: Weights) -> Path:
    """Write a package whose tensors are in random order and cross the border between two files."""
    model = folder / "models" / "x4"
    model.mkdir(parents=True)
    names = random.Random(0).sample(sorted(weights), len(weights))
    data = b"".join(weights[name].astype("<f4").tobytes() for name in names)
    (model / "one.bin").write_bytes(data[:1001])
    (model / "two.bin").write_bytes(data[1001:])
    specs = [{"name": name, "shape": weights[name].shape, "dtype": "float32"} for name in names]
    (model / "model.json").write_text(
        json.dumps({"weightsManifest": [{"paths": ["one.bin", "two.bin"], "weights": specs}]})
    )
    return folder


def convolve(weights: Weights, name: str, values: np.ndarray) -> np.ndarray:
    """Convolve [H, W, in] as TensorFlow does, padded with zeros: [H, W, out]."""
    height, width, _ = values.shape
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)))
    taps = (padded[y : y + height, x : x + width] @ weights[f"{name}/kernel"][y, x] for y in range(3) for x in range(3))
    return sum(taps) + weights[f"{name}/bias"]


def expected(weights: Weights, image: np.ndarray) -> np.ndarray:
    """Compute the network on [H, W, 3] as the package's model.json describes it."""
    first = x = convolve(weights, "Pre_blocks_conv", image)
    for block in range(1, BLOCKS + 1):
        before_block = x
        for dense in range(1, DENSE_BLOCKS + 1):
            seen = x
            for layer in range(1, LAYERS + 1):
                new = np.maximum(convolve(weights, f"F_{block}_{dense}_{layer}", seen), 0)
                seen = np.concatenate((seen, new), axis=2)
            x = x + 0.2 * convolve(weights, f"LFF_{block}_{dense}", seen)
        x = before_block + 0.2 * x
    x = convolve(weights, "PreShuffle", convolve(weights, "post_blocks_conv", x) + first)
    height, width, _ = x.shape
    large = x.reshape(height, width, 4, 4, 3).swapaxes(1, 2).reshape(4 * height, 4 * width, 3)
    return convolve(weights, "SR", large)


def test_it_computes_the_network_of_the_package(tmp_path: Path) -> None:
    weights = random_weights()
    image = np.random.default_rng(1).random((5, 7, 3), np.float32)
    network = esrgan.load(write_package(tmp_path, weights))
    with torch.no_grad():
        large = network(torch.from_numpy(image).movedim(2, 0)[None])[0].movedim(0, 2)
    np.testing.assert_allclose(large.numpy(), expected(weights, image), atol=1e-5)


def test_an_upscaled_image_stays_in_place_and_in_range(tmp_path: Path) -> None:
    network = esrgan.load(write_package(tmp_path, copying_weights()))
    low = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    repeated = low.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(network.upscale(low), repeated)
    assert network.upscale(1.5 * low).abs().max() == 1


def test_a_uniform_image_has_no_darker_border(tmp_path: Path) -> None:
    weights = copying_weights()
    weights["Pre_blocks_conv/kernel"][:, :] = np.eye(3, FEATURES) / 9  # a blur
    large = esrgan.load(write_package(tmp_path, weights)).upscale(torch.full((1, 3, 6, 6), 0.5))
    torch.testing.assert_close(large, torch.full((1, 3, 24, 24), 0.5))


def test_a_missing_package_stops_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--data", str(tmp_path), "--esrgan", str(tmp_path)])
    assert (
        "must be the folder `package` of the unpacked npm package @upscalerjs/esrgan-thick" in capsys.readouterr().err
    )


def test_damaged_files_and_other_networks_are_rejected(tmp_path: Path) -> None:
    weights = random_weights()
    damaged = write_package(tmp_path / "damaged", weights)
    (damaged / "models" / "x4" / "two.bin").write_bytes(b"")
    del weights["SR/bias"]
    for package in (damaged, write_package(tmp_path / "other", weights)):
        with pytest.raises(CheckpointError, match="does not contain the network"):
            esrgan.load(package)


def test_the_evaluation_compares_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for title in photo_sources.HELD_OUT:
        photo = np.random.default_rng(0).integers(0, 256, (70, 70, 3), np.uint8)
        np.save(tmp_path / "photos" / f"{title}.0.npy", photo)
    monkeypatch.setattr(evaluate, "SIZES", (Size(64, 64),))
    monkeypatch.setattr(evaluate, "SHEET_SIZE", Size(48, 48))
    package, sheet = write_package(tmp_path, copying_weights()), tmp_path / "sheet.png"
    evaluate.main(["--data", str(tmp_path), "--esrgan", str(package), "--sheet", str(sheet)])
    printed = capsys.readouterr().out
    assert "| 0 | ESRGAN | " in printed
    assert "| 0.2 | ESRGAN | " not in printed
    assert "| sigma 0: PSNR relative to ESRGAN | ≥ 0 dB | " in printed
    assert Image.open(sheet).size == (5 * 48, len(photo_sources.HELD_OUT) * 48)
