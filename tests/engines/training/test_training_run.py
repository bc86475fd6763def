"""Training runs: stages, checkpoints, reports and the learning-rate schedule."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from engines.pid import PidDecoder
from engines.size import Size
from engines.training import evaluate, regression, train
from engines.training.linear_start import start_linear
from engines.training.regression import Regression
from engines.training.student import Student
from engines.training.teacher import Teacher

CPU = torch.device("cpu")
FILES = {"checkpoint.pt", "decoder.safetensors", "losses.png", "samples.png"}


@pytest.fixture
def small_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a single crop of 64×64."""
    monkeypatch.setattr(train, "SIZES", (Size(64, 64),) * len(train.SIZES))
    for trainer in (Regression, Teacher, Student):
        monkeypatch.setattr(trainer, "crops", 0)  # a batch has at least one crop


@pytest.mark.parametrize("kind", [Teacher, Student])
def test_a_resumed_run_takes_the_same_step(
    kind: type[Teacher] | type[Student], decoder: PidDecoder, image: Tensor, tmp_path: Path
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


class TestCommand:
    """All stages in a time that is over after one step, on 64×64."""

    @pytest.fixture
    def command(
        self,
        initial_decoder: PidDecoder,
        smooth_photos: list[np.ndarray],
        small_crops: None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> Callable[[str], str]:
        """Return a function that runs the command for the given minutes and returns its output."""
        (tmp_path / "photos").mkdir()
        for name, photo in zip(("rocket.0", "astronaut.0"), smooth_photos, strict=False):
            np.save(tmp_path / "photos" / f"{name}.npy", photo)
        weights = initial_decoder.state_dict()
        monkeypatch.setattr(regression, "initialise_velocity", lambda decoder: decoder.load_state_dict(weights))
        monkeypatch.setattr(regression, "start_linear", partial(start_linear, batches=1))
        monkeypatch.setattr(train, "default_device", lambda: CPU)

        def run(minutes: str) -> str:
            options = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--minutes", minutes]
            monkeypatch.setattr(sys, "argv", ["program", *options])
            train.main()
            return capsys.readouterr().out

        return run

    def test_every_stage_continues_the_one_before_and_reports_and_then_is_finished(
        self, command: Callable[[str], str], initial_decoder: PidDecoder, tmp_path: Path
    ) -> None:
        printed = command("1e-6")
        assert [line for line in printed.splitlines() if "starting" in line] == [
            f"{stage} on cpu: starting" for stage in ("regression", "teacher", "student")
        ]
        contents, weights = {}, []
        for stage in train.STAGES:
            folder = tmp_path / "out" / stage
            assert {file.name for file in folder.iterdir()} == FILES
            assert len(torch.load(folder / "checkpoint.pt", weights_only=True)["losses"]) == 1
            weights.append(load_file(folder / "decoder.safetensors"))
            assert weights[-1].keys() == initial_decoder.state_dict().keys()
            assert Image.open(folder / "samples.png").size == (4 * 64, 4 * 64)
            contents[stage] = {file: file.read_bytes() for file in folder.iterdir()}
        for before, after in pairwise(each["lq_proj.latent_proj.2.weight"].float() for each in weights):
            assert (before - after).abs().max() < 1e-3 * before.abs().max()  # one step, with a rate that warms up
        printed = command("1e-6")
        assert printed.splitlines() == [f"{stage} on cpu: resuming after 1 steps" for stage in train.STAGES]
        for stage in train.STAGES:
            assert all(file.read_bytes() == content for file, content in contents[stage].items())

    @pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
    def test_the_duration_must_be_positive(
        self,
        minutes: str,
        command: Callable[[str], str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            command(minutes)
        assert f"--minutes must be a positive number, got {minutes}." in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class SlowTrainer:
    """A trainer whose every step takes ten seconds by its own clock, and which can be interrupted."""

    title, crops = "slow", 0

    def __init__(self, decoder: PidDecoder) -> None:
        self.average = decoder
        self.now = 1000.0
        self.rate_factors: list[float] = []
        self.interrupt_step = self.interrupt_report = -1  # number of the step before which either is interrupted

    def clock(self) -> float:
        return self.now

    def step(self, image: Tensor, rate_factor: float) -> dict[str, float]:
        if len(self.rate_factors) == self.interrupt_step:
            raise KeyboardInterrupt
        self.now += 10
        self.rate_factors.append(rate_factor)
        return {"loss": float(image.mean())}

    def decode(self, latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
        if len(self.rate_factors) == self.interrupt_report:
            raise KeyboardInterrupt
        self.now += 1000  # reports do not count
        return noise

    def state_dict(self) -> dict[str, Any]:
        return {"rate_factors": self.rate_factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rate_factors = state["rate_factors"]


class TestInterruption:
    """A run of 200 s in steps of 10 s, with a checkpoint after every sixth step."""

    @pytest.fixture
    def start(
        self,
        initial_decoder: PidDecoder,
        smooth_photos: list[np.ndarray],
        image: Tensor,
        small_crops: None,
        tmp_path: Path,
    ) -> Callable[..., train.Run]:
        """Return a function that trains or resumes the run in a folder, until it is interrupted or finished."""

        def start(folder: str, interrupt_step: int = -1, interrupt_report: int = -1) -> train.Run:
            (tmp_path / folder).mkdir(exist_ok=True)
            trainer = SlowTrainer(initial_decoder)
            run = train.Run(trainer, tmp_path / folder)
            run.resume()
            trainer.interrupt_step, trainer.interrupt_report = interrupt_step, interrupt_report
            try:
                train.train(run, smooth_photos, image, 200, trainer.clock)
            except KeyboardInterrupt:
                assert -1 < len(trainer.rate_factors) in (interrupt_step, interrupt_report)
            return run

        return start

    def test_a_run_takes_the_given_time_and_the_rate_decays_to_zero(self, start: Callable[..., train.Run]) -> None:
        run = start("run")
        assert (run.steps, run.seconds) == (20, 200)
        assert run.trainer.rate_factors == [train.rate_factor(step, step / 20) for step in range(20)]

    def test_an_interrupted_run_continues_from_its_checkpoint(
        self, start: Callable[..., train.Run], tmp_path: Path
    ) -> None:
        interrupted = start("interrupted", interrupt_step=15)
        assert interrupted.steps == 15
        saved = train.Run(SlowTrainer(interrupted.trainer.average), tmp_path / "interrupted")
        assert saved.resume()
        assert (saved.losses, saved.seconds) == (interrupted.losses[:12], 120)
        resumed, whole = start("interrupted"), start("whole")
        assert (resumed.steps, resumed.seconds) == (20, 200)
        assert resumed.losses[:12] == saved.losses
        assert resumed.trainer.rate_factors == whole.trainer.rate_factors

    def test_a_resumed_run_does_not_repeat_the_same_crops(self, start: Callable[..., train.Run]) -> None:
        start("run", interrupt_step=6)
        losses = start("run").losses
        assert all(step not in losses[:6] for step in losses[6:12])

    def test_a_run_is_finished_only_after_its_report(self, start: Callable[..., train.Run], tmp_path: Path) -> None:
        start("run", interrupt_report=20)
        (tmp_path / "run" / "samples.png").unlink()  # of an earlier report
        assert start("run").steps == 20
        assert {file.name for file in (tmp_path / "run").iterdir()} == FILES


@pytest.mark.parametrize("program", [train, evaluate])
def test_a_gpu_that_cuda_cannot_use_stops_the_program(
    program: ModuleType,
    unusable_gpu: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = ["--out", str(out)] if program is train else []
    monkeypatch.setattr(sys, "argv", ["program", "--data", str(tmp_path), *options])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert unusable_gpu in capsys.readouterr().err
    assert not out.exists()


def test_the_learning_rate_rises_stays_and_falls() -> None:
    factors = [train.rate_factor(step, step / 1000) for step in range(1001)]
    assert factors[0] == 1 / 50
    assert factors[:50] == sorted(factors[:50])
    assert factors[49:101] == pytest.approx([1.0] * 52)
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert factors[550] == pytest.approx(0.5)
    assert factors[1000] == train.rate_factor(1001, 1.01) == 0
