"""The picture of a region's bins, moved by their offsets (`dcn-bench sampling`, Fig. 7); needs matplotlib."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from dcn_kernels.deformation.picture import faint, smaller
from dcn_kernels.deformation.roi_bins import deform_roi_bins

_REGION, _PLAIN, _MOVED = ("#E69F00", 2.5, "-"), ("#303030", 1.0, ":"), ("#0072B2", 1.6, "-")  # colour, width, dashes

SYNTHETIC = "synthetic offsets, not of a trained network"
DEMO = (
    f"{SYNTHETIC}: bins of two regions drawn towards the face, by a third of the way; 3x3 bins on a map of stride 16; "
    "the photograph is matplotlib's grace_hopper.jpg"
)


def demo() -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(photograph, rois, offset, spatial_scale) of the demonstration; `DEMO` says what it shows."""
    import matplotlib.cbook
    import matplotlib.image

    photograph = matplotlib.image.imread(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    rois, scale, gamma, face = np.array([[0, 130, 60, 400, 400], [0, 60, 300, 340, 580.0]]), 1 / 16, 0.1, (240, 270)
    plain = deform_roi_bins(rois, output_size=3, spatial_scale=scale, convention="rfcn")
    y, x = ((plain[..., 1] + plain[..., 3]) / 2, (plain[..., 0] + plain[..., 2]) / 2)
    sizes = (rois[:, 3:] - rois[:, 1:3] + 1) * scale
    pulls = [
        (face[1] * scale - 0.5 - x) / sizes[:, 0, None, None],
        (face[0] * scale - 0.5 - y) / sizes[:, 1, None, None],
    ]
    return photograph, rois, np.stack(pulls, 1) / 3 / gamma, scale


def moved(plain: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """How far the centre of each bin (..., 4) moves, in pixels of the map.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels.deformation.bins_picture import moved
    >>> moved(np.array([0.0, 0, 2, 2]), np.array([3.0, 4, 5, 6]))
    array(5.)
    """
    return np.asarray(np.hypot(bins[..., 0] - plain[..., 0], bins[..., 1] - plain[..., 1]))


def draw(*arguments: Any, kind: str, **more: Any) -> bytes:
    """The picture that `compose` makes of the same arguments, as a "png", "svg" or "pdf" file."""
    buffer = io.BytesIO()
    compose(*arguments, **more).savefig(buffer, format=kind, dpi=100)
    return smaller(buffer) if kind == "png" else buffer.getvalue()


def compose(
    rois: np.ndarray,
    plain: np.ndarray,
    bins: np.ndarray,
    photograph: np.ndarray | None,
    spatial_scale: float,
    *,
    caption: str = "",
) -> Any:
    """A matplotlib figure, 800 pixels wide: a panel for each region with its plain and its moved bins.

    Parameters
    ----------
    rois : array (R, 5)
        In image coordinates.
    plain, bins : arrays (R, PH, PW, 4)
        As `deform_roi_bins` gives them, without and with offsets.
    photograph : array (h, w), (h, w, 3) or (h, w, 4), optional
        The whole image, drawn faintly. None: an empty frame around all bins.
    spatial_scale : float
        Pixels of the map for one of the image.
    caption : what is said below the picture
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    def outline(of: np.ndarray, look: tuple[str, float, str]) -> Any:
        (x1, y1, x2, y2), (colour, thick, dashes) = of, look
        box = (x1, y1), x2 - x1, y2 - y1
        return Rectangle(*box, fill=False, edgecolor=colour, linewidth=thick, linestyle=dashes)

    def in_image(boxes: np.ndarray) -> np.ndarray:
        return (boxes.reshape(-1, 4) + 0.5) / spatial_scale

    across = min(len(rois), 2)
    down = -(-len(rois) // across)
    edges = in_image(np.concatenate([plain, bins]))
    edges = edges[np.isfinite(edges).all(axis=1)]
    if photograph is not None:
        height, width = photograph.shape[:2]
        edges = np.concatenate([edges, [[0, 0, width, height]]])
    left, top = edges[:, :2].min(axis=0, initial=np.inf)
    right, bottom = edges[:, 2:].max(axis=0, initial=-np.inf)
    panel = 7.9 / across * (bottom - top) / (right - left) + 0.3
    figure = Figure(figsize=(8, 0.45 + (0.2 if caption else 0) + down * panel), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for number, axis in enumerate(axes.flat[: len(rois)]):
        if photograph is not None:
            axis.imshow(faint(photograph), extent=(0, width, height, 0))
        axis.add_patch(outline(rois[number, 1:], _REGION))
        before, after = in_image(plain[number]), in_image(bins[number])
        for boxes, look in ((before, _PLAIN), (after, _MOVED)):
            for box in boxes:
                axis.add_patch(outline(box, look))
        for old, new in zip(before, after, strict=True):
            centres = [(box[:2] + box[2:]) / 2 for box in (new, old)]
            if np.isfinite(centres).all():
                axis.annotate("", *centres, arrowprops={"arrowstyle": "->", "color": _MOVED[0], "linewidth": 0.9})
        axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
        axis.set_title(f"region {number}: {plain.shape[1]}x{plain.shape[2]} bins", fontsize=10, loc="left")
    for axis in axes.flat[len(rois) :]:
        axis.set_axis_off()
    handles = [outline(np.array([0, 0, 1, 1]), look) for look in (_REGION, _PLAIN, _MOVED)]
    figure.legend(handles, ["region", "bins without offsets", "bins moved by their offsets"], ncols=3, frameon=False,
                  loc="outside lower center", fontsize=10, title=caption, title_fontsize=10)  # fmt: skip
    return figure
