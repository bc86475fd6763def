"""Sections of the HTML report on quantisation: images, what was tried, and the errors and precisions of the layers."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from pathlib import Path

from engines.compile.choose_attention import describe_attention
from engines.compile.compare_images import SAVED_IMAGES, image_files
from engines.compile.html_table import Bar, table
from engines.compile.results import AttentionResult, LayerResult, QuantisationResult
from engines.compile.sensitivity_plot import NAMES, sensitivity_plot, worst_error


def quantisation_sections(quantisation: QuantisationResult, images: Path) -> Iterator[str]:
    """Yield the sections; `images` is the directory with the `image_files` of the quantisation stage."""
    yield from _images(quantisation, images)
    yield from _attention_candidates(quantisation)
    yield from _mixtures(quantisation)
    yield from _layers(quantisation)


def _images(quantisation: QuantisationResult, folder: Path) -> Iterator[str]:
    yield "<h2>Images: original, quantised, tenfold difference</h2><div class='images'>"
    for index, image in enumerate(quantisation.pictures[:SAVED_IMAGES]):
        captions = (f"{image.source}, sigma {image.sigma:g}", f"{image.psnr:.1f} dB", "difference × 10")
        for name, caption in zip(image_files(index), captions, strict=True):
            data = base64.b64encode((folder / name).read_bytes()).decode()
            alt = escape(caption)
            yield f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{alt}</figcaption></figure>'
    yield "</div>"


def _attention_candidates(quantisation: QuantisationResult) -> Iterator[str]:
    yield "<h2>FP8 attention: what was tried with all layers in FP8, and the last one chosen</h2>"
    rows = [
        (describe_attention(candidate.kinds), f"{max(candidate.velocity_error):.1e}", f"{candidate.image_psnr:.1f} dB")
        for candidate in quantisation.candidates
    ]
    yield table(("", "velocity error", "mean PSNR against the original"), rows)


def _mixtures(quantisation: QuantisationResult) -> Iterator[str]:
    yield "<h2>Precisions of the layers: what was tried with this attention</h2>"
    layers = sum(layer.fp8_error is not None for layer in quantisation.layers)
    rows = [
        (
            str(mixture.fp4_layers),
            str(mixture.fp8_layers),
            str(layers - mixture.fp4_layers - mixture.fp8_layers),
            f"{mixture.fp4_share:.1%}",
            f"{mixture.image_psnr:.2f} dB",
            "chosen" if mixture.chosen else "",
        )
        for mixture in quantisation.mixtures
    ]
    head = ("FP4", "FP8", "16 bit", "weights in FP4", "mean PSNR against the original", "")
    yield table(head, rows)


def _layers(quantisation: QuantisationResult) -> Iterator[str]:
    found: tuple[LayerResult | AttentionResult, ...] = (*quantisation.layers, *quantisation.attentions)
    found = tuple(sorted(found, key=worst_error, reverse=True))
    yield "<h2>Errors of the velocity with one layer or attention quantised</h2>"
    worst = max(map(worst_error, found), default=0.0)
    if worst > 0:
        yield sensitivity_plot(found)
    for precision, name in NAMES.items():
        members = [result for result in found if result.precision == precision]
        if not members:
            continue
        yield f"<h2>{len(members)} layers and attentions in {name}</h2>"
        rows = [
            (
                result.name,
                *_error_cells(result.fp4_error, worst),
                *_error_cells(result.fp8_error, worst),
                result.largest_text,
                result.reason,
            )
            for result in members
        ]
        yield table(("layer", "error in FP4", "", "error in FP8", "", "largest input", "why"), rows)


def _error_cells(error: float | None, worst: float) -> tuple[str, str | Bar]:
    return ("", "") if error is None else (f"{error:.1e}", Bar(error / (worst or 1.0)))
