"""`dcn-bench plot`: names of points that can be read, and the table of the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from dcn_kernels.cli.bench import main

from dcn_kernels.bench import plots, record

RECORDS = ROOT / "bench_results"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_names_of_points_cover_no_other_and_stand_beside_their_own(direction: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    import matplotlib.pyplot as plt
    from matplotlib.text import Annotation, Text

    figure = plots._cost(plt, {"r": record.read(RECORDS / f"cpu-2026-11-21-scaling-{direction}.json")})
    (axis,) = figure.axes
    names = [child for child in axis.get_children() if isinstance(child, Annotation)]
    assert len(names) == 12
    boxes = [Text.get_window_extent(name, figure.canvas.get_renderer()) for name in names]
    own = axis.transData.transform([name.xy for name in names])
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :]), names[i].get_text()
        distances = [np.hypot(*(point - np.clip(point, box.min, box.max))) for point in own]
        assert distances[i] == min(distances) and distances[i] > 0, names[i].get_text()
    plt.close(figure)


def test_the_table_has_the_medians_and_ratios_of_the_records(tmp_path: Path) -> None:
    path = RECORDS / "cpu-2026-11-21-spread2-backward.json"
    output = tmp_path / "speed.md"
    assert CliRunner().invoke(main, ["plot", str(path), "-o", str(output)]).exit_code == 0
    head, _, *lines = output.read_text().splitlines()
    rows = record.read(path)["rows"]
    assert head.split(" | ")[1] == "backward, ms" and len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        shown = line.strip("| ").split(" | ")
        assert shown[1] == f"{row['median_ms']:.3g}"
        assert shown[2:] == [f"{theirs['ratio']:.2f}x" for theirs in row["against"].values()]


def test_a_table_is_made_of_speed_alone(tmp_path: Path) -> None:
    path = str(RECORDS / "cpu-2026-11-21-scaling-forward.json")
    result = CliRunner().invoke(main, ["plot", path, "-o", "a.md", "--what", "cost"])
    assert result.exit_code == 2 and "--what speed alone" in result.stderr
    result = CliRunner().invoke(main, ["plot", path, "-o", str(tmp_path / "a.md")])
    assert result.exit_code == 2 and "no row with a peer" in result.stderr
