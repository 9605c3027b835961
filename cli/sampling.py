"""`dcn-bench sampling`: where filters look, as a picture and as numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from dcn_kernels.cli import console

KINDS = (".png", ".svg", ".pdf")


def _pair(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """3 or 3x3 as (3, 3)."""
    if value is None:
        return None
    parts = value.split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected a whole number or HxW, got {value!r}")
    return int(parts[0]), int(parts[-1])


def _unit(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, int]]:
    units = []
    for value in values:
        parts = value.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
            raise click.BadParameter(f"expected ROW,COLUMN, got {value!r}")
        units.append((int(parts[0]), int(parts[1])))
    return units


@click.command(cls=console.Command)
@click.option("--offset", "offsets", multiple=True, metavar="FILE.npy", help="Offsets of a layer (N, 2*OG*K, OH, OW); "
              "repeat for layers above each other, the top one last.")  # fmt: skip
@click.option("--image", metavar="FILE", help="Image file of the whole input, drawn beneath.")
@click.option("--demo", is_flag=False, flag_value="filters", type=click.Choice(["filters", "bins"]),
              help="A photograph that matplotlib ships, with synthetic offsets of filters or, as --demo bins, of the "
              "bins of regions.")  # fmt: skip
@click.option("--rois", metavar="FILE.npy", help="Regions (R, 5) in image coordinates: --offset is then theirs, "
              "(R, 2, PH, PW), and what is shown are their bins.")  # fmt: skip
@click.option("--spatial-scale", default=1 / 16, show_default="1/16", type=click.FloatRange(0, min_open=True),
              help="Of --rois: pixels of the map for one of the image.")  # fmt: skip
@click.option("--gamma", default=0.1, show_default=True, help="Of --rois: factor of their offsets.")
@click.option("--convention", default="paper", show_default=True, type=click.Choice(["paper", "rfcn", "mmcv"]),
              help="Of --rois: as of deform_roi_pool.")  # fmt: skip
@click.option("-o", "--output", metavar="FILE.png", help="Picture to write (.png, .svg or .pdf).")
@click.option("--at", "units", multiple=True, callback=_unit, metavar="ROW,COLUMN", help="A unit of the top layer's "
              "output; repeatable. Default: the middle.")  # fmt: skip
@click.option("--kernel", default="3", show_default=True, callback=_pair, metavar="K|HxW", help="Of every layer.")
@click.option("--stride", default="1", show_default=True, callback=_pair, metavar="S|HxW")
@click.option("--padding", callback=_pair, metavar="P|HxW", help="Default: dilation * (kernel - 1) / 2.")
@click.option("--dilation", default="1", show_default=True, callback=_pair, metavar="D|HxW")
@click.option("--input-size", callback=_pair, metavar="HxW", help="Of the lowest layer's input. Default: the smallest.")
@click.option("--index", default=0, show_default=True, help="Which image of the batch.")
@click.option("--group", default=0, show_default=True, help="Which offset group.")
@click.option("--json", "as_json", is_flag=True, help="Print only the numbers, as JSON.")
@console.WIDE
def sampling(
    offsets: tuple[str, ...],
    image: str | None,
    demo: str | None,
    rois: str | None,
    spatial_scale: float,
    gamma: float,
    convention: str,
    output: str | None,
    units: list[tuple[int, int]],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | None,
    dilation: tuple[int, int],
    input_size: tuple[int, int] | None,
    index: int,
    group: int,
    as_json: bool,
    wide: bool,
) -> None:
    """Show where deformable filters look: a picture of their sampling points, and numbers of each layer's offsets.

    With --rois, the bins of deformable RoI pooling (Fig. 7 of the paper), and how far they move.

    The numbers: mean and standard deviation of the effective dilation (Table 2 of the paper) of the filters whose
    offsets are all finite, and how many are not; how many points touch no pixel of the input, NaNs and infinities,
    and how far points move, in pixels of the layer's input.

    In the picture the frame is where a filter reads something: points beyond it are outside. A point of an upper
    layer is followed to the nearest filter beneath; where there is none, the points below it are called cut off.

    \b
    Examples:
      dcn-bench sampling --demo -o demo.png
      dcn-bench sampling --demo bins -o bins.png
      dcn-bench sampling --rois rois.npy --offset trans.npy --image street.jpg -o bins.png
      dcn-bench sampling --offset res5c.npy --dilation 2
      dcn-bench sampling --offset res5a.npy --offset res5b.npy --offset res5c.npy --dilation 2 \\
                         --image street.jpg --at 20,30 --at 12,40 -o points.png
    """
    import importlib.util

    if bool(demo) == bool(offsets):
        console.fail("expected either --offset or --demo")
    context = click.get_current_context()

    def given(*names: str) -> str:
        found = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        return f"--{found[0].replace('_', '-')}" if found else ""

    of_filters, of_regions = ("kernel", "stride", "padding", "dilation", "input_size", "index", "group"), (
        "rois", "spatial_scale", "gamma", "convention")  # fmt: skip
    own = given("image", *of_filters, *of_regions)
    if demo and own:
        console.fail(f"--demo has its own image and layers: {own} belongs to --offset")
    if (rois or demo == "bins") and given("units", *of_filters):
        console.fail(f"{given('units', *of_filters)} is about filters: expected none with bins".replace("units", "at"))
    if offsets and not rois and given(*of_regions):
        console.fail(f"{given(*of_regions)} is about regions: expected --rois too")
    if rois and len(offsets) > 1:
        console.fail("--offset: expected one file beside --rois")
    if demo and not output:
        console.fail("--demo draws a picture: expected -o FILE.png")
    if output:
        if Path(output).suffix not in KINDS:
            console.fail(f"--output: expected a name that ends in {', '.join(KINDS)}, got {output!r}")
        console.check_writable(output)
        if importlib.util.find_spec("matplotlib") is None:
            console.fail("a picture needs matplotlib: pip install 'dcn-kernels[plot]'")
    elif image or units:
        console.fail("--image and --at belong to a picture: expected -o FILE.png")
    photograph, caption = None, ""
    if rois or demo == "bins":
        from dcn_kernels.cli import roi_bins

        if demo:
            from dcn_kernels.deformation import bins_picture

            photograph, boxes, moves, spatial_scale = bins_picture.demo()
            convention, caption = "rfcn", bins_picture.SYNTHETIC
            console.note(f"--demo: {bins_picture.DEMO}")
        else:
            boxes = _array(str(rois), "--rois", 2, "(R, 5)")
            moves = _array(offsets[0], "--offset", 4, "(R, 2, PH, PW)")
            photograph = _picture(image) if image else None
        roi_bins.show(
            boxes, moves, photograph=photograph, output=output, spatial_scale=spatial_scale, gamma=gamma,
            convention=convention, caption=caption, as_json=as_json, wide=wide,
        )  # fmt: skip
        return
    if demo:
        from dcn_kernels.deformation import picture as sampling_picture

        photograph, layers, chosen = sampling_picture.demo()
        units, names, caption = units or chosen, ["layer 1", "layer 2", "layer 3"], sampling_picture.SYNTHETIC
        console.note(f"--demo: {sampling_picture.DEMO}")
    else:
        if padding is None:
            padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))  # type: ignore[assignment]
        same = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        layers = [{"offset": _array(path), **same} for path in offsets]
        names = _names(offsets)
    if image:
        photograph = _picture(image)
    sizes = _sizes(layers, input_size)
    _numbers(names, layers, sizes, as_json, wide)
    if not output:
        return
    from dcn_kernels.deformation import picture as sampling_picture

    if not units:
        OH, OW = layers[-1]["offset"].shape[2:]
        units = [(OH // 2, OW // 2)]
    try:
        drawn = sampling_picture.draw(
            layers, units, photograph, sizes[0],
            names=names, caption=caption, index=index, group=group, kind=Path(output).suffix[1:],
        )  # fmt: skip
    except ValueError as error:
        console.fail(str(error))
    console.write_bytes(output, drawn)
    console.note(f"saved {output}")


def _names(paths: tuple[str, ...]) -> list[str]:
    """What the layers are called: the files' stems, or their paths where different files have the same stem."""
    stems = [Path(path).stem for path in paths]
    return [
        path if len({other for other, same in zip(paths, stems, strict=True) if same == stem}) > 1 else stem
        for path, stem in zip(paths, stems, strict=True)
    ]


