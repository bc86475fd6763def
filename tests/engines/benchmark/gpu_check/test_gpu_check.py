"""The command line of the GPU check, on a toy network."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.benchmark.gpu_check import __main__ as gpu_check
from engines.benchmark.gpu_check.config import Part
from engines.benchmark.gpu_check.device import find_device_in_fork
from engines.benchmark.gpu_check.findings import Measurement
from engines.benchmark.gpu_check.parts import CALLS, FIRST, PARTS, SECOND
from engines.errors import ConfigError
from engines.runtime import devices
from tests.engines.benchmark.gpu_check.parts import TOY_RUN, fake_part

# Packages that the project needs elsewhere, but that a rented machine may not have.
SERVER_PACKAGES = ("fastapi", "uvicorn", "httpx", "pynvml", "psutil", "numba", "PIL", "prometheus_client")


def run(folder: Path, *arguments: str, parts: tuple[Part, ...] = PARTS) -> tuple[int, dict]:
    code = gpu_check.main(["--out", str(folder), *TOY_RUN, *arguments], {"first": parts})
    return code, json.loads((folder / "gpu_check.json").read_text())


def run_without(folder: Path, packages: tuple[str, ...], *arguments: str) -> dict:
    """Run the program as if some packages were not installed, and return the parts of its report."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
        "from engines.benchmark.gpu_check.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "--out", str(folder), *TOY_RUN, "--in-process", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "gpu_check.json").read_text())["parts"]


@pytest.mark.slow
def test_every_part_except_the_server_runs_without_the_packages_of_the_server(tmp_path: Path):
    parts = run_without(tmp_path, SERVER_PACKAGES)
    assert list(parts) == [part.name for part in PARTS]
    skipped = {name for name, part in parts.items() if part["status"] == "skipped"}
    assert skipped == {"tests", "kernels", "attention", "tensorrt", "published-compiled", "server"}
    assert {part["status"] for name, part in parts.items() if name not in skipped} == {"done"}
    assert "--carry" in parts["server"]["rows"][0]["skipped"]

    assert {row["result"] for row in parts["contract"]["rows"]} == {"passed"}
    assert len(parts["parity"]["rows"]) == 14
    for name, shapes in {
        "bf16": [("bf16", "64x64", 1), ("bf16", "64x64", 2)],
        "fp8": [("fp8", "64x64", 1), ("fp8", "64x64", 2)],
        "large": [("fp8", "64x96", 1), ("bf16", "64x96", 1)],
        "small": [("fp8", "32x32", 1), ("bf16", "32x32", 1)],
        "batches": [("fp8", "64x64", 2), ("fp8", "64x64", 4)],
    }.items():
        rows = [row for row in parts[name]["rows"] if "size" in row]
        assert [(row["precision"], row["size"], row["batch"]) for row in rows] == shapes
        assert all(row["step ms"] > 0 and row["images/s"] > 0 for row in rows)
    for precision in ("fp8", "bf16"):
        assert len([row for row in parts["profile"]["rows"] if row.get("precision") == precision]) == 20
    assert any("time over published" in row.get("note", "") for row in parts["eager"]["rows"])

    text = (tmp_path / "gpu_check.md").read_text()
    assert "this only shows that every part runs" in text
    assert "| precision | size | batch | condition ms | step ms |" in text


def test_without_pydantic_the_parts_that_need_it_are_skipped(tmp_path: Path):
    parts = run_without(tmp_path, ("pydantic",), "--parts", "machine", "bf16", "server")
    assert {name: part["status"] for name, part in parts.items()} == {
        "machine": "done",
        "bf16": "skipped",
        "server": "skipped",
    }
    assert parts["bf16"]["rows"][0]["skipped"].startswith("needs pydantic; ")


