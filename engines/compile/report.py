"""A build's findings as one HTML file that a person reads: sizes, precision by layer, errors, timings, pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from engines.compile.results import BuildReport, LayerResult, QuantisationResult
from engines.compile.weights import SHOWN, picture_files
from engines.manifest import Manifest

REPORT_JSON, REPORT_HTML = "report.json", "report.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; white-space: nowrap }
td:last-child { white-space: normal }
th { border-bottom: 1px solid #999; font-weight: 600 }
.bar { background: #4878a8; height: .7rem; display: inline-block }
.warning { background: #fff3cd; padding: .4rem .8rem; margin: .3rem 0 }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem }
figure { margin: 0 } img { width: 100% }
figcaption { color: #555; font-size: .85rem }
"""


def write_html(path: Path, manifest: Manifest, report: BuildReport, pictures: Path) -> None:
    """`pictures` is the folder with the files that `prepare` named."""
    parts = [
        f"<h1>{escape(manifest.decoder)} for {escape(manifest.target)}, {manifest.precision}</h1>",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in manifest.warnings),
        _summary(manifest, report),
        *_checks(report),
        *_compiled(report),
    ]
    quantisation = report.network.quantisation
    if quantisation is not None:
        parts += [*_pictures(quantisation, pictures), *_layers(quantisation)]
    body = "\n".join(parts)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(manifest.decoder)}</title>'
        f"<style>{_STYLE}</style><body>{body}</body></html>\n",
        encoding="utf-8",
    )


def _summary(manifest: Manifest, report: BuildReport) -> str:
    network, verification = report.network, manifest.verification
    rows = [
        ("sizes", ", ".join(f"{height}×{width}" for height, width in manifest.sizes)),
        ("largest batch", str(manifest.max_batch)),
        ("parameters", f"{network.live_parameters:,}, folded {network.folded_parameters:,}"),
        ("weights", f"{network.folded_bytes / 1e9:.3f} GB"),
        ("weights from", f"{manifest.origin.kind} {manifest.origin.file or ''}"),
        ("error from folding", f"{verification.max_velocity_error:.1e} of the velocity, relative"),
        (f"error in {manifest.precision}", f"{verification.precision_error:.1e} of the velocity, relative"),
        ("built", f"{manifest.created:%Y-%m-%d %H:%M} UTC, {report.compiler or 'nothing compiled'}"),
        ("licence", manifest.licence),
    ]
    if network.quantisation is not None:
        rows.insert(7, ("calibration", network.quantisation.calibration))
        psnr = network.quantisation.mean_psnr
        rows.insert(8, ("FP8 against none", f"{psnr:.1f} dB, the mean over the calibration's pictures"))
    return _table(None, rows)


def _checks(report: BuildReport) -> Iterable[str]:
    kinds = report.network.quantisation.kinds if report.network.quantisation else ()
    if report.checks or kinds:
        yield "<h2>Exported graphs, ONNX Runtime against PyTorch</h2>"
        rows = [
            (check.what, f"{max(check.velocity_error):.1e}", f"{check.tolerance:.1e}", f"{check.image_psnr:.0f} dB")
            for check in (*report.checks, *kinds)
        ]
        yield _table(("", "velocity error", "limit", "picture"), rows)


def _compiled(report: BuildReport) -> Iterable[str]:
    if report.engines:
        yield "<h2>Engines</h2>"
        rows = [
            (
                f"{engine.graph} {engine.size[0]}×{engine.size[1]}",
                f"{export.bytes / 1e6:,.0f} MB",
                f"{export.seconds:.0f} s",
                f"{engine.bytes / 1e6:,.0f} MB",
                f"{engine.seconds:.0f} s",
            )
            for engine, export in zip(report.engines, report.exports, strict=True)
        ]
        yield _table(("", "ONNX", "export", "engine", "compilation"), rows)
    if report.device is not None:
        yield f"<h2>On {escape(report.device.device)}</h2>"
        found = report.device
        measured = [
            (size, f"{max(found.velocity_error[size]):.1e}", f"{found.image_psnr[size]:.1f} dB", f"{ms:.1f}")
            for size, ms in found.milliseconds.items()
        ]
        yield _table(("", "velocity error against PyTorch", "picture", "ms a decode"), measured)
        fused = "is" if found.fused_attention else "is NOT"
        yield f"<p>Attention {fused} one fused kernel.</p>"


def _pictures(quantisation: QuantisationResult, folder: Path) -> Iterable[str]:
    yield "<h2>Pictures: without FP8, with FP8, ten times their difference</h2><div class='pictures'>"
    for index, picture in enumerate(quantisation.pictures[:SHOWN]):
        captions = (f"{picture.source}, sigma {picture.sigma:g}", f"{picture.psnr:.1f} dB", "difference × 10")
        for name, caption in zip(picture_files(index), captions, strict=True):
            data = base64.b64encode((folder / name).read_bytes()).decode()
            alt = escape(caption)
            yield f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{alt}</figcaption></figure>'
    yield "</div>"


def _layers(quantisation: QuantisationResult) -> Iterable[str]:
    in_fp8 = sorted((layer for layer in quantisation.layers if layer.fp8), key=_error, reverse=True)
    kept = [layer for layer in quantisation.layers if not layer.fp8]
    worst = _error(in_fp8[0]) if in_fp8 else 0.0
    yield f"<h2>{len(in_fp8)} layers in FP8, by the velocity error that each alone causes</h2>"
    rows = [
        (layer.name, f"{_error(layer):.1e}", _Bar(_error(layer) / worst), f"{layer.largest_input:.3g}", layer.reason)
        for layer in in_fp8
    ]
    yield _table(("layer", "error", "", "largest input", "why in FP8"), rows)
    yield f"<h2>{len(kept)} layers that are not</h2>"
    yield _table(("layer", "why not"), [(layer.name, layer.reason) for layer in kept])


def _error(layer: LayerResult) -> float:
    return layer.velocity_error or 0.0


class _Bar(float):
    """A share of the widest bar."""


def _table(head: Sequence[str] | None, rows: Iterable[Sequence[str | _Bar]]) -> str:
    def cell(value: str | _Bar) -> str:
        if isinstance(value, _Bar):
            return f'<td><span class="bar" style="width:{12 * value:.2f}rem"></span></td>'
        return f"<td>{escape(value)}</td>"

    lines = ["".join(map(cell, row)) for row in rows]
    if head is not None:
        lines.insert(0, "".join(f"<th>{escape(name)}</th>" for name in head))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
