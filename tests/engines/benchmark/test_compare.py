"""The benchmark's command line: a table for people, and a JSON report of fixed form."""

import json
from pathlib import Path

import pytest

from engines.benchmark.__main__ import main
from engines.runtime import devices

PUBLISHED = Path(__file__).parents[3] / "docs" / "measurements" / "flux-2k-1024-cpu.json"
RUN = ["--decoder", "dct-demo", "--random-weights", "--size", "32", "--device", "cpu", "--repeats", "1"]


def keys(value: object) -> object:
    return {name: keys(part) for name, part in value.items()} if isinstance(value, dict) else None


def test_a_report_has_the_form_of_the_committed_one(tmp_path: Path, capsys):
    assert main([*RUN, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert keys(report) == keys(json.loads(PUBLISHED.read_text()))
    assert report["memory_over_decodes"]["decodes"] == 1
    assert report["ratios"]["weight bytes over published"] < 1
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == ["runtime", "reference"]
    assert "lower bound" in table


@pytest.mark.parametrize("flag", ["--skip-reference", "--skip-published"])
def test_the_reference_can_be_skipped(tmp_path: Path, flag: str):
    assert main([*RUN, flag, "--decodes", "3", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert "published" not in report
    assert report["ratios"].keys() == {"decode over floor"}
    assert report["memory_over_decodes"]["decodes"] == 3


def test_each_precision_has_smaller_weights_than_the_one_before(tmp_path: Path):
    sizes = []
    for precision in ("bf16", "fp8", "fp4"):
        path = tmp_path / f"{precision}.json"
        assert main([*RUN, "--skip-reference", "--precision", precision, "--json", str(path)]) == 0
        sizes.append(json.loads(path.read_text())["runtime"]["weight_bytes"])
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_run_without_weights_is_rejected(capsys):
    assert main(["--decoder", "dct-demo"]) == 2
    assert "--checkpoint FILE or --random-weights" in capsys.readouterr().err


def test_a_gpu_that_cuda_cannot_use_is_an_error_unless_a_device_is_named(unusable_gpu: str, capsys):
    position = RUN.index("--device")
    assert main(RUN[:position] + RUN[position + 2 :]) == 2
    assert capsys.readouterr().err.startswith(f"benchmark: {unusable_gpu}")
    assert main([*RUN, "--skip-reference"]) == 0


def test_a_device_that_is_not_available_is_rejected(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "cuda_problem", lambda index, system: "there is no GPU here")
    assert main([*RUN, "--device", "cuda:1"]) == 2
    assert capsys.readouterr().err == "benchmark: The device cuda:1 is not available: there is no GPU here.\n"
