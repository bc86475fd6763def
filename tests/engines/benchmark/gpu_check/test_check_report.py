"""Reports and findings."""

import json
from pathlib import Path

import pytest

from engines.benchmark.gpu_check import report
from engines.benchmark.gpu_check.findings import (
    Failed,
    Finding,
    Measurement,
    Note,
    Result,
    Skipped,
    from_row,
    to_row,
)
from engines.errors import ConfigError
from tests.engines.benchmark.gpu_check.parts import fake_part


def test_the_report_has_one_column_per_measured_value():
    findings = [Measurement({"a": 1}), Note("first"), Measurement({"b": 1234.5, "c": None}), Note("second")]
    text = report.render({"network": "toy"}, [fake_part("speed")], {"speed": Result.of(findings, 2.0)})
    assert "| a | b | c |\n| --- | --- | --- |\n| 1 |  |  |\n|  | 1,234 |  |\n" in text
    assert text.endswith("- first\n- second\n")


def test_a_report_of_one_machine_names_it_once():
    results = {
        name: Result("done", 1.0, origin={"device": "a GPU", "measured": f"{name} o'clock"}) for name in ("one", "two")
    }
    text = report.render({}, [fake_part("one"), fake_part("two")], results)
    assert text.count("a GPU") == 1
    assert "Measured one o'clock." in text
    assert "Measured two o'clock." in text


def test_a_report_can_be_read_again(tmp_path: Path):
    results = {"part": Result("failed", 1.5, (Measurement({"a": 1}), Failed("broken")), {"device": "a GPU"})}
    report.write(tmp_path, {"network": "toy"}, [fake_part("part")], results)
    assert report.read(tmp_path / "gpu_check.json") == ({"network": "toy"}, results)


@pytest.mark.parametrize("text", ["", "{}", '{"parts": {"a": {"status": "done"}}}'])
def test_other_files_cannot_be_read(tmp_path: Path, text: str):
    path = tmp_path / "gpu_check.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a report"):
        report.read(path)


@pytest.mark.parametrize(
    "finding",
    [Measurement({"a": 1, "b": None}), Measurement({"passed": 1, "skipped": 2}), Note("n"), Skipped("s"), Failed("f")],
)
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
