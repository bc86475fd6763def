"""Human-readable results of a build: a text summary, and an HTML page with errors, timings and images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from html import escape
from pathlib import Path

from engines.bundle import Bundle
from engines.compile.choose_attention import describe_attention
from engines.compile.choose_layers import describe_layers
from engines.compile.html_table import table
from engines.compile.planning.layer_rules import attention_kind, rule_for
from engines.compile.report_quantisation import quantisation_sections
from engines.compile.results import BuildReport
from engines.manifest import Manifest

REPORT_JSON, REPORT_HTML = "report.json", "report.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; white-space: nowrap }
.table { overflow-x: auto }
.prose td:last-child { white-space: normal }
th { border-bottom: 1px solid #999; font-weight: 600 }
.bar { background: #4878a8; height: .7rem; display: inline-block }
.warning { background: #fff3cd; padding: .4rem .8rem; margin: .3rem 0 }
.images { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem }
figure { margin: 0 } img { width: 100% }
figcaption { color: #555; font-size: .85rem }
"""


def format_summary(bundle: Bundle, report: BuildReport) -> str:
    """Format the most important results as text, one per line."""
    manifest, network = bundle.manifest, report.network
    total = sum(entry.bytes for entry in manifest.files.values())
    live_bytes = network.live_parameters * (4 if manifest.precision == "fp32" else 2)
    verification, quantisation = manifest.verification, manifest.quantisation
    lines = [
        f"bundle      {bundle.path}, {total / 1e9:.3f} GB",
        f"decoder     {manifest.decoder} for {manifest.latent_space.name} latents, {manifest.precision}",
        f"parameters  {network.live_parameters:,}, after folding {network.folded_parameters:,}: "
        f"{1 - network.folded_bytes / live_bytes:.0%} fewer weight bytes",
        f"sizes       {', '.join(map(str, manifest.sizes))} (HEIGHTxWIDTH), batches of up to {manifest.max_batch}",
        f"error       {verification.max_velocity_error:.1e} from folding, {verification.precision_error:.1e} in "
        f"{manifest.precision} (relative, of the velocity)",
    ]
    if quantisation is not None:
        layers = describe_layers(quantisation.fp4_layers, quantisation.layers - quantisation.fp4_layers)
        quality = f"{quantisation.image_psnr:.1f} dB, calibrated with {quantisation.calibration}"
        lines.append(f"quantised   {layers}, {describe_attention(quantisation.attention)}, {quality}")
    lines += (
        f"engine      {engine.graph}, {engine.bytes / 1e6:,.1f} MB, "
        f"compiled with {report.compiler} in {engine.seconds:.1f} s"
        for engine in report.engines
    )
    lines += (f"warning     {warning}" for warning in manifest.warnings)
    return "\n".join((*lines, f"licence     {manifest.licence}"))


def write_html(path: Path, manifest: Manifest, report: BuildReport, images: Path) -> None:
    """Write the HTML page.

    Args:
        path: The file to write.
        manifest: Manifest of the bundle.
        report: Results of the build.
        images: Directory with the `image_files` of the quantisation stage.
    """
    parts = [
        f"<h1>{escape(manifest.decoder)} for {escape(manifest.target)}, {manifest.precision}</h1>",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in manifest.warnings),
        _overview(manifest, report),
        *_checks(report),
        *_engines(report),
    ]
    quantisation = report.network.quantisation
    if quantisation is not None:
        parts += quantisation_sections(quantisation, images)
    body = "\n".join(parts)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(manifest.decoder)}</title><style>{_STYLE}</style><body>{body}</body></html>\n",
        encoding="utf-8",
    )