def test_the_short_command_is_an_alias(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("engines.gpu_check", run_name="__main__")
    assert exit_.value.code == 0
    assert "usage: python -m engines.benchmark.gpu_check" in capsys.readouterr().out


def test_the_calls_have_the_times_that_the_help_names():
    assert {name: sum(part.seconds for part in parts) for name, parts in CALLS.items()} == {
        "first": 420,
        "second": 500,
        "third": 150,
    }


def test_each_call_runs_its_parts(tmp_path: Path):
    calls = {"first": [fake_part("a")], "second": [fake_part("b")], "third": [fake_part("c")]}
    for call, names in (("--first", ["a"]), ("--second", ["a", "b"]), ("--third", ["a", "b", "c"])):
        assert gpu_check.main(["--out", str(tmp_path), *TOY_RUN, "--in-process", call], calls) == 0
        assert list(json.loads((tmp_path / "gpu_check.json").read_text())["parts"]) == names


def test_the_most_important_parts_come_first():
    assert [part.name for part in FIRST][3:] == ["fp8", "bf16", "published-compiled", "profile"]
    assert SECOND[0].name == "kernels"


def test_a_later_report_keeps_the_parts_of_an_earlier_one(tmp_path: Path):
    parts = (fake_part("first", Measurement({"a": 1})), fake_part("second", Measurement({"b": 2})))
    for name in ("first", "second"):
        code, written = run(tmp_path, "--in-process", "--parts", name, parts=parts)
        assert code == 0
    assert {name: part["rows"] for name, part in written["parts"].items()} == {
        "first": [{"a": 1}],
        "second": [{"b": 2}],
    }
    assert (tmp_path / "gpu_check.md").read_text().index("## First") < 1000


def test_a_new_result_replaces_that_of_an_earlier_report(tmp_path: Path):
    for value in (1, 2):
        _, written = run(tmp_path, "--in-process", parts=(fake_part("part", Measurement({"a": value})),))
    assert written["parts"]["part"]["rows"] == [{"a": 2}]


def test_reports_of_two_machines_are_merged_without_running_anything(tmp_path: Path):
    parts = (fake_part("one", Measurement({"a": 1})), fake_part("two", Measurement({"b": 2})))
    for name, commit in (("one", "1111111"), ("two", "2222222")):
        run(tmp_path / name, "--in-process", "--parts", name, "--commit", commit, parts=parts)
    files = [str(tmp_path / name / "gpu_check.json") for name in ("one", "two")]
    code, written = run(tmp_path / "both", "--merge", *files, parts=parts)
    assert code == 0
    assert {name: part["origin"]["commit"] for name, part in written["parts"].items()} == {
        "one": "1111111",
        "two": "2222222",
    }
    text = (tmp_path / "both" / "gpu_check.md").read_text()
    assert "machine 1: " in text
    assert " on machine 2." in text


def test_merging_needs_no_device_and_keeps_the_network_of_the_reports(tmp_path: Path):
    _, written = run(tmp_path / "toy", "--in-process", parts=(fake_part("one", Measurement({"a": 1})),))
    file = tmp_path / "full.json"
    file.write_text(json.dumps(written | {"network": "full, random weights"}))
    arguments = ["--out", str(tmp_path / "out"), "--device", "cuda", "--merge", str(file)]
    assert gpu_check.main(arguments, {"first": (fake_part("one"),)}) == 0
    assert json.loads((tmp_path / "out" / "gpu_check.json").read_text())["network"] == "full, random weights"
    assert "network: full, random weights" in (tmp_path / "out" / "gpu_check.md").read_text()


def test_reports_about_different_networks_cannot_be_merged(tmp_path: Path, capsys):
    parts = (fake_part("one", Measurement({"a": 1})),)
    _, written = run(tmp_path / "toy", "--in-process", parts=parts)
    full = tmp_path / "full.json"
    full.write_text(json.dumps(written | {"network": "full, random weights"}))
    toy = str(tmp_path / "toy" / "gpu_check.json")
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--merge", toy, str(full)], {"first": parts}) == 2
    assert f"{full} cannot be merged: it is about full, random weights / toy" in capsys.readouterr().err
    with_run = ["--out", str(tmp_path / "out"), *TOY_RUN, "--in-process", "--parts", "one", "--merge", str(full)]
    assert gpu_check.main(with_run, {"first": parts}) == 2
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_reports_cannot_be_merged(tmp_path: Path, capsys):
    file = tmp_path / "other.json"
    file.write_text("[]")
    assert gpu_check.main(["--out", str(tmp_path / "out"), *TOY_RUN, "--merge", str(file)]) == 2
    assert f"{file} is not a report that can be merged" in capsys.readouterr().err
    file.unlink()
    assert gpu_check.main(["--out", str(tmp_path / "out"), *TOY_RUN, "--merge", str(file)]) == 2
    assert f"Cannot read the report {file}: No such file or directory." in capsys.readouterr().err


def test_a_run_leaves_at_most_three_files(tmp_path: Path):
    run(tmp_path, "--parts", "attention", "tests")
    assert {path.name for path in tmp_path.iterdir()} <= {"gpu_check.json", "gpu_check.md", "gpu_check.log"}


def test_an_interrupted_run_prints_the_directory_of_its_results(tmp_path: Path, capsys):
    interrupted = {"first": [fake_part("part", error=KeyboardInterrupt())]}
    assert gpu_check.main(["--out", str(tmp_path), *TOY_RUN, "--in-process"], interrupted) == 130
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


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--device", "cuda", "--small"], "no GPU here"), (["--device", "cpu"], "--small")]
)
def test_options_that_need_another_device_are_rejected(tmp_path: Path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(devices, "cuda_problem", lambda index, system: "there is no GPU here")
    assert gpu_check.main(["--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_directory_of_the_report_is_required(capsys):
    with pytest.raises(SystemExit) as exit_:
        gpu_check.main(TOY_RUN)
    assert exit_.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_a_directory_that_cannot_be_created_is_one_message(tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    assert gpu_check.main(["--out", str(tmp_path / "file" / "out"), *TOY_RUN, "--parts", "attention"]) == 2
    assert "Cannot create the --out directory" in capsys.readouterr().err


def test_a_device_that_hangs_or_kills_its_process_is_one_message(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(devices, "cuda_problem", lambda index, system: os._exit(1))
    assert gpu_check.main(["--out", str(tmp_path), "--device", "cuda"]) == 2
    assert "The process that tested the device cuda died." in capsys.readouterr().err
    monkeypatch.setattr(devices, "cuda_problem", lambda index, system: time.sleep(600))
    with pytest.raises(ConfigError, match="did not respond within 1 s"):
        find_device_in_fork("cuda", seconds=1)
