"""Figures of training and evaluation, as PNG files: sheets of images and loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engines.pixels import to_uint8

PANEL, MARGIN = np.array((360, 200)), np.array((64, 40))  # size of the plot in a panel, and the space around it
GREY, LIGHT, BLUE = "#555555", "#d8d8d8", "#1f77b4"
POINTS = 100  # of the smoothed curve
FINER = 3  # curves are drawn at this multiple of their size and averaged, which smooths their edges


def save_sheet(rows: Sequence[Tensor], path: Path) -> None:
    """Save rows of images, each [B, 3, H, W] in [-1, 1], one below the other."""
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Image.fromarray(to_uint8(sheet.cpu()).movedim(0, -1).numpy()).save(path)


def save_loss_curves(losses: Sequence[dict[str, float]], path: Path) -> None:
    """Plot one panel per loss over the steps that report it, raw and smoothed."""
    names = list(dict.fromkeys(name for step in losses for name in step))
    width, height = PANEL + 2 * MARGIN
    figure = Image.new("RGB", (width * len(names), height), "white")
    for i, name in enumerate(names):
        points = np.array([(i, step[name]) for i, step in enumerate(losses) if name in step])  # [steps, 2]
        figure.paste(_panel(name, points, len(losses)), (width * i, 0))
    figure.save(path)


def _panel(name: str, points: np.ndarray, steps: int) -> Image.Image:
    """Plot a loss, points [N, 2] of step and value; the highest percent of the values is cut off."""
    low, high = points[:, 1].min(), np.quantile(points[:, 1], 0.99)
    size = FINER * PANEL
    scale = size / (max(1, steps - 1), max(high - low, 1e-6))
    plot = Image.new("RGB", tuple(size), "white")
    window = max(1, len(points) // POINTS)
    means = points[: len(points) // window * window].reshape(-1, window, 2).mean(axis=1)
    for curve, colour, width in ((points, LIGHT, FINER), (means, BLUE, 2 * FINER)):
        x, y = ((curve - (0, low)) * scale).T
        ImageDraw.Draw(plot).line(np.stack((x, size[1] - y), axis=1).ravel().tolist(), colour, width)
    panel = Image.new("RGB", tuple(PANEL + 2 * MARGIN), "white")
    panel.paste(plot.reduce(FINER), tuple(MARGIN))
    (left, top), (right, bottom) = MARGIN, MARGIN + PANEL
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(13)
    draw.rectangle((left - 1, top - 1, right, bottom), outline=GREY)
    for place, anchor, text in (
        (((left + right) / 2, top - 10), "ms", name),
        ((left - 6, top), "rt", f"{high:.4g}"),
        ((left - 6, bottom), "rb", f"{low:.4g}"),
        ((left, bottom + 6), "lt", "step 0"),
        ((right, bottom + 6), "rt", f"{steps - 1}"),
    ):
        draw.text(place, text, GREY, font, anchor)
    return panel
