"""The parts of the GPU check, on the CPU with toy networks, and with stand-ins for what only a GPU has."""

import importlib
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from engines.benchmark.gpu_check import (
    bundles,
    checks,
    kernels,
    marked_tests,
    parity,
    profile,
    reference,
    rows,
    serving,
    speed,
)
from engines.benchmark.gpu_check.config import Part
from engines.benchmark.gpu_check.findings import Failed, Measurement, Result, Skipped
from engines.benchmark.gpu_check.parts import PARTS, run_lazily
from engines.benchmark.gpu_check.programs import run_program
from engines.benchmark.gpu_check.report import summary
from engines.benchmark.gpu_check.rows import StageTimes
from engines.benchmark.predictions import Prediction
from engines.compile.inputs.random_weights import random_decoder
from engines.errors import ConfigError, DeviceMemoryError
from engines.pid import fold
from engines.pid.fp4 import Fp4Linear
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.pid.toy import TOY
from engines.runtime import tensorrt_runtime
from engines.runtime.kernels import operations
from engines.runtime.kernels.attention import KERNELS
from engines.runtime.tensorrt_runtime import Machine
from tests.engines.benchmark.gpu_check.parts import CONFIG, failures, measured, notes
from tests.engines.runtime.fake_tensorrt import VERSION, engine_bundle, fake_tensorrt
from tests.waiting import until


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_packages_that_a_part_requires_are_installed_here(part: Part):
    for module in part.requires:
        assert importlib.import_module(module)


def test_a_part_is_imported_when_it_runs():
    with pytest.raises(ModuleNotFoundError):
        next(run_lazily("no_such_module.function")(CONFIG))
    assert isinstance(next(run_lazily("machine.device_properties")(CONFIG)), Measurement)


def test_a_runtime_that_decodes_wrongly_fails_the_contract():
    wrong = {"wrong": lambda runtime, decoder: "off by 3 levels of 255"}
    result = Result.of(list(checks.check_contract(CONFIG, wrong)), 1.0)
    assert summary(result) == "failed, 1.0 s: wrong: off by 3 levels of 255"


@pytest.mark.parametrize(
    ("supported", "factor", "passes"), [(True, 1.0, True), (True, 1.05, False), (False, 1.05, True)]
)
def test_an_fp4_product_is_compared_if_the_device_has_one(
    supported: bool, factor: float, passes: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checks, "has_fp4_products", lambda _device: supported)
    monkeypatch.setattr(Fp4Linear, "multiply", lambda layer, x: factor * layer.emulate(x))
    only = {"product": checks.CHECKS["an FP4 layer multiplies its rounded operands"]}
    found = list(checks.check_contract(CONFIG, only))
    assert any(isinstance(finding, Failed) for finding in found) != passes


def test_errors_beyond_the_tolerance_fail_parity():
    row, failure = (finding for finding, _ in zip(parity.compare_vectors(CONFIG, 1e-9), range(2), strict=False))
    assert isinstance(row, Measurement)
    assert isinstance(failure, Failed)
    assert "exceeds 1e-09" in failure.text


def test_nan_in_the_image_alone_fails_parity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parity, "relative_errors", lambda case, decoder: {"adapter0": 0.0, "image": math.nan})
    _, failure = (finding for finding, _ in zip(parity.compare_vectors(CONFIG), range(2), strict=False))
    assert isinstance(failure, Failed)
    assert "error nan exceeds" in failure.text


def test_parity_without_vectors_is_skipped_with_instructions(tmp_path: Path):
    (finding,) = parity.compare_vectors(replace(CONFIG, vectors=tmp_path))
    assert isinstance(finding, Skipped)
    assert str(tmp_path) in finding.text
    assert "--vectors DIR" in finding.text


