"""The picture of sampling points over an image (`dcn-bench sampling`, Fig. 6 of the paper); needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcn_kernels.deformation.sampling_points import effective_dilation, outside, stacked_sampling_points
from dcn_kernels.ops.samples.draw import layer_offsets

# One hue, lighter and smaller downwards, and its opposite for the centre: told apart also by the colour-blind
_SHADES, _CENTRE = ("#08306B", "#155FA8", "#2B8CDB", "#6FBDF2"), "#F05A00"
_AREAS = (50.0, 20.0, 7.0, 3.0)  # of a point, in square typographic points

SYNTHETIC = "smooth synthetic offsets, not of a trained network"
DEMO = (
    f"{SYNTHETIC}: three layers of 3x3 filters of dilation 2 on a map of stride 16, wider towards the face and with "
    "slow noise; the photograph is matplotlib's grace_hopper.jpg"
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
        noise = layer_offsets(rng, (1, 18, OH, OW), "smooth", 0.35)
        layers.append(
            {"offset": taps * (stretch - 1) + noise, "kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2}
        )
    return photograph, layers, [face, (7, 26)]


def in_image(points: np.ndarray, stride: Any) -> np.ndarray:
    """Positions of a map whose cells are `stride` pixels of an image, as pixels: pixel 0 of the map is a cell's middle.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels.deformation.picture import in_image
    >>> in_image(np.array([-0.5, 0.0, 1.0]), 16)
    array([-0.5,  7.5, 23.5])
    """
    return (points + 0.5) * stride - 0.5


def draw(*arguments: Any, kind: str, **more: Any) -> bytes:
    """The picture that `compose` makes of the same arguments, as a "png", "svg" or "pdf" file."""
    buffer = io.BytesIO()
    compose(*arguments, **more).savefig(buffer, format=kind, dpi=100)
    return smaller(buffer) if kind == "png" else buffer.getvalue()


def compose(
    layers: Sequence[Mapping[str, Any]],
    units: Sequence[tuple[int, int]],
    photograph: np.ndarray | None,
    input_size: tuple[int, int],
    *,
    names: Sequence[str],
    caption: str = "",
    index: int = 0,
    group: int = 0,
) -> Any:
    """A matplotlib figure, 800 pixels wide, of what units sample through the layers: a panel for each unit.

    The frame is where a filter reads something: what lies beyond it is outside, as `offset_statistics` counts.

    Parameters
    ----------
    layers : as `stacked_sampling_points` takes them
    units : pairs (oy, ox) of the top layer's output
    photograph : array (h, w), (h, w, 3) or (h, w, 4), optional
        Of the whole input; drawn faintly. None: an empty frame.
    input_size : (H, W)
        Of the lowest layer's input, which the photograph is stretched over: position v is its pixel
        (v + 0.5) * h / H - 0.5.
    names : of the layers
    caption : what is said below the picture
    index, group : int
        Which image of the batch, which offset group.

    Raises
    ------
    ValueError
        As `stacked_sampling_points`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = input_size if photograph is None else photograph.shape[:2]
    stride = np.array([height, width]) / input_size
    (top, left), (bottom, right) = in_image(np.array([[-1, -1], input_size]), stride)
    across = min(len(units), 2)
    down = -(-len(units) // across)
    labels = ["centre of the filter", *_labels(layers, names)]
    columns = len(labels) if sum(map(len, labels)) <= 84 else 1
    below = 0.42 + 0.2 * (len(labels) // columns - 1) + (0.2 if caption else 0)
    seen = [stacked_sampling_points(layers, unit, image=index, group=group) for unit in units]
    titles = [_title(layers, unit, points, input_size, index, group) for unit, points in zip(units, seen, strict=True)]
    panel = (
        7.9 / across * (bottom - top) / (right - left) + 0.12 + 0.18 * max(title.count("\n") + 1 for title in titles)
    )
    figure = Figure(figsize=(8, below + down * panel), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for axis, unit, points, title in zip(axes.flat, units, seen, titles, strict=False):
        if photograph is not None:
            axis.imshow(faint(photograph), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear")
        axis.add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor="#808080", linewidth=0.8))
        handles = []
        for number, of_layer in enumerate(points):  # the many of the lowest layer first
            depth = len(points) - 1 - number
            there = in_lowest(layers[:number], of_layer)
            there = there[np.isfinite(there).all(axis=1) & ~outside(there, input_size, 1)]
            y, x = in_image(there, stride).T
            level = min(depth, len(_SHADES) - 1)
            handles.append(
                axis.scatter(
                    x, y, _AREAS[level], _SHADES[level], edgecolors="white" if depth == 0 else "none", linewidths=0.6,
                    zorder=3 + number,
                )
            )  # fmt: skip
        y, x = in_image(in_lowest(layers, np.array(unit, float)), stride)
        handles.append(axis.scatter(x, y, 130, _CENTRE, marker="X", edgecolors="black", linewidths=1.2, zorder=20))
        axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
        axis.set_title(title, fontsize=10, loc="left")
    for axis in axes.flat[len(units) :]:
        axis.set_axis_off()
    figure.legend(
        handles[::-1], labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10,
        handletextpad=0.3, columnspacing=1.2, markerscale=1.3, title=caption, title_fontsize=10,
    )  # fmt: skip
    return figure


def _labels(layers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Of the top layer first."""
    count, labels = 1, list[str]()
    for layer, name in list(zip(layers, names, strict=True))[::-1]:
        count *= int(np.prod(np.broadcast_to(layer["kernel_size"], 2)))
        top = " (top)" if not labels and len(layers) > 1 else ""
        labels.append(f"{name}{top}: {count} points")
    return labels


def missing(
    layers: Sequence[Mapping[str, Any]], points: Sequence[np.ndarray], input_size: tuple[int, int]
) -> dict[str, int]:
    """How many of the lowest layer's points are outside its input, are NaN, or are cut off above.

    Cut off are the points below a point of an upper layer that is NaN or lies beside the map beneath it: no filter is
    there.
    """
    lowest = points[0]
    nan = np.isnan(lowest).any(axis=1)
    cut = np.zeros_like(nan)
    if len(points) > 1:
        size = np.asarray(layers[0]["offset"].shape[2:])
        near = np.round(points[1])
        cut = np.repeat(~((near >= 0) & (near < size)).all(axis=1), len(lowest) // len(near))
    return {
        "outside": int(np.count_nonzero(outside(lowest, input_size, 1))),
        "NaN": int(np.count_nonzero(nan & ~cut)),
        "cut off above": int(np.count_nonzero(cut)),
    }


def in_lowest(layers: Sequence[Mapping[str, Any]], units: np.ndarray) -> np.ndarray:
    """(y, x), in the first layer's input, of the centres that units of the last layer would have without offsets."""
    for layer in reversed(layers):
        kernel, stride, padding, dilation = (
            np.broadcast_to(layer.get(name, default), 2)
            for name, default in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1))
        )
        units = units * stride - padding + dilation * (kernel - 1) / 2
    return units


def _title(
    layers: Sequence[Mapping[str, Any]],
    unit: tuple[int, int],
    points: Sequence[np.ndarray],
    input_size: tuple[int, int],
    index: int,
    group: int,
) -> str:
    """The unit, its effective dilation, and in a second line the points that are not shown, if any."""
    (oy, ox), top = unit, layers[-1]
    title = f"row {oy}, column {ox}"
    if top["kernel_size"] not in (1, (1, 1)):
        at = np.asarray(top["offset"])[..., oy : oy + 1, ox : ox + 1]
        dilation = effective_dilation(at, top["kernel_size"], dilation=top.get("dilation", 1))[index, group, 0, 0]
        title += ": effective dilation " + (f"{dilation:.1f}" if np.isfinite(dilation) else "not finite")
    lost = ", ".join(f"{count} {what}" for what, count in missing(layers, points, input_size).items() if count)
    return f"{title}\nof {len(points[0])} points: {lost}" if lost else title


def faint(photograph: np.ndarray) -> np.ndarray:
    """Grey and most of the way to white, so that points stand out from its darkest, in (h, w, 3) of 0 to 1."""
    whole = np.iinfo(photograph.dtype).max if photograph.dtype.kind in "ui" else 1
    values = photograph.astype(float) / whole
    colours = values[..., None].repeat(3, -1) if values.ndim == 2 else values[..., :3]
    grey = colours @ np.array([0.299, 0.587, 0.114])
    return np.clip(0.65 + 0.35 * grey, 0, 1)[..., None].repeat(3, -1)


def smaller(buffer: io.BytesIO) -> bytes:
    """The PNG with a palette: a third of the size, for pages and repositories."""
    from PIL import Image  # matplotlib needs it too

    with Image.open(buffer) as picture:
        palette = picture.convert("RGB").quantize(256, kmeans=2)  # the few orange pixels keep their colour
    small = io.BytesIO()
    palette.save(small, format="png", optimize=True)
    return small.getvalue()