def _overview(manifest: Manifest, report: BuildReport) -> str:
    network, verification, quantisation = report.network, manifest.verification, report.network.quantisation
    quantised_rows = []
    if quantisation is not None:
        quantised_rows = [
            ("calibration", quantisation.calibration),
            ("quantised against original", f"{quantisation.mean_psnr:.1f} dB, mean PSNR of the calibration images"),
            ("layers", describe_layers(quantisation.mixture.fp4_layers, quantisation.mixture.fp8_layers)),
            ("attention", describe_attention(quantisation.attention)),
        ]
    rows = [
        ("sizes", ", ".join(f"{height}×{width}" for height, width in manifest.sizes)),
        ("maximum batch", str(manifest.max_batch)),
        ("parameters", f"{network.live_parameters:,}, after folding {network.folded_parameters:,}"),
        ("weights", f"{network.folded_bytes / 1e9:.3f} GB"),
        ("weights from", f"{manifest.origin.kind} {manifest.origin.file or ''}"),
        ("error from folding", f"{verification.max_velocity_error:.1e} (relative, of the velocity)"),
        (f"error in {manifest.precision}", f"{verification.precision_error:.1e} (relative, of the velocity)"),
        *quantised_rows,
        ("built", f"{manifest.created:%Y-%m-%d %H:%M} UTC, {report.compiler or 'nothing compiled'}"),
        ("licence", manifest.licence),
    ]
    return table(None, rows)


def _checks(report: BuildReport) -> Iterable[str]:
    kinds = report.network.quantisation.kinds if report.network.quantisation else ()
    if report.checks or kinds:
        yield "<h2>Exported graphs, ONNX Runtime against PyTorch</h2>"
        rows = [
            (check.what, f"{max(check.velocity_error):.1e}", f"{check.tolerance:.1e}", f"{check.image_psnr:.0f} dB")
            for check in (*report.checks, *kinds)
        ]
        yield table(("", "velocity error", "limit", "image PSNR"), rows)


def _engines(report: BuildReport) -> Iterable[str]:
    if report.engines:
        yield "<h2>Engines</h2>"
        exports = {
            export.graph: (f"{export.bytes / 1e6:,.0f} MB", f"{export.seconds:.0f} s") for export in report.exports
        }
        rows = [
            (
                engine.graph,
                *exports.get(engine.graph, ("not exported", "")),
                f"{engine.bytes / 1e6:,.0f} MB",
                f"{engine.seconds:.0f} s",
            )
            for engine in report.engines
        ]
        yield table(("", "ONNX", "export", "engine", "compilation"), rows)
        yield from _attention_kernels(report)
        yield from _fp4_weights(report)
    if report.device is not None:
        yield f"<h2>On {escape(report.device.device)}</h2>"
        found = report.device
        measured = [
            (size, f"{max(found.velocity_error[size]):.1e}", f"{found.image_psnr[size]:.1f} dB", f"{ms:.1f}")
            for size, ms in found.milliseconds.items()
        ]
        yield table(("", "velocity error against PyTorch", "image PSNR", "ms per decode"), measured)
        fused = "is" if found.fused_attention else "is NOT"
        yield f"<p>Attention {fused} a single fused kernel.</p>"


def _attention_kernels(report: BuildReport) -> Iterable[str]:
    """Compare the requested precision of the attentions with the kernels in the engines, counted per profile."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for attention in (attention for engine in report.engines for attention in engine.attentions):
        requested = "FP8" if attention.fp8 else "16 bit"
        for kernel in attention.kernels or ("not recognised",):
            counts[f"{attention_kind(attention.name)} blocks", requested, kernel] += 1
    if counts:
        yield "<h2>Attention kernels, read from the engines</h2>"
        rows = [(*key, str(count)) for key, count in counts.items()]
        yield table(("", "requested", "found", "number, of all profiles together"), rows)


def _fp4_weights(report: BuildReport) -> Iterable[str]:
    """Sum the sizes of the FP4 weights in the engines by the rule of their layers."""
    layers: defaultdict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for product in (product for engine in report.engines for product in engine.fp4_products):
        layer = product.name.split()[0]  # a layer of the pixel blocks has a product per chunk, with the same weight
        found = "read from the engine" if product.recognised else "not recognised in the engine"
        layers[rule_for(layer).pattern, found][layer] = product.bytes
    if layers:
        yield "<h2>FP4 weights, without their scales</h2>"
        rows = [
            (pattern, str(len(sizes)), f"{sum(sizes.values()) / 1e6:,.1f} MB", found)
            for (pattern, found), sizes in layers.items()
        ]
        yield table(("", "layers", "4 bits per weight", ""), rows)