def _array(path: str, option: str = "--offset", axes: int = 4, expected: str = "(N, 2*OG*K, OH, OW)") -> Any:
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)  # a header that promises more than the file is refused
    except Exception as error:  # NumPy evaluates the header, which may be anything
        why = getattr(error, "strerror", None) or str(error)
        why = "no .npy file" if "pickle" in why else why  # NumPy takes all else for a pickle
        console.fail(f"{option}: cannot read {path}: {why}")
    if not isinstance(found, np.ndarray) or found.ndim != axes:
        console.fail(f"{option}: {path}: expected one array {expected}, got {getattr(found, 'shape', found)}")
    if not found.size:
        console.fail(f"{option}: {path}: expected at least one element, got the shape {found.shape}")
    return np.asarray(found)


_MOST_PIXELS = 1 << 24  # drawing takes about 75 bytes for each


def _picture(path: str) -> Any:
    import warnings

    import matplotlib.image
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are refused here
            with Image.open(path) as opened:  # reads the size, and no pixel
                width, height = opened.size
            if width * height > _MOST_PIXELS:
                console.fail(f"--image: {path}: expected at most {_MOST_PIXELS:,} pixels, got {width} x {height}")
            return matplotlib.image.imread(path)
    except Exception as error:  # a damaged file makes its decoder raise anything
        console.fail(f"--image: cannot read {path}: {getattr(error, 'strerror', None) or error}")


