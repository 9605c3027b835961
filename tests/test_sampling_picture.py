"""dcn-bench sampling: its numbers, and where its picture puts what it draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from dcn_kernels.cli.bench import main

from dcn_kernels import offset_statistics, stacked_sampling_points
from dcn_kernels.deformation.picture import compose, in_image, in_lowest, missing

# ---------------------------------------------------------------- numbers


def _strict(text: str) -> list[dict]:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_sampling_prints_the_numbers_of_each_layer(tmp_path: Path) -> None:
    offset = np.zeros((1, 18, 5, 6), np.float32)
    np.save(tmp_path / "zero.npy", offset)
    offset[0, 0, 0, 0] = np.nan
    offset[0, 2, 1, 1] = np.inf
    np.save(tmp_path / "bad.npy", offset)
    command = ["sampling", "--offset", str(tmp_path / "zero.npy"), "--offset", str(tmp_path / "bad.npy")]
    result = CliRunner().invoke(main, [*command, "--dilation", "2", "--json"])
    assert result.exit_code == 0, result.output
    zero, bad = _strict(result.stdout)
    assert [zero["layer"], bad["layer"]] == ["zero", "bad"]
    assert zero["effective_dilation"] == {"mean": 2.0, "std": 0.0, "filters": 30, "not_finite": 0}
    assert zero["outside"] == zero["outside_without_offsets"] > 0
    assert bad["nan"] == 1 and bad["infinite"] == 1
    assert bad["effective_dilation"] == {"mean": 2.0, "std": 0.0, "filters": 28, "not_finite": 2}
    assert "2.00 +- 0.00" in CliRunner().invoke(main, [*command, "--dilation", "2"]).stdout


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_offsets_that_are_all_lost_are_null_in_json(value: float, tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.full((1, 18, 2, 2), value, np.float32))
    result = CliRunner().invoke(main, ["sampling", "--offset", str(tmp_path / "o.npy"), "--json"])
    assert result.exit_code == 0, result.output
    (found,) = _strict(result.stdout)
    assert found["effective_dilation"] == {"mean": None, "std": None, "filters": 0, "not_finite": 4}
    assert found["mean_length"] is None and found["length"]["1.0"] is None
    assert CliRunner().invoke(main, ["sampling", "--offset", str(tmp_path / "o.npy")]).exit_code == 0


def test_files_of_one_stem_keep_their_order_and_are_told_by_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = ["a/o.npy", "top.npy", "b/o.npy", "top.npy"]
    for length, path in enumerate(paths[:3]):
        Path(path).parent.mkdir(exist_ok=True)
        np.save(path, np.full((1, 2, 4, 4), length, np.float64))
    command = ["sampling", "--kernel", "1", *(word for path in paths for word in ("--offset", path))]
    rows = _strict(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert [row["layer"] for row in rows] == ["a/o.npy", "top", "b/o.npy", "top"]
    assert [row["mean_length"] for row in rows] == pytest.approx([0, 2**0.5, 2 * 2**0.5, 2**0.5])
    shown = [line.split()[0] for line in CliRunner().invoke(main, command).stdout.splitlines() if ".npy" in line]
    assert shown == ["a/o.npy", "b/o.npy"]


# ---------------------------------------------------------------- the picture


def test_a_map_position_is_at_the_middle_of_its_cell_of_the_image() -> None:
    """Cells of 16 pixels: the first covers pixels 0 to 15, whose middle is 7.5; its edge, -0.5, is that of pixel 0."""
    assert in_image(np.array([-0.5, 0, 0.5, 3]), 16).tolist() == [-0.5, 7.5, 15.5, 55.5]
    assert in_image(np.array([0.0, 2.0]), 1).tolist() == [0, 2]


def _shown(figure: object, panel: int = 0) -> list[np.ndarray]:
    """What is drawn in a panel, as rows of (x, y): of each layer from the lowest, then the centre."""
    return [np.asarray(dots.get_offsets()) for dots in figure.axes[panel].collections]  # type: ignore[attr-defined]


def test_the_picture_puts_points_where_the_mapping_does() -> None:
    """A 1x1 filter on a map of 4x5 over 40x80 pixels: cells of 10x16."""
    pytest.importorskip("matplotlib")
    offset = np.zeros((1, 2, 4, 5))
    offset[0, :, 2, 1] = 0.5, -1
    layer = {"offset": offset, "kernel_size": 1}
    figure = compose([layer], [(2, 1), (0, 0)], np.zeros((40, 80, 3), np.uint8), (4, 5), names=["layer"])
    points, centre = _shown(figure)
    assert points.tolist() == [[(0 + 0.5) * 16 - 0.5, (2.5 + 0.5) * 10 - 0.5]]
    assert centre.tolist() == [[(1 + 0.5) * 16 - 0.5, (2 + 0.5) * 10 - 0.5]]
    assert _shown(figure, 1)[0].tolist() == [[7.5, 4.5]]
    (image,) = figure.axes[0].images
    assert list(image.get_extent()) == [-0.5, 79.5, 39.5, -0.5]


def test_points_of_an_upper_layer_are_brought_down_to_the_lowest_input() -> None:
    """A 1x1 filter above a 3x3 one of stride 2 without padding: its unit v is 2 v + 1 beneath."""
    pytest.importorskip("matplotlib")
    lower = {"offset": np.zeros((1, 18, 4, 4)), "kernel_size": 3, "stride": 2}
    upper = {"offset": np.zeros((1, 2, 4, 4)), "kernel_size": 1}
    assert in_lowest([lower, upper], np.array([2.0, 3.0])).tolist() == [5, 7]
    figure = compose([lower, upper], [(2, 3)], None, (9, 9), names=["lower", "upper"])
    points, top, centre = _shown(figure)
    assert top.tolist() == centre.tolist() == [[7, 5]]
    assert sorted(map(tuple, points)) == [(x, y) for x in (6, 7, 8) for y in (4, 5, 6)]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["centre of the filter", "upper (top): 1 points", "lower: 9 points"]


def test_outside_in_the_picture_is_outside_in_the_table_and_beyond_the_frame() -> None:
    """2x2 pixels, 1x1 filters: y = -1 and x = 2 are outside; -0.99 and 1.99 still touch a pixel."""
    pytest.importorskip("matplotlib")
    offset = np.zeros((1, 2, 2, 2))
    offset[0, :, 0, 0] = -1, 0
    offset[0, :, 0, 1] = -0.99, 0.99
    offset[0, :, 1, 0] = np.nan, 0
    offset[0, :, 1, 1] = np.inf, 0
    layer, units = {"offset": offset, "kernel_size": 1}, [(0, 0), (0, 1), (1, 0), (1, 1)]
    figure = compose([layer], units, None, (2, 2), names=["layer"])
    assert [len(_shown(figure, panel)[0]) for panel in range(4)] == [0, 1, 0, 0]
    (left, right), (bottom, top) = figure.axes[1].get_xlim(), figure.axes[1].get_ylim()
    assert (left, right, bottom, top) == (-1, 2, 2, -1)
    counts = [missing([layer], stacked_sampling_points([layer], unit), (2, 2)) for unit in units]
    assert [c["outside"] for c in counts] == [1, 0, 0, 1] and [c["NaN"] for c in counts] == [0, 0, 1, 0]
    assert sum(c["outside"] for c in counts) / 4 == offset_statistics(offset, 2, 1)["outside"]
    assert "of 1 points: 1 NaN" in figure.axes[2].get_title(loc="left")


def test_points_without_a_filter_above_are_counted_apart() -> None:
    """Three of nine points of the upper layer are beside the map, one is NaN; below the others one of nine is NaN."""
    upper, lower = np.zeros((1, 18, 5, 5)), np.zeros((1, 18, 5, 5))
    upper[0, 9, 0, 2] = np.nan  # the middle tap of the filter in the first row, whose upper three are at y = -1
    lower[0, 0] = np.nan
    layers = [{"offset": offset, "kernel_size": 3, "padding": 1} for offset in (lower, upper)]
    points = stacked_sampling_points(layers, (0, 2))
    # the other five: two at y = 0, whose upper three points are outside (one of them the NaN), three at y = 1
    assert missing(layers, points, (5, 5)) == {"outside": 2 * 2, "NaN": 5, "cut off above": 4 * 9}


def test_sampling_draws_the_demonstration_800_pixels_wide(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    path = tmp_path / "demo.png"
    result = CliRunner().invoke(main, ["sampling", "--demo", "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert "synthetic offsets, not of a trained network" in result.stderr
    assert path.stat().st_size < 300_000
    with Image.open(path) as picture:
        assert picture.width == 800
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
        drawn = np.asarray(picture.convert("RGB"), float)
    assert len(colours) > 20
    with Image.open(ROOT / "docs" / "sampling.png") as picture:  # README's, by the command that it names
        shown = np.asarray(picture.convert("RGB"), float)
    assert shown.shape == drawn.shape and np.abs(shown - drawn).mean() < 2  # other versions draw other letters


def test_sampling_draws_own_offsets_over_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    np.save(tmp_path / "o.npy", np.random.default_rng(0).standard_normal((2, 36, 8, 9)))
    Image.fromarray(np.full((80, 90, 3), 200, np.uint8)).save(tmp_path / "image.png")
    command = ["sampling", "--offset", str(tmp_path / "o.npy"), "--image", str(tmp_path / "image.png")]
    for name in ("points.png", "points.svg"):
        more = ["--at", "3,4", "--at", "0,0", "--group", "1", "--index", "1", "-o", str(tmp_path / name)]
        result = CliRunner().invoke(main, [*command, *more])
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --offset or --demo"),
        (["--demo"], "expected -o FILE.png"),
        (["--offset", "nothing.npy"], "cannot read nothing.npy: No such file"),
        (["--offset", "o.npy", "--at", "1,1"], "--image and --at belong to a picture"),
        (["--offset", "o.npy", "--kernel", "5"], r"o: offset_statistics: offset: expected shape (N, 2*OG*K, OH, OW)"),
        (["--offset", "o.npy", "-o", "x.bmp"], "expected a name that ends in .png, .svg, .pdf"),
        (["--offset", "o.npy", "-o", "x.png", "--at", "9,9"], "at: expected a position within (OH, OW) = (4, 4)"),
        (["--offset", "o.npy", "-o", "no/x.png"], "cannot write no/x.png: no folder /"),
        (["--offset", "o.npy", "-o", "x.png", "--image", "text"], "--image: cannot read text: "),
        (["--offset", "o.npy", "-o", "x.png", "--image", "none"], "--image: cannot read none: No such file"),
        (["--offset", "o.npy", "-o", "x.png", "--group", "1"], "group: expected one of the 1 of layers[0].offset"),
        (["--offset", "o.npy", "--offset", "wide.npy"], "wide: offset_statistics: offset: expected shape"),
        (["--offset", "whole.npy"], "whole: offset_statistics: offset: expected dtype float16"),
        (["--offset", "text"], "--offset: cannot read text: no .npy file"),
        (["--demo", "-o", "x.png", "--kernel", "5"], "--demo has its own image and layers: --kernel belongs to"),
        (["--offset", "flat.npy"], "flat.npy: expected one array (N, 2*OG*K, OH, OW), got (3,)"),
        (["--offset", "o.npy", "--kernel", "3by3"], "expected a whole number or HxW, got '3by3'"),
        (["--offset", "o.npy", "--kernel", "\u00b2"], "expected a whole number or HxW, got '\u00b2'"),
        (["--offset", "o.npy", "--gamma", "1"], "--gamma is about regions: expected --rois too"),
        (
            ["--offset", "t.npy", "--rois", "r.npy", "--kernel", "5"],
            "--kernel is about filters: expected none with bins",
        ),
        (["--demo", "bins", "-o", "x.png", "--at", "1,1"], "--at is about filters: expected none with bins"),
        (["--demo", "bins", "-o", "x.png", "--gamma", "1"], "--gamma belongs to --offset"),
        (["--offset", "t.npy", "--offset", "t.npy", "--rois", "r.npy"], "--offset: expected one file beside --rois"),
        (["--rois", "r.npy"], "expected either --offset or --demo"),
        (["--offset", "t.npy", "--rois", "t.npy"], "--rois: t.npy: expected one array (R, 5), got (2, 2, 3, 3)"),
        (["--offset", "o.npy", "--rois", "r.npy"], "deform_roi_bins: offset: expected shape (R, 2, PH, PW)"),
        (["--offset", "t.npy", "--rois", "nan.npy", "-o", "x.png"], "a picture needs regions that are finite"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    np.save("o.npy", np.zeros((1, 18, 4, 4)))
    np.save("wide.npy", np.zeros((1, 18, 9, 9)))
    np.save("whole.npy", np.zeros((1, 18, 4, 4), int))
    np.save("flat.npy", np.zeros(3))
    np.save("r.npy", np.array([[0, 0, 0, 31, 31.0], [0, 16, 16, 47, 63]]))
    np.save("nan.npy", np.array([[0, 0, 0, 31, np.nan], [0, 16, 16, 47, 63]]))
    np.save("t.npy", np.zeros((2, 2, 3, 3)))
    Path("text").write_text("text")
    result = CliRunner().invoke(main, ["sampling", *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    if not result.stderr.startswith("Usage:"):  # of click, for a value that it cannot read
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert not Path("x.png").exists()


# ---------------------------------------------------------------- bins of regions


def _regions(folder: Path) -> list[str]:
    """Two regions, of which the second's bins move by 0.1 * 5 of its width of 2 pixels of the map."""
    np.save(folder / "r.npy", np.array([[0, 0, 0, 31, 31.0], [0, 32, 32, 63, 63]]))
    offset = np.zeros((2, 2, 2, 2))
    offset[1, 0] = 5
    offset[1, 0, 1, 1] = np.nan
    np.save(folder / "t.npy", offset)
    return ["sampling", "--rois", str(folder / "r.npy"), "--offset", str(folder / "t.npy"), "--convention", "rfcn"]


