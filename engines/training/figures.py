"""Figures of training and evaluation, as PNG files: sheets of images and loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engines.pixels import to_uint8


def save_sheet(rows: Sequence[Tensor], path: Path) -> None:
    """Save rows of images, each [B, 3, H, W] in [-1, 1], one below the other."""
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Image.fromarray(to_uint8(sheet.cpu()).movedim(0, -1).numpy()).save(path)


def save_loss_curves(losses: Sequence[dict[str, float]], path: Path) -> None:
    """Plot one panel per loss over the steps that report it, raw and smoothed."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for step in losses for name in step))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.5), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        points = np.array([(i, step[name]) for i, step in enumerate(losses) if name in step])  # [steps, 2]
        width = max(1, len(points) // 100)
        means = points[: len(points) // width * width].reshape(-1, width, 2).mean(axis=1)
        axis.plot(*points.T, color="0.85", linewidth=0.5)
        axis.plot(*means.T, color="C0")
        axis.set(title=name, xlabel="step", ylim=(None, np.quantile(points[:, 1], 0.99)))
    figure.savefig(path, dpi=80)
    plt.close(figure)