def _sizes(layers: list[dict[str, Any]], input_size: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Each layer's input size: the output's of the layer beneath, and for the lowest what was given or the smallest."""
    lowest = layers[0]
    smallest = tuple(
        (length - 1) * stride + dilation * (kernel - 1) + 1 - 2 * padding
        for length, kernel, stride, padding, dilation in zip(
            lowest["offset"].shape[2:],
            *(_as_pair(lowest[name]) for name in ("kernel_size", "stride", "padding", "dilation")),
            strict=True,
        )
    )
    first: Any = input_size or smallest
    return [first, *(layer["offset"].shape[2:] for layer in layers[:-1])]


def _as_pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _numbers(
    names: list[str], layers: list[dict[str, Any]], sizes: list[tuple[int, int]], as_json: bool, wide: bool
) -> None:
    """A row for each layer on stdout."""
    import numpy as np

    from dcn_kernels import effective_dilation, offset_statistics
    from dcn_kernels.deformation.dilation_classes import mean_and_deviation

    rows: list[dict[str, Any]] = []
    for name, layer, size in zip(names, layers, sizes, strict=True):
        try:
            with np.errstate(invalid="ignore"):  # infinities and NaNs are counted, not warned of
                found = offset_statistics(input_size=size, **layer, quantiles=(0.5, 0.95, 1.0))
                if _as_pair(layer["kernel_size"]) != (1, 1):
                    found["effective_dilation"] = mean_and_deviation(effective_dilation(**layer))
        except (ValueError, TypeError) as error:
            console.fail(f"{name}: {error}")
        rows.append({"layer": name, **found})
    if as_json:
        console.say_json(rows)
        return
    columns = ["layer", "effective dilation", "filters not finite", "outside", "without offsets", "NaN points",
               "infinite points", "median length", "95 %", "longest"]  # fmt: skip
    cells = []
    for found in rows:
        of = found.get("effective_dilation")
        dilation = [f"{of['mean']:.2f} +- {of['std']:.2f}", str(of["not_finite"])] if of else ["", ""]
        shares = [f"{100 * found[key]:.1f} %" for key in ("outside", "outside_without_offsets")]
        lengths = [f"{length:.2f}" for length in found["length"].values()]
        cells.append([found["layer"], *dilation, *shares, str(found["nan"]), str(found["infinite"]), *lengths])
    console.table("", columns, cells, right=columns[1:], wide=wide)
