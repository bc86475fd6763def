"""Ceilings and predicted times of the kernels, and the page that has them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from engines.benchmark.kernels.page import calculated_sections
from engines.benchmark.kernels.steps import TARGETS, attention_ceiling, bases, predicted_step
from engines.benchmark.kernels.times import times
from engines.benchmark.kernels.work import JOINT, MODES, SHAPES, SIZE, all_work, attention_work
from engines.benchmark.predictions import GPUS, decoder_work, find_gpu

PAGE = Path(__file__).parents[3] / "docs" / "measurements" / "kernels.md"
MEASUREMENTS = PAGE.with_name("kernels-h200.json")
BASES = pytest.mark.parametrize("basis", list(bases()), ids=lambda basis: basis.name)


def test_the_page_has_what_the_code_calculates():
    """If it has not, run: python -m engines.benchmark.kernels.page > docs/measurements/kernels.md."""
    assert PAGE.read_text().endswith(calculated_sections())


def test_measured_times_are_those_of_the_measurements():
    found = {f"{float(number):#.3g}" for number in re.findall(r"\d+\.\d+", MEASUREMENTS.read_text())}
    table = calculated_sections().split("### H200\n")[1].split("\n###")[0]
    cells = [cell.strip() for row in table.splitlines()[3:] for cell in row.split("|")[-3:-1]]
    times_ms = {cell.split(",")[0] for cell in cells if cell}
    assert len(times_ms) > 10
    assert times_ms <= found


def test_the_attention_of_all_calls_is_that_of_a_step():
    counted = sum(shape.calls * attention_work(shape, MODES[0]).bf16 for shape in SHAPES)
    step = sum(product.flops for product in decoder_work(SIZE, "fp8").step if "attention" in product.kind)
    assert counted == pytest.approx(step, rel=0.01)  # the last block has no queries of the caption


def test_on_hopper_exponentials_need_as_long_as_the_products_of_64_channels_in_bf16():
    work = replace(attention_work(JOINT, MODES[0]), polynomials=0)
    call = times(find_gpu("NVIDIA H100"), work)
    assert call.special == pytest.approx(call.products)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_no_kernel_is_predicted_to_be_faster_than_its_ceiling(gpu):
    for work in all_work():
        assert times(gpu, work).predicted > times(gpu, work).ceiling


@BASES
def test_kernels_make_a_step_faster_and_more_modes_never_slower(basis):
    bf16, fp8 = predicted_step(basis, MODES[:1]), predicted_step(basis, MODES)
    assert fp8.seconds <= bf16.seconds < basis.step
    assert fp8.attention > attention_ceiling(basis.gpu, MODES)


@BASES
def test_the_attention_that_a_target_allows_meets_it(basis):
    step = predicted_step(basis)
    for target in TARGETS.values():
        assert replace(step, attention=step.allowed_attention(target)).decode == pytest.approx(target)
