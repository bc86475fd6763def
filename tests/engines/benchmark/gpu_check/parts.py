"""Parts without a GPU, and access to their findings."""

from collections.abc import Iterator, Mapping

import torch

from engines.benchmark.gpu_check.config import Part, RunConfig
from engines.benchmark.gpu_check.findings import Failed, Finding, Measurement, Note, Result, Value

TOY_RUN = ["--device", "cpu", "--small"]
CONFIG = RunConfig(torch.device("cpu"), small=True)


def fake_part(name: str, *findings: Finding, error: BaseException | None = None, **fields) -> Part:
    def run_part(config: RunConfig) -> Iterator[Finding]:
        yield from findings
        if error is not None:
            raise error

    return Part(name, name.capitalize(), 100, run_part, **fields)


def ignore(result: Result) -> None:
    """Publish nothing."""


def measured(findings: list[Finding]) -> list[Mapping[str, Value]]:
    return [finding.values for finding in findings if isinstance(finding, Measurement)]


def notes(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings if isinstance(finding, Note)]


def failures(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings if isinstance(finding, Failed)]
