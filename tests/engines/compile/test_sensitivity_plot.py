"""The plot of the errors of layers: valid SVG in which every result has its points, the chosen one filled."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest

from engines.compile.results import AttentionResult, LayerResult
from engines.compile.sensitivity_plot import sensitivity_plot


def layer(name: str, precision: Any, fp8: float | None, fp4: float | None = None) -> LayerResult:
    return LayerResult(name=name, precision=precision, reason="", parameters=1, fp8_error=fp8, fp4_error=fp4)


LAYERS = (
    layer("worst", "16bit", 1e-2, 1e-1),
    layer("middle", "fp8", 1e-3, 1e-2),
    layer("best <&>", "fp4", 1e-4, 1e-3),
    layer("never quantised", "16bit", None),
    AttentionResult(name="attention", precision="fp8", reason="", fp8_error=1e-3),
)


def groups(svg: str) -> dict[str, list[tuple[float, bool]]]:
    """Return the height and the fill of each point, by the name of the result."""
    found = {}
    for group in ElementTree.fromstring(svg).iter("g"):  # noqa: S314  written by this project
        title = group.findtext("title", "")
        circles = [(float(c.attrib["cy"]), c.attrib["fill"] != "#fff") for c in group.iter("circle")]
        found[title.rsplit(": ", 2)[0]] = circles
    return found


def test_every_measured_result_has_its_points_in_the_order_of_the_errors():
    found = groups(sensitivity_plot(LAYERS))
    assert list(found) == ["worst", "middle", "best <&>", "attention"]
    assert [[filled for _, filled in points] for points in found.values()] == [
        [False, False, True],  # FP4, FP8, and 16 bit at the bottom
        [False, True],
        [True, False],
        [True],
    ]
    assert found["middle"][1][0] == found["best <&>"][0][0] == found["attention"][0][0]  # all 1e-3


def test_larger_errors_are_higher():
    points = groups(sensitivity_plot(LAYERS))
    heights = [points["worst"][0], points["worst"][1], points["middle"][1], points["best <&>"][1], points["worst"][2]]
    assert heights == sorted(heights)


@pytest.mark.parametrize("error", [1.0, 1e-3, 0.5])
def test_a_single_error_is_drawn(error: float):
    (points,) = groups(sensitivity_plot([layer("only", "fp8", error)])).values()
    assert all(math.isfinite(height) and 0 < height < 330 for height, _ in points)
