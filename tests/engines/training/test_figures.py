"""Loss curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from engines.training import figures

WIDTH, HEIGHT = figures.PANEL + 2 * figures.MARGIN


def _curve(panel: np.ndarray) -> np.ndarray:
    """Return the mean row of the smoothed curve in each column of the plot, [columns]."""
    left, top = figures.MARGIN
    plot = panel[top : top + figures.PANEL[1], left : left + figures.PANEL[0]].astype(int)
    rows, columns = np.nonzero(np.abs(plot - ImageColor.getrgb(figures.BLUE)).sum(axis=2) < 60)
    return np.array([rows[columns == column].mean() for column in range(5, figures.PANEL[0] - 5)])


def test_each_loss_has_a_panel_with_its_curve(tmp_path: Path) -> None:
    losses = [{"falls": 3 - step / 50, "rises": step / 7} for step in range(100)]
    figures.save_loss_curves(losses, tmp_path / "losses.png")
    pixels = np.asarray(Image.open(tmp_path / "losses.png"))
    assert pixels.shape == (HEIGHT, 2 * WIDTH, 3)
    falls, rises = (_curve(panel) for panel in np.split(pixels, 2, axis=1))
    assert (np.diff(falls) >= 0).all()  # rows are counted from the top
    assert falls[-1] - falls[0] > 0.9 * figures.PANEL[1]
    assert (np.diff(rises) <= 0).all()


def test_losses_that_only_some_steps_report_and_single_steps_can_be_drawn(tmp_path: Path) -> None:
    figures.save_loss_curves([{"a": 1.0}, {"b": 2.0}, {"b": 3.0}], tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").size == (2 * WIDTH, HEIGHT)