class TestRows:
    def test_the_first_row_is_measured_and_those_that_would_exceed_the_deadline_are_left_out(self):
        findings = list(speed.decode_bf16(replace(CONFIG, deadline=0.0)))
        assert [(row["size"], row["batch"]) for row in measured(findings)] == [("64x64", 1)]
        assert notes(findings)[0].startswith("bf16, 64x64 in batches of 2 left out")

    def test_the_second_precision_is_left_out_if_the_first_used_up_the_time(self):
        for part in (speed.decode_large, profile.slowest_kernels):
            findings = list(part(replace(CONFIG, deadline=0.0)))
            assert {row["precision"] for row in measured(findings)} == {"fp8"}
            assert notes(findings)[-1].startswith("bf16 left out")

    def test_fp8_reports_its_error_against_bf16(self):
        findings = list(speed.decode_fp8(CONFIG))
        assert [row["batch"] for row in measured(findings)] == [1, 2]
        assert "relative error" in notes(findings)[1]
        assert not failures(findings)

    def test_an_fp8_network_that_computes_something_else_fails(self, monkeypatch):
        monkeypatch.setattr(speed, "MAX_FP8_ERROR", 1e-9)
        assert any("FP8 error" in failure for failure in failures(list(speed.decode_fp8(CONFIG))))

    def test_rows_that_do_not_fit_into_memory_are_noted(self, monkeypatch):
        def no_memory(*arguments):
            raise DeviceMemoryError("none")

        monkeypatch.setattr(speed, "measure_row", no_memory)
        findings = list(speed.decode_small(CONFIG))
        assert notes(findings) == [
            "fp8, 32x32 in batches of 1: out of memory",
            "bf16, 32x32 in batches of 1: out of memory",
        ]

    def test_memory_that_an_earlier_row_left_behind_is_a_failure(self, monkeypatch):
        times = StageTimes(1, {"condition": 0.1, "step": 0.2, "finish": 0.1})
        for before, failed in ((300, False), (400, True)):
            columns = {"reserved before MiB": before, "weights MiB": 100}
            monkeypatch.setattr(speed, "measure_row", lambda *_, columns=columns: rows.Row(times, 0.0, columns))
            assert bool(failures(list(speed.decode_small(CONFIG)))) == failed

    def test_a_row_has_the_predicted_times_and_the_ratios_to_them(self):
        times = StageTimes(2, {"condition": 0.1, "step": 0.4, "finish": 0.05})
        assert times.compared_with(Prediction(condition=0.1, step=0.1)) == {
            "predicted step ms": 200.0,
            "step / predicted": 2.0,
            "predicted decode ms": 1000.0,
            "decode / predicted": 1.9,
        }

    def test_devices_without_a_prediction_have_no_such_columns(self):
        assert StageTimes(1, {"condition": 0.1, "step": 0.2, "finish": 0.1}).compared_with(None) == {}
        assert rows.find_prediction(CONFIG, CONFIG.main_size, "bf16") is None


