"""The picture of sampling points over an image (`dcn-bench sampling`, Fig. 6 of the paper); needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcn_kernels import samples
from dcn_kernels.deformation import effective_dilation, stacked_sampling_points

# One hue, lighter and smaller downwards, and its opposite for the centre: told apart also by the colour-blind
_SHADES, _CENTRE = ("#08306B", "#1B6CB8", "#38A1EE", "#7CC7F9"), "#F05A00"
_AREAS = (50.0, 20.0, 7.0, 3.0)  # of a point, in square typographic points

DEMO = (
    "smooth synthetic offsets, not of a trained network: three layers of 3x3 filters of dilation 2 on a map of stride "
    "16, wider towards the face and with slow noise; the photograph is matplotlib's grace_hopper.jpg"
)


def demo(seed: int = 0) -> tuple[np.ndarray, list[dict[str, Any]], list[tuple[int, int]]]:
    """(photograph, layers, units) of the demonstration; `DEMO` says what it shows."""
    import matplotlib.cbook
    import matplotlib.image

    photograph = matplotlib.image.imread(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    OH, OW, face = 38, 32, (15, 16)
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:OH, :OW]
    away = ((rows - face[0]) / 8) ** 2 + ((columns - face[1]) / 6) ** 2
    stretch = 0.5 + 1.1 * np.exp(-away / 2)
    taps = np.stack(np.meshgrid([-2, 0, 2], [-2, 0, 2], indexing="ij"), axis=-1).reshape(18, 1, 1)
    layers = []
    for _ in range(3):
        noise = samples.layer_offsets(rng, (1, 18, OH, OW), "smooth", 0.35)
        layers.append(
            {"offset": taps * (stretch - 1) + noise, "kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2}
        )
    return photograph, layers, [face, (7, 26)]


def draw(
    layers: Sequence[Mapping[str, Any]],
    units: Sequence[tuple[int, int]],
    photograph: np.ndarray | None,
    input_size: tuple[int, int],
    kind: str,
    *,
    index: int = 0,
    group: int = 0,
) -> bytes:
    """A picture, 800 pixels wide, of what units sample through the layers: a panel for each unit.

    Parameters
    ----------
    layers : as `stacked_sampling_points` takes them
    units : pairs (oy, ox) of the top layer's output
    photograph : array (h, w), (h, w, 3) or (h, w, 4), optional
        Of the whole input; drawn faintly. None: an empty frame.
    input_size : (H, W)
        Of the lowest layer's input, which the photograph is stretched over.
    kind : {"png", "svg", "pdf"}
    index, group : int
        Which image of the batch, which offset group.

    Raises
    ------
    ValueError
        As `stacked_sampling_points`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    H, W = input_size
    height, width = (H, W) if photograph is None else photograph.shape[:2]
    scale = np.array([height / H, width / W])
    across = min(len(units), 2)
    down = -(-len(units) // across)
    panel = 7.9 / across
    size = (8, 0.42 + down * (panel * height / width + 0.3))
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    handles: dict[tuple[int, str], Any] = {}
    for axis, unit in zip(axes.flat, units, strict=False):
        points = stacked_sampling_points(layers, unit, image=index, group=group)
        if photograph is not None:
            axis.imshow(_faint(photograph), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear")
        for depth, of_layer in list(enumerate(reversed(points)))[::-1]:  # the many of the lowest layer first
            at = of_layer * scale
            shown = np.isfinite(at).all(axis=1)
            label = f"{_ordinal(depth, len(points))}{len(of_layer)} points"
            level = min(depth, len(_SHADES) - 1)
            handles[depth, label] = axis.scatter(
                at[shown, 1], at[shown, 0], _AREAS[level], _SHADES[level],
                edgecolors="white" if depth == 0 else "none", linewidths=0.6, zorder=3 + len(points) - depth,
            )  # fmt: skip
        centre = _centre(layers, unit) * scale
        handles[-1, "centre of the filter"] = axis.scatter(
            centre[1], centre[0], 130, _CENTRE, marker="X", edgecolors="black", linewidths=1.2, zorder=20
        )
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[], aspect="equal")
        lowest = points[0] * scale
        beside = ((lowest < -0.5) | (lowest > np.array([height, width]) - 0.5) | np.isnan(lowest)).any(axis=1)
        title = _title(layers[-1], unit, index, group)
        if beside.any():
            title += f", {np.count_nonzero(beside)} of {len(lowest)} outside"
        axis.set_title(title, fontsize=10, loc="left")
    for axis in axes.flat[len(units) :]:
        axis.set_axis_off()
    order = sorted(handles)
    figure.legend(
        [handles[n] for n in order], [label for _, label in order], loc="outside lower center", ncols=len(order),
        frameon=False, fontsize=10, handletextpad=0.3, columnspacing=1.6, markerscale=1.3,
    )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=100)
    plt.close(figure)
    return _smaller(buffer) if kind == "png" else buffer.getvalue()


def _ordinal(depth: int, count: int) -> str:
    if count == 1:
        return ""
    return "top layer: " if depth == 0 else f"{depth} below: "


def _title(layer: Mapping[str, Any], unit: tuple[int, int], index: int, group: int) -> str:
    oy, ox = unit
    title = f"row {oy}, column {ox}"
    if layer["kernel_size"] in (1, (1, 1)):
        return title
    at = np.asarray(layer["offset"])[..., oy : oy + 1, ox : ox + 1]
    dilation = effective_dilation(at, layer["kernel_size"], dilation=layer.get("dilation", 1))[index, group, 0, 0]
    return f"{title}: effective dilation {dilation:.1f}"


def _centre(layers: Sequence[Mapping[str, Any]], unit: tuple[int, int]) -> np.ndarray:
    """(y, x) of a unit in the lowest layer's input, were there no offsets."""
    at = np.array(unit, float)
    for layer in reversed(layers):
        kernel, stride, padding, dilation = (
            np.broadcast_to(layer.get(name, default), 2)
            for name, default in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1))
        )
        at = at * stride - padding + dilation * (kernel - 1) / 2
    return at


def _faint(photograph: np.ndarray) -> np.ndarray:
    """Grey and half way to white, so that points stand out from dark and light ground, in (h, w, 3) of 0 to 1."""
    values = photograph.astype(float) / (255 if photograph.dtype == np.uint8 else 1)
    colours = values[..., None].repeat(3, -1) if values.ndim == 2 else values[..., :3]
    grey = colours @ np.array([0.299, 0.587, 0.114])
    return np.clip(0.5 + 0.5 * grey, 0, 1)[..., None].repeat(3, -1)


def _smaller(buffer: io.BytesIO) -> bytes:
    """The PNG with a palette: a third of the size, for pages and repositories."""
    from PIL import Image  # matplotlib needs it too

    with Image.open(buffer) as picture:
        palette = picture.convert("RGB").quantize(256, kmeans=2)  # the few orange pixels keep their colour
    small = io.BytesIO()
    palette.save(small, format="png", optimize=True)
    return small.getvalue()
