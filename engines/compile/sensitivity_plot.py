"""Plot of the errors that quantising each layer alone causes, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from engines.compile.results import AttentionResult, LayerResult
from engines.manifest import LayerPrecision

Result = LayerResult | AttentionResult
_Scale = Callable[[float], float]  # error -> y
NAMES: dict[LayerPrecision, str] = {"fp4": "FP4", "fp8": "FP8", "16bit": "16 bit"}

_COLOURS: dict[LayerPrecision, str] = {"fp4": "#4878a8", "fp8": "#d9822b", "16bit": "#777"}
_WIDTH, _HEIGHT = 1080, 330  # of the plot, in CSS pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 10, 34, 24  # margins


def worst_error(result: Result) -> float:
    """Return the largest measured error of a layer or an attention; 0 if none was measured."""
    return max(result.fp4_error or 0.0, result.fp8_error or 0.0)


def sensitivity_plot(results: Sequence[Result]) -> str:
    """Draw the errors of layers and attentions in FP4 and FP8 on a logarithmic scale; the chosen one is filled.

    Args:
        results: At least one has an error above 0.
    """
    shown = sorted((result for result in results if worst_error(result) > 0), key=worst_error, reverse=True)
    smallest = min(error for result in shown for error in (result.fp4_error, result.fp8_error) if error)
    low, high = math.floor(math.log10(smallest)), math.ceil(math.log10(worst_error(shown[0])))
    high = max(high, low + 1)

    def y(error: float) -> float:
        position = min(1.0, max(0.0, (math.log10(error) - low) / (high - low))) if error > 0 else 0.0
        return _HEIGHT - _BOTTOM - position * (_HEIGHT - _TOP - _BOTTOM)

    step = (_WIDTH - _LEFT - _RIGHT) / len(shown)
    parts = [*_legend(), *_grid(range(low, high + 1), y(10.0**low), y(10.0**high))]
    for index, result in enumerate(shown):
        parts += _points(result, _LEFT + (index + 0.5) * step, min(4.5, 0.4 * step), y)
    label = "Relative velocity error of each layer alone in FP4 and in FP8, on a logarithmic scale"
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" '
        f'font-size="12" fill="#222">{"".join(parts)}</svg>'
    )


def _points(result: Result, x: float, radius: float, y: _Scale) -> Iterator[str]:
    errors: dict[LayerPrecision, float | None] = {"fp4": result.fp4_error, "fp8": result.fp8_error}
    measured = {precision: error for precision, error in errors.items() if error is not None}
    chosen = NAMES[result.precision]
    text = ", ".join(f"{error:.1e} in {NAMES[precision]}" for precision, error in measured.items())
    yield f"<g><title>{escape(result.name)}: {text}; chosen: {chosen}</title>"
    heights = [y(error) for error in measured.values()]
    yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{max(heights):.1f}" y2="{min(heights):.1f}" stroke="#ccc"/>'
    for precision, error in measured.items():
        yield _circle(x, y(error), radius, precision, filled=precision == result.precision)
    if result.precision == "16bit":
        yield _circle(x, _HEIGHT - _BOTTOM, radius, "16bit", filled=True)
    yield "</g>"


def _legend() -> Iterator[str]:
    for index, (precision, name) in enumerate(NAMES.items()):
        x = _LEFT + 90 * index
        yield _circle(x, 14, 4.5, precision, filled=True)
        yield f'<text x="{x + 10}" y="18">{name}</text>'
    yield f'<text x="{_LEFT + 290}" y="18">filled: the chosen precision; 16 bit has no error</text>'


def _grid(decades: Sequence[int], bottom: float, top: float) -> Iterator[str]:
    for decade in decades:
        y = bottom + (top - bottom) * (decade - decades[0]) / (decades[-1] - decades[0])
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{decade}</text>'
    yield f'<text x="{_LEFT}" y="{_HEIGHT - 4}">layers and attentions, the most sensitive first</text>'


def _circle(x: float, y: float, radius: float, precision: LayerPrecision, filled: bool) -> str:
    colour = _COLOURS[precision]
    fill = colour if filled else "#fff"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" stroke="{colour}"/>'
