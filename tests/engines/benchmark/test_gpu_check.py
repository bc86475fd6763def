"""The GPU check as a whole, on toys: every part runs, what fails is told, and what takes too long ends."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from engines.benchmark.gpu_check import __main__ as gpu_check
from engines.benchmark.gpu_check import checks, speed
from engines.benchmark.gpu_check.report import Result, render, summary
from engines.benchmark.gpu_check.setting import Part, Row, Setting
from engines.compile.load import random_decoder
from engines.pid import fold
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.pid.toy import TOY
from engines.runtime import tensorrt_runtime, torch_runtime
from engines.runtime.tensorrt_runtime import Machine
from tests.engines.runtime.fake_tensorrt import VERSION, engine_bundle, fake_tensorrt

# Of what the project needs elsewhere; a machine with a GPU for an hour has none of it.
MISSING = ("fastapi", "uvicorn", "httpx", "pynvml", "psutil", "numba", "PIL", "prometheus_client", "pydantic_settings")
TOYS = ["--device", "cpu", "--small"]


def run(folder: Path, *arguments: str) -> tuple[int, dict]:
    code = gpu_check.main(["--out", str(folder), *TOYS, *arguments])
    return code, json.loads((folder / "gpu_check.json").read_text())


def test_all_of_it_runs_with_torch_numpy_safetensors_and_pydantic_alone(tmp_path: Path):
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({MISSING}))\n"
        "from engines.benchmark.gpu_check.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--out", str(tmp_path), *TOYS, "--in-process"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(parts) == [part.name for part in gpu_check.PARTS]
    skipped = {name for name, part in parts.items() if part["status"] == "skipped"}
    assert skipped <= {"attention", "tensorrt", "compiled", "published-compiled"}
    assert {part["status"] for name, part in parts.items() if name not in skipped} == {"done"}

    assert {row["result"] for row in parts["contract"]["rows"]} == {"yes"}
    assert len(parts["parity"]["rows"]) == 14
    for precision in ("bf16", "fp8"):
        measured = [(row["size"], row["batch"]) for row in parts[precision]["rows"] if "size" in row]
        assert measured == [(size, batch) for size in ("32x32", "64x64", "64x96") for batch in (1, 2)]
    slowest = [row for row in parts["profile"]["rows"] if row.get("precision") == "fp8"]
    assert len(slowest) == 20
    assert any("note" in row and "time over published" in row["note"] for row in parts["published"]["rows"])

    text = (tmp_path / "gpu_check.md").read_text()
    assert "this shows that all of it runs, nothing else" in text
    assert "| size | batch | condition ms | step ms |" in text


def test_a_part_has_a_process_of_its_own(tmp_path: Path):
    code, written = run(tmp_path, "--parts", "attention")
    assert code == 0
    assert written["parts"]["attention"]["status"] == "skipped"
    assert "CUDA only" in written["parts"]["attention"]["rows"][0]["skipped"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.md"]


def test_what_does_not_end_in_its_time_is_ended_and_told(tmp_path: Path):
    code, written = run(tmp_path, "--parts", "contract", "parity", "--seconds", "0.5")
    assert code == 0
    assert [part["status"] for part in written["parts"].values()] == ["out of time"] * 2
    assert "out of time" in (tmp_path / "gpu_check.md").read_text()


def test_an_interruption_ends_in_a_sentence(tmp_path: Path, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "_in_process", interrupt)
    assert gpu_check.main(["--out", str(tmp_path), *TOYS, "--in-process"]) == 130
    assert str(tmp_path) in capsys.readouterr().err


def fake(name: str, *rows: Row, error: Exception | None = None) -> Part:
    def parts(setting: Setting) -> Iterator[Row]:
        yield from rows
        if error is not None:
            raise error

    return Part(name, name.capitalize(), 100, parts)


def test_what_breaks_is_a_finding_and_the_rest_goes_on(tmp_path: Path, monkeypatch):
    broken = fake(
        "broken", {"size": "64x64", "step ms": 1.5}, error=RuntimeError("CUDA error: misaligned address\nmore")
    )
    monkeypatch.setattr(gpu_check, "PARTS", (broken, fake("next", {"check": "it", "result": "yes"})))
    code, written = run(tmp_path, "--in-process")
    assert code == 1
    assert written["parts"]["broken"]["rows"] == [
        {"size": "64x64", "step ms": 1.5},
        {"failed": "RuntimeError: CUDA error: misaligned address"},
    ]
    assert written["parts"]["next"]["status"] == "done"


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    code, written = run(tmp_path, "--parts", "contract")
    assert code == 1
    assert "ended with 1" in written["parts"]["contract"]["rows"][0]["failed"]


def test_a_runtime_that_decodes_wrongly_fails_the_contract(monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", {"wrong": lambda runtime, decoder: "off by 3 levels of 255"})
    result = Result.of(list(checks.contract(Setting(torch.device("cpu"), small=True))), 1.0)
    assert summary(result) == "failed, 1.0 s: wrong: off by 3 levels of 255"


def test_errors_beyond_the_tolerance_fail_parity(monkeypatch):
    monkeypatch.setattr(checks, "DEVICE_TOLERANCE", 1e-9)
    first = next(checks.published(Setting(torch.device("cpu"), small=True)))
    assert "over 1e-09" in first["failed"]


def test_without_a_checkout_parity_says_what_is_missing(tmp_path: Path):
    (row,) = checks.published(Setting(torch.device("cpu"), small=True), tmp_path)
    assert str(tmp_path) in row["skipped"]


def test_sizes_that_would_not_be_done_in_time_are_left_out_and_told():
    rows = list(speed.decode_bf16(Setting(torch.device("cpu"), small=True, seconds=0)))
    assert [row["note"].partition(":")[0] for row in rows] == [
        f"{size} in batches of {batch} left out" for size in ("32x32", "64x64", "64x96") for batch in (1, 2)
    ]


class TestOnCudaAlone:
    """Parts that only CUDA runs, here on stand-ins, so that the first run on a GPU is not the first of all."""

    SETTING = Setting(torch.device("cpu"), small=True)

    def test_attention(self, monkeypatch):
        monkeypatch.setattr(speed, "cuda_seconds", lambda work: 0.002)
        rows = list(speed.attention(self.SETTING))
        assert [(row["size"], row["attention"]) for row in rows] == [
            (size, kind) for size in ("32x32", "64x64", "64x96") for kind in ("joint", "pixel")
        ]
        assert {(row["flash ms"], row["cuDNN ms"], row["fastest"]) for row in rows} == {(2.0, None, "flash")}

    def test_compiled(self, monkeypatch):
        monkeypatch.setattr(torch_runtime, "BACKEND", "eager")
        rows = list(speed.compiled(self.SETTING))
        assert [row["precision"] for row in rows] == ["bf16", "fp8"]
        assert all(row["step ms"] > 0 for row in rows)

    def test_published_compiled(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        (row,) = speed.published_compiled(self.SETTING)
        assert row["decode ms"] > 0

    def test_engines_of_a_bundle(self, monkeypatch, tmp_path: Path):
        tensorrt = fake_tensorrt(fold(random_decoder(TOY.config, 0), MODEL_TIMESTEPS))
        bundle = engine_bundle(tmp_path / "toy", batch=2, network=TOY.config, sizes=TOY.sizes)
        here = Machine("a GPU", (12, 0), "580.95.05")
        monkeypatch.setattr(Machine, "of", lambda device: here)
        monkeypatch.setattr(tensorrt_runtime, "find", lambda package: tensorrt)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        rows = list(speed.tensorrt(replace(self.SETTING, bundle=bundle.path)))
        measured = [(row["size"], row["batch"]) for row in rows if "size" in row]
        assert measured == [(size, batch) for size in ("64x64", "64x96") for batch in (1, 2)]
        assert rows[0]["note"] == f"tiny, fp32, tensorrt-rtx {VERSION}"


def test_the_report_has_a_column_for_whatever_a_row_has():
    part = fake("speed")
    result = Result.of([{"a": 1, "note": "first"}, {"b": 1234.5, "c": None}, {"note": "second"}], 2.0)
    text = render({"measured": "today"}, [part], {"speed": result})
    assert "| a | b | c |\n| --- | --- | --- |\n| 1 |  |  |\n|  | 1,234 |  |\n" in text
    assert text.endswith("- first\n- second\n")


@pytest.mark.parametrize(
    ("arguments", "told"), [(["--device", "cuda", "--small"], "no CUDA"), (["--device", "cpu"], "--small")]
)
def test_what_cannot_be_run_is_refused_in_a_sentence(tmp_path: Path, capsys, monkeypatch, arguments, told: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path), *arguments]) == 2
    assert told in capsys.readouterr().err
