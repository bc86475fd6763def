"""The GPU check on a toy network: every part runs, failures are reported, and parts that take too long are stopped."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from engines.benchmark.gpu_check import __main__ as gpu_check
from engines.benchmark.gpu_check import checks, kernels, parity, speed
from engines.benchmark.gpu_check.config import Part, RunConfig
from engines.benchmark.gpu_check.findings import (
    Failed,
    Finding,
    Measurement,
    Note,
    Result,
    Skipped,
    Value,
    from_row,
    to_row,
)
from engines.benchmark.gpu_check.parts import PARTS
from engines.benchmark.gpu_check.report import render, summary
from engines.benchmark.gpu_check.runner import IsolatedRunner, run_in_process, run_parts
from engines.compile.inputs.random_weights import random_decoder
from engines.pid import fold
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.pid.toy import TOY
from engines.runtime import devices, tensorrt_runtime, torch_runtime
from engines.runtime.tensorrt_runtime import Machine
from tests.engines.runtime.fake_tensorrt import VERSION, engine_bundle, fake_tensorrt

# Packages that the project needs elsewhere, but that a rented GPU machine may not have.
MISSING = ("fastapi", "uvicorn", "httpx", "pynvml", "psutil", "numba", "PIL", "prometheus_client")
TOY_RUN = ["--device", "cpu", "--small"]
CONFIG = RunConfig(torch.device("cpu"), small=True)


def run(folder: Path, *arguments: str, parts: tuple[Part, ...] = PARTS) -> tuple[int, dict]:
    code = gpu_check.main(["--out", str(folder), *TOY_RUN, *arguments], parts)
    return code, json.loads((folder / "gpu_check.json").read_text())


def fake_part(name: str, *findings: Finding, error: BaseException | None = None) -> Part:
    def run_part(config: RunConfig) -> Iterator[Finding]:
        yield from findings
        if error is not None:
            raise error

    return Part(name, name.capitalize(), 100, run_part)


def measured(findings: list[Finding]) -> list[Mapping[str, Value]]:
    return [finding.values for finding in findings if isinstance(finding, Measurement)]


def notes(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings if isinstance(finding, Note)]


@pytest.mark.slow
def test_every_part_runs_with_torch_numpy_safetensors_and_pydantic_alone(tmp_path: Path):
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({MISSING}))\n"
        "from engines.benchmark.gpu_check.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "--out", str(tmp_path), *TOY_RUN, "--in-process"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(parts) == [part.name for part in PARTS]
    skipped = {name for name, part in parts.items() if part["status"] == "skipped"}
    assert skipped <= {"attention", "tensorrt", "compiled", "published-compiled"}
    assert {part["status"] for name, part in parts.items() if name not in skipped} == {"done"}

    assert {row["result"] for row in parts["contract"]["rows"]} == {"passed"}
    assert len(parts["parity"]["rows"]) == 14
    for precision in ("bf16", "fp8"):
        rows = [(row["size"], row["batch"]) for row in parts[precision]["rows"] if "size" in row]
        assert rows == [(size, batch) for size in ("32x32", "64x64", "64x96") for batch in (1, 2)]
    slowest = [row for row in parts["profile"]["rows"] if row.get("precision") == "fp8"]
    assert len(slowest) == 20
    assert any("note" in row and "time over published" in row["note"] for row in parts["published"]["rows"])

    text = (tmp_path / "gpu_check.md").read_text()
    assert "this only shows that every part runs" in text
    assert "| size | batch | condition ms | step ms |" in text


def test_the_short_command_is_an_alias(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("engines.gpu_check", run_name="__main__")
    assert exit_.value.code == 0
    assert "usage: python -m engines.benchmark.gpu_check" in capsys.readouterr().out


class TestIsolatedParts:
    """Child processes run a small script, because importing torch takes seconds."""

    def child(self, folder: Path, script: str) -> IsolatedRunner:
        path = folder / "child.py"
        path.write_text(f"import json, sys, time\nrows = sys.argv[sys.argv.index('--child') + 2]\n{script}\n")
        return IsolatedRunner(folder, [sys.executable, "-S", str(path)])

    def test_findings_come_from_a_child_process(self, tmp_path: Path):
        script = """open(rows, 'a').write('{"a": 1}\\n{"note": "text"}\\n{"unfini')"""
        result = self.child(tmp_path, script)(fake_part("part"), CONFIG, 60)
        assert (result.status, result.findings) == ("done", (Measurement({"a": 1}), Note("text")))
        assert not (tmp_path / "part.log").exists()

    @pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, bundle=Path("b"), vectors=Path("v"))])
    def test_a_child_gets_the_options_of_its_parent(self, tmp_path: Path, config: RunConfig):
        arguments = tmp_path / "arguments.json"
        runner = self.child(tmp_path, f"json.dump(sys.argv[1:], open({str(arguments)!r}, 'w'))")
        runner(fake_part("part"), config, 60)
        received: list[RunConfig] = []

        def receive(config: RunConfig) -> Iterator[Finding]:
            received.append(config)
            yield Note("received")

        rows = tmp_path / "rows"
        command = json.loads(arguments.read_text())
        command[command.index("--child") + 2] = str(rows)  # the parent has removed its own file
        assert gpu_check.main(command, (Part("part", "Part", 1, receive),)) == 0
        assert rows.read_text() == '{"note": "received"}\n'
        assert 0 < received[0].seconds_left <= 60
        assert replace(received[0], deadline=config.deadline) == config

    def test_a_part_that_exceeds_its_time_is_stopped(self, tmp_path: Path):
        script = """open(rows, 'a').write('{"a": 1}\\n'); time.sleep(600)"""
        result = self.child(tmp_path, script)(fake_part("part"), CONFIG, 1.0)
        assert result.status == "out of time"
        assert result.findings in ((), (Measurement({"a": 1}),))  # a slow machine may not get so far in a second

    def test_a_process_that_dies_is_a_failure(self, tmp_path: Path):
        runner = self.child(tmp_path, "sys.stderr.write('out of memory'); sys.exit(1)")
        result = runner(fake_part("part"), CONFIG, 60)
        assert result.status == "failed"
        assert result.findings == (Failed("the process exited with status 1, see part.log"),)
        assert (tmp_path / "part.log").read_text() == "out of memory"


def test_no_part_starts_when_the_time_is_used_up(tmp_path: Path):
    def never(part: Part, config: RunConfig, seconds: float) -> Result:
        raise AssertionError

    results = run_parts([fake_part("first"), fake_part("second")], CONFIG, tmp_path, 0.0, never)
    assert [result.status for result in results.values()] == ["out of time"] * 2
    assert "out of time" in (tmp_path / "gpu_check.md").read_text()


def test_unused_time_goes_to_later_parts(tmp_path: Path):
    limits: list[float] = []

    def quick(part: Part, config: RunConfig, seconds: float) -> Result:
        limits.append(seconds)
        return Result("done", 0.0)

    run_parts([fake_part("first"), fake_part("second")], CONFIG, tmp_path, 1000.0, quick)
    assert limits == pytest.approx([500, 1000], abs=50)


def test_parts_that_need_cuda_are_skipped_elsewhere(tmp_path: Path):
    code, written = run(tmp_path, "--parts", "attention", "--in-process")
    assert code == 0
    assert written["parts"]["attention"]["status"] == "skipped"
    assert "CUDA only" in written["parts"]["attention"]["rows"][0]["skipped"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.md"]


def test_an_interrupted_run_prints_the_directory_of_its_results(tmp_path: Path, capsys):
    interrupted = fake_part("part", error=KeyboardInterrupt())
    assert gpu_check.main(["--out", str(tmp_path), *TOY_RUN, "--in-process"], (interrupted,)) == 130
    assert str(tmp_path) in capsys.readouterr().err


def test_a_part_that_raises_fails_and_the_next_one_runs(tmp_path: Path):
    error = RuntimeError("CUDA error: misaligned address\nmore")
    broken = fake_part("broken", Measurement({"size": "64x64", "step ms": 1.5}), error=error)
    following = fake_part("next", Measurement({"check": "it", "result": "passed"}))
    code, written = run(tmp_path, "--in-process", parts=(broken, following))
    assert code == 1
    assert written["parts"]["broken"]["rows"] == [
        {"size": "64x64", "step ms": 1.5},
        {"failed": "RuntimeError: CUDA error: misaligned address"},
    ]
    assert written["parts"]["next"]["status"] == "done"


def test_a_runtime_that_decodes_wrongly_fails_the_contract():
    wrong = {"wrong": lambda runtime, decoder: "off by 3 levels of 255"}
    result = Result.of(list(checks.check_contract(CONFIG, wrong)), 1.0)
    assert summary(result) == "failed, 1.0 s: wrong: off by 3 levels of 255"


def test_errors_beyond_the_tolerance_fail_parity():
    row, failure = (finding for finding, _ in zip(parity.compare_vectors(CONFIG, 1e-9), range(2), strict=False))
    assert isinstance(row, Measurement)
    assert isinstance(failure, Failed)
    assert "exceeds 1e-09" in failure.text


def test_parity_without_vectors_is_skipped_with_instructions(tmp_path: Path):
    (finding,) = parity.compare_vectors(replace(CONFIG, vectors=tmp_path))
    assert isinstance(finding, Skipped)
    assert str(tmp_path) in finding.text
    assert "--vectors DIR" in finding.text


def test_sizes_that_would_exceed_the_deadline_are_left_out_with_a_note():
    findings = list(speed.decode_bf16(replace(CONFIG, deadline=0.0)))
    assert [note.partition(":")[0] for note in notes(findings)] == [
        f"{size} in batches of {batch} left out" for size in ("32x32", "64x64", "64x96") for batch in (1, 2)
    ]


def test_fp8_is_measured_at_every_size_and_batch():
    findings = list(speed.decode_fp8(CONFIG))
    rows = measured(findings)
    assert [(row["size"], row["batch"]) for row in rows] == [
        (size, batch) for size in ("32x32", "64x64", "64x96") for batch in (1, 2)
    ]
    assert all(row["step ms"] > 0 and row["images/s"] > 0 for row in rows)
    assert not any(isinstance(finding, Failed) for finding in findings)
    assert "relative error" in notes(findings)[1]


class TestCudaOnlyParts:
    """Parts that run on CUDA only, with stand-ins, so that their first run on a GPU is not their first run at all."""

    def test_every_attention_kernel_is_timed(self):
        rows = measured(list(kernels.attention_kernels(CONFIG, timer=lambda work: 0.002)))
        assert [(row["size"], row["attention"]) for row in rows] == [
            (size, kind) for size in ("32x32", "64x64", "64x96") for kind in ("joint", "pixel")
        ]
        assert {(row["flash ms"], row["cuDNN ms"], row["fastest"]) for row in rows} == {(2.0, None, "flash")}

    def test_both_precisions_are_decoded_with_torch_compile(self, monkeypatch):
        monkeypatch.setattr(torch_runtime, "COMPILE_BACKEND", "eager")
        rows = measured(list(speed.decode_compiled(CONFIG)))
        assert [row["precision"] for row in rows] == ["bf16", "fp8"]
        assert all(row["step ms"] > 0 for row in rows)

    def test_the_reference_is_decoded_with_torch_compile(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        (row,) = measured(list(speed.decode_reference_compiled(CONFIG)))
        assert row["decode ms"] > 0

    def test_every_size_and_batch_of_a_bundle_is_decoded(self, monkeypatch, tmp_path: Path):
        tensorrt = fake_tensorrt(fold(random_decoder(TOY.config, 0), MODEL_TIMESTEPS))
        bundle = engine_bundle(tmp_path / "toy", batch=2, network=TOY.config, sizes=TOY.sizes)
        here = Machine("a GPU", (12, 0), "580.95.05")
        monkeypatch.setattr(Machine, "of", lambda device: here)
        monkeypatch.setattr(tensorrt_runtime, "import_package", lambda package: tensorrt)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        findings = list(speed.decode_with_engines(replace(CONFIG, bundle=bundle.path)))
        rows = [(row["size"], row["batch"]) for row in measured(findings)]
        assert rows == [(size, batch) for size in ("64x64", "64x96") for batch in (1, 2)]
        assert notes(findings)[0] == f"tiny, fp32, tensorrt-rtx {VERSION}"


def test_the_report_has_one_column_per_measured_value():
    findings = [Measurement({"a": 1}), Note("first"), Measurement({"b": 1234.5, "c": None}), Note("second")]
    text = render({"measured": "today"}, [fake_part("speed")], {"speed": Result.of(findings, 2.0)})
    assert "| a | b | c |\n| --- | --- | --- |\n| 1 |  |  |\n|  | 1,234 |  |\n" in text
    assert text.endswith("- first\n- second\n")


@pytest.mark.parametrize("finding", [Measurement({"a": 1, "b": None}), Note("n"), Skipped("s"), Failed("f")])
def test_findings_survive_json(finding: Finding):
    assert from_row(json.loads(json.dumps(to_row(finding)))) == finding


@pytest.mark.parametrize(
    ("findings", "status"),
    [
        ([], "done"),
        ([Measurement({}), Note("n")], "done"),
        ([Skipped("s"), Note("n")], "skipped"),
        ([Failed("f"), Skipped("s")], "failed"),
    ],
)
def test_the_worst_finding_decides_the_status(findings: list[Finding], status: str):
    assert Result.of(findings, 0.0).status == status


def test_a_part_in_this_process_gets_its_deadline():
    def left(config: RunConfig) -> Iterator[Finding]:
        yield Measurement({"left": config.seconds_left})

    (row,) = measured(list(run_in_process(Part("part", "Part", 1, left), CONFIG, 30).findings))
    assert 0 < row["left"] <= 30


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--device", "cuda", "--small"], "no GPU here"), (["--device", "cpu"], "--small")]
)
def test_options_that_need_another_device_are_rejected(tmp_path: Path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(devices, "cuda_problem", lambda index, system: "there is no GPU here")
    assert gpu_check.main(["--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
