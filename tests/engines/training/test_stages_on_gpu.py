"""The stages of the training on a CUDA device: every tensor is where it has to be, also after a resumption."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engines.pid import PidDecoder
from engines.training.regression import Regression
from engines.training.student import Student
from engines.training.teacher import Teacher
from engines.training.train import Run, Trainer

MAKERS: dict[str, Callable[[PidDecoder], Trainer]] = {
    "regression": lambda decoder: Regression(None, next(decoder.parameters()).device),
    "teacher": Teacher,
    "student": Student,
}


@pytest.mark.gpu
@pytest.mark.parametrize("stage", MAKERS)
def test_a_stage_trains_decodes_and_resumes(
    stage: str, decoder: PidDecoder, image: torch.Tensor, tmp_path: Path
) -> None:
    device = torch.device("cuda")
    decoder, image = decoder.to(device), image.to(device)
    run = Run(MAKERS[stage](copy.deepcopy(decoder)), tmp_path)
    run.losses.append(run.trainer.step(image, 1.0))
    run.save()
    resumed = Run(MAKERS[stage](copy.deepcopy(decoder)), tmp_path)
    assert resumed.resume()
    resumed.trainer.step(image, 1.0)
    decoded = resumed.trainer.decode(torch.zeros(1, 16, 4, 4, device=device), torch.randn_like(image[:1]), 0.4)
    assert decoded.device == image.device
    assert decoded.shape == (1, 3, 64, 64)
