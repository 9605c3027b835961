"""The pictures of docs/explanation that are drawn by calling the operators, when the documentation is built."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from dcn_kernels import deform_conv2d, deform_conv2d_backward

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOOK = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "dcn-kernels"}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def make(folder: Path) -> None:
    """All of them, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (borders, corners):
        with plt.style.context(LOOK):
            figure = draw()
            figure.savefig(folder / f"{draw.__name__}.svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)


def borders() -> plt.Figure:
    """What is read along a row of five pixels, and the derivative, under each rule."""
    row = np.array([2.0, 1.0, 2.5, 1.5, 3.0])
    places = np.round(np.arange(-2.5, 7, 0.01) + 0.005, 3)  # none of them on a pixel
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.2), sharex=True, sharey="row", layout="constrained")
    for column, border in enumerate(("zeros", "msra", "edge")):
        value, slope = _read(row, places, border)
        above, below = axes[:, column]
        above.plot(places, value, color=BLUE)
        above.plot(range(5), row, "o", color="black", markersize=5, zorder=3)
        below.plot(places, slope, color=ORANGE, linewidth=1.2)
        above.set_title(f'border="{border}"', loc="left", fontweight="bold")
        below.set_xlabel("position, pixels")
        for axis in (above, below):
            axis.axvspan(-0.5, 4.5, color=GREY, alpha=0.15, linewidth=0)
            axis.axhline(0, color=GREY, linewidth=0.8)
    axes[0, 0].set_ylabel("value read")
    axes[1, 0].set_ylabel("its derivative")
    return figure


def _read(row: np.ndarray, places: np.ndarray, border: str) -> tuple[np.ndarray, np.ndarray]:
    """A 1x1 convolution whose tap goes to these places of an image of one row; rows above and below are as it is."""
    count = len(places)
    offset = np.zeros((count, 2, 3, 5))
    offset[:, 1, 1, 0] = places  # of the middle row's first pixel
    images = np.broadcast_to(row, (count, 1, 3, 5)).copy()
    one = np.ones((1, 1, 1, 1))
    value = deform_conv2d(images, offset, one, border=border)[:, 0, 1, 0]
    ones = np.ones((count, 1, 3, 5))
    slope = deform_conv2d_backward(ones, images, offset, one, border=border, wrt="offset")["offset"][:, 1, 1, 0]
    return value, slope


def corners() -> plt.Figure:
    """A position between four pixels and its weights."""
    figure, axis = plt.subplots(figsize=(4.4, 3.4), layout="constrained")
    y, x = 1.3, 1.6
    for row in range(3):
        for column in range(4):
            weight = max(0, 1 - abs(row - y)) * max(0, 1 - abs(column - x))
            axis.plot(column, row, "s", markersize=20, color=BLUE if weight else "#DDDDDD", alpha=0.25 + 0.75 * weight)
            if weight:
                axis.plot([column, x], [row, y], ":", color=GREY, linewidth=1)
                axis.annotate(f"{weight:.2f}", (column, row), (0, 14 if row == 2 else -20), ha="center",
                              textcoords="offset points")  # fmt: skip
    axis.plot(x, y, "X", color=ORANGE, markersize=12, markeredgecolor="black")
    axis.set(xlim=(-0.5, 3.5), ylim=(2.6, -0.5), xticks=range(4), yticks=range(3), aspect="equal")
    axis.set_title("position (1.3, 1.6) and the weights of its corners", fontsize=10, loc="left")
    return figure