class TestMarkedTests:
    @pytest.fixture
    def tests(self, tmp_path: Path) -> Path:
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
        (tmp_path / "test_some.py").write_text(
            "import pytest\n"
            "@pytest.mark.gpu\ndef test_that_passes(): pass\n"
            "@pytest.mark.gpu\ndef test_that_fails(): assert 1 == 2\n"
            "@pytest.mark.gpu\ndef test_that_skips(): pytest.skip('not here')\n"
            "def test_without_the_mark(): assert False\n"
        )
        (tmp_path / "test_other.py").write_text("import no_such_package\n")
        return tmp_path

    def test_outcomes_are_counted_and_failures_named(self, tests: Path):
        findings = list(marked_tests.run_marked_tests(CONFIG, tests))
        assert measured(findings) == [{"passed": 1, "failure": 1, "error": 1, "skipped": 1}]
        assert failures(findings) == ["test_some.py::test_that_fails: assert 1 == 2"]
        (note,) = notes(findings)
        assert note.startswith("left out: test_other")
        assert "no_such_package" in note

    def test_if_a_test_hangs_it_is_named_in_the_log_and_those_before_it_count(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
        (tmp_path / "test_one.py").write_text(
            "import pathlib, pytest, time\n"
            "@pytest.mark.gpu\ndef test_that_passes(): pass\n"
            "@pytest.mark.gpu\ndef test_that_hangs(): pathlib.Path('started').touch(); time.sleep(600)\n"
        )
        monkeypatch.chdir(tmp_path)

        def stop_when_started(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> None:
            with subprocess.Popen(command, env=environment) as process:
                until((tmp_path / "started").exists)
                process.kill()

        monkeypatch.setattr(marked_tests, "run_program", stop_when_started)
        findings = list(marked_tests.run_marked_tests(CONFIG, tmp_path))
        assert measured(findings) == [{"passed": 1, "failure": 0, "error": 0, "skipped": 0}]
        assert "stopped for lack of time" in notes(findings)[0]
        assert "test_that_hangs" in capfd.readouterr().out

    def test_a_slow_test_is_in_the_log_but_continues(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\nfaulthandler_exit_on_timeout = true\n")
        (tmp_path / "test_one.py").write_text(
            "import pytest, time\n@pytest.mark.gpu\ndef test_that_is_slow(): time.sleep(0.5)\n"
        )
        monkeypatch.setattr(marked_tests, "HANG_SECONDS", 0.1)
        findings = list(marked_tests.run_marked_tests(CONFIG, tmp_path))
        assert measured(findings) == [{"passed": 1, "failure": 0, "error": 0, "skipped": 0}]
        assert "in test_that_is_slow" in capfd.readouterr().err

    def test_a_run_that_breaks_is_a_failure(self, tmp_path: Path):
        (tmp_path / "conftest.py").write_text("import os\nos._exit(7)\n")
        findings = list(marked_tests.run_marked_tests(CONFIG, tmp_path))
        assert failures(findings) == ["pytest exited with status 7; the log names the last test"]

    def test_a_program_that_exceeds_its_time_is_stopped(self):
        assert run_program([sys.executable, "-S", "-c", "import time; time.sleep(600)"], 0.2) is None

    def test_the_exit_status_of_a_program_is_returned(self):
        assert run_program([sys.executable, "-S", "-c", "raise SystemExit(3)"], math.inf) == 3

    def test_outside_a_checkout_they_are_skipped(self, tmp_path: Path):
        (finding,) = marked_tests.run_marked_tests(CONFIG, tmp_path / "none")
        assert isinstance(finding, Skipped)


@pytest.mark.slow
class TestServer:
    def test_it_is_started_asked_and_put_under_load(self):
        findings = list(serving.measure_server(replace(CONFIG, deadline=time.monotonic() + 600)))
        values = {row["property"]: row["value"] for row in measured(findings)}
        assert not failures(findings)
        assert values["start until ready, with the warm-up, s"] > 0
        assert values["the same, fastest of 5, ms"] > 0
        assert values["memory of cpu, used, after the requests, MiB"] > 0
        assert values["load test: on time"] == values["load test, 3 s: requests sent"] > 0

    def test_one_that_is_not_ready_in_time_is_reported(self):
        with pytest.raises(ConfigError, match="not ready in time"):
            list(serving.measure_server(replace(CONFIG, deadline=0.0)))


class TestCudaOnlyParts:
    """Parts that run on CUDA only, with stand-ins, so that their first run on a GPU is not their first run at all."""

    def test_attention_is_measured_at_the_main_size_first(self):
        found = measured(list(kernels.attention_kernels(CONFIG, timer=lambda work: 0.002)))
        measured_shapes = list(dict.fromkeys((row["operation"], row["shape"].split()[0]) for row in found))
        assert measured_shapes == [
            (f"{kind} attention", str(tokens + (12 if kind == "joint" else 0)))
            for tokens in (16, 4, 24)
            for kind in ("joint", "pixel")
        ]

    def test_every_implementation_of_every_operation_is_measured(self, monkeypatch):
        monkeypatch.setattr(operations, "has_fp8_products", lambda device: True)
        found = measured(list(kernels.all_kernels(CONFIG, timer=lambda work: 0.002)))
        implementations = {(row["operation"], row["implementation"]) for row in found}
        assert implementations >= {
            ("FP8 product", "fast"),
            ("FP8 product", "slow accumulation"),
            ("adapter", "NCHW"),
            ("adapter", "NHWC"),
        }
        timed = [row for row in found if row["ms"] is not None]
        assert all(float(row["error"]) < 0.02 for row in timed)
        assert {row["of ceiling"][-1] for row in timed} == {"%"}
        assert {row["implementation"] for row in found} - {row["implementation"] for row in timed} == set(KERNELS)

    def test_the_reference_is_decoded_with_torch_compile(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        (row,) = measured(list(reference.decode_reference(CONFIG)))
        assert row["decode ms"] > 0

    def test_a_profiler_that_records_nothing_is_reported(self, monkeypatch):
        class Nothing:
            def __init__(self, activities):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def key_averages(self):
                return []

        monkeypatch.setattr(profile, "profile", Nothing)
        findings = list(profile.slowest_kernels(CONFIG))
        assert [type(finding) for finding in findings] == [Skipped, Skipped]
        assert "no kernels" in findings[0].text

    def test_every_size_and_batch_of_a_bundle_is_decoded(self, monkeypatch, tmp_path: Path):
        tensorrt = fake_tensorrt(fold(random_decoder(TOY.config, 0), MODEL_TIMESTEPS))
        bundle = engine_bundle(tmp_path / "toy", batch=2, network=TOY.config, sizes=TOY.sizes)
        here = Machine("a GPU", (12, 0), "580.95.05")
        monkeypatch.setattr(Machine, "of", lambda device: here)
        monkeypatch.setattr(tensorrt_runtime, "import_package", lambda package: tensorrt)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        findings = list(bundles.decode_with_engines(replace(CONFIG, bundle=bundle.path)))
        shapes = [(row["size"], row["batch"]) for row in measured(findings)]
        assert shapes == [(size, batch) for size in ("64x64", "64x96") for batch in (1, 2)]
        assert notes(findings)[0] == f"tiny, fp32, tensorrt-rtx {VERSION}"
