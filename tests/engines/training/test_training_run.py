"""Training runs: checkpoints, reports and the learning-rate schedule."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engines.pid import PidDecoder
from engines.size import Size
from engines.training import evaluate, train
from engines.training.student import Student
from engines.training.teacher import Teacher


@pytest.mark.parametrize("kind", [Teacher, Student])
def test_a_resumed_run_takes_the_same_step(
    kind: type[Teacher] | type[Student], decoder: PidDecoder, image: torch.Tensor, tmp_path: Path
) -> None:
    run = train.Run(kind(copy.deepcopy(decoder)), tmp_path)
    run.losses.append(run.trainer.step(image, 1.0))
    run.save()
    resumed = train.Run(kind(copy.deepcopy(decoder)), tmp_path)
    assert resumed.resume()
    assert resumed.losses == run.losses
    losses = []
    for each in (run, resumed):
        torch.manual_seed(1)
        losses.append(each.trainer.step(image, 1.0))
    assert losses[0] == pytest.approx(losses[1])
    for one, other in zip(run.trainer.average.parameters(), resumed.trainer.average.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_run_writes_weights_samples_and_curves(
    decoder: PidDecoder, image: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SIZES", (Size(64, 64),) * len(train.SIZES))
    monkeypatch.setattr(Teacher, "crops", 0)  # a batch has at least one crop
    photo = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    run = train.Run(Teacher(decoder), tmp_path)
    train.train(run, [photo], image, 2)
    assert run.steps == 2
    assert {file.name for file in tmp_path.iterdir()} == {
        "checkpoint.pt", "decoder.safetensors", "losses.png", "samples.png",
    }  # fmt: skip
    assert Image.open(tmp_path / "samples.png").size == (2 * 64, 4 * 64)
    assert load_file(tmp_path / "decoder.safetensors").keys() == decoder.state_dict().keys()


@pytest.mark.parametrize("program", [train, evaluate])
def test_a_gpu_that_cuda_cannot_use_stops_the_program(
    program: ModuleType,
    unusable_gpu: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = ["--stage", "teacher", "--out", str(out)] if program is train else []
    monkeypatch.setattr(sys, "argv", ["program", "--data", str(tmp_path), *options])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert unusable_gpu in capsys.readouterr().err
    assert not out.exists()


def test_a_student_needs_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No teacher"):
        train.make_trainer("student", [], tmp_path, torch.device("cpu"))


def test_the_learning_rate_rises_stays_and_falls() -> None:
    factors = [train.rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] < 0.05
    assert factors[49:101] == [1.0] * 52
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert 0 < factors[-1] < 0.01
