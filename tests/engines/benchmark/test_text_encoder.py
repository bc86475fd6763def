"""The benchmark of the text encoder, on a tiny network, and the size of the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engines.benchmark import text_encoder
from engines.benchmark.text_encoder import SMALL, Architecture, main, measure, write_random


def test_the_architecture_is_that_of_gemma_2_2b():
    from transformers import Gemma2Config, Gemma2Model

    assert Architecture().parameters == 2_614_341_888
    defaults = Gemma2Config()
    assert {key: getattr(defaults, key) for key in Architecture().config()} == Architecture().config()
    model = Gemma2Model(Gemma2Config(**SMALL.config()))
    shapes = {f"model.{name}": tuple(value.shape) for name, value in model.named_parameters()}
    assert shapes == {name: shape for file in SMALL.files() for name, shape in file.items()}


def test_a_random_model_is_written_and_measured(tmp_path: Path):
    write_random(SMALL, tmp_path)
    stored = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert sum(tensor.numel() for tensors in stored for tensor in tensors.values()) == SMALL.parameters
    measured = measure(tmp_path, "x" * 19, prompts=2)
    assert (measured.prefix_tokens, measured.text_tokens) == (20, 318)
    assert len(measured.seconds) == 2
    assert measured.peak_bytes >= measured.own_bytes > 0


@pytest.mark.slow  # starts a process
def test_the_result_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--small", "--prompts", "1", "--threads", "1", "--directory", str(tmp_path)]
    assert main([*options, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["machine"]["threads"] == 1
    assert report["median_seconds"] == report["seconds"][0]
    assert "further prompts, median" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_too_little_disk_space_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(text_encoder, "_MARGIN", 2**60)
    assert main(["--small", "--directory", str(tmp_path)]) == 2
    assert "of free space" in capsys.readouterr().err
