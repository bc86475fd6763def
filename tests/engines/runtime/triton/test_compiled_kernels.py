"""All kernels compiled for each architecture, and the page that has their resources."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from engines.benchmark.kernels.cases import Case, cases
from engines.runtime.triton.architectures import Architecture

ROOT = Path(__file__).parents[4]
PAGE = ROOT / "docs" / "measurements" / "kernels.md"
ARCHITECTURES = get_args(Architecture)

SPILLED = {("sm_90", "pixel"): 96}  # bytes of attention; its tiles are the fastest that were measured
SHARED = {"sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024}  # bytes that a program can use
BF16 = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
FP8 = {"sm_90": "QGMMA", "sm_100": "UTCQMMA", "sm_120": "QMMA"}


def compile_all(architecture: Architecture) -> list[list[dict]]:
    """Return the resources of all variants of all cases.

    They are compiled in another process, because the interpreter replaces the compiler in this one.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.engines.runtime.triton.compile_kernels", architecture]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def matrix_instructions(case: Case, architecture: Architecture) -> set[str]:
    if case.work.kernel == "pixel update":  # programs of one warp
        return {"HMMA"}
    return {table[architecture] for table, flops in ((BF16, case.work.bf16), (FP8, case.work.fp8)) if flops}


def allowed_spills(case: Case, architecture: Architecture) -> int:
    block = case.work.variant.split(",")[0]
    return SPILLED.get((architecture, block), 0) if case.work.kernel == "attention" else 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_fit_the_architecture_and_use_its_tensor_cores(architecture: Architecture):
    for case, variants in zip(cases(architecture), compile_all(architecture), strict=True):
        name = f"{case.work}, {case.tiles}"
        for used in variants:
            assert used["spilled"] <= allowed_spills(case, architecture), name
            assert used["shared"] <= SHARED[architecture], name
            assert set(used["matrix_instructions"]) == matrix_instructions(case, architecture), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_page_has_all_kernels_and_tile_sizes(architecture: Architecture):
    """If it has not, run: python -m engines.benchmark.kernels.page > docs/measurements/kernels.md."""
    section = PAGE.read_text().split(f"\n### {architecture}: ")[1].split("\n#")[0]
    rows = [row.split("|")[1:3] for row in section.splitlines() if row.startswith("| ")][2:]
    written = [(kernel.strip(), tiles.strip()) for kernel, tiles in rows]
    assert written == [(str(case.work), case.tiles) for case in cases(architecture)]