def test_the_numbers_of_bins_are_moves_in_pixels_of_the_map(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [*_regions(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    still, moved = _strict(result.stdout)
    assert still["median_move"] == still["longest_move"] == 0 and still["not_finite"] == 0
    assert moved["box"] == [32, 32, 63, 63] and moved["not_finite"] == 1
    assert moved["median_move"] == pytest.approx(1) and moved["longest_move"] == pytest.approx(1)


def test_the_picture_of_bins_has_them_where_the_operator_samples() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.patches import Rectangle

    from dcn_kernels import deform_roi_bins
    from dcn_kernels.deformation.bins_picture import compose

    rois = np.array([[0, 0, 0, 31, 31.0], [0, 32, 32, 63, 63]])
    offset = np.zeros((2, 2, 2, 2))
    offset[1, 0] = 5
    given = {"output_size": 2, "spatial_scale": 1 / 16, "convention": "rfcn"}
    plain, bins = deform_roi_bins(rois, **given), deform_roi_bins(rois, offset, **given)
    still, moved = compose(rois, plain, bins, np.zeros((80, 100)), 1 / 16).axes
    for axis, shift in ((still, 0), (moved, 16)):  # a pixel of the map is 16 of the image
        boxes = [patch.get_bbox().extents for patch in axis.patches if isinstance(patch, Rectangle)]
        assert len(boxes) == 1 + 4 + 4
        np.testing.assert_allclose(np.array(boxes[5:]) - boxes[1:5], np.tile([shift, 0, shift, 0], (4, 1)), atol=1e-4)
        assert boxes[1][:2] == pytest.approx(boxes[0][:2])  # the first bin begins where its region does


def test_the_picture_of_bins_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, command in (("b.png", ["sampling", "--demo", "bins"]), ("b.svg", _regions(tmp_path))):
        result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).stat().st_size > 5000
