"""`dcn-bench sampling --rois`: where the bins of deformable RoI pooling lie, as a picture and as numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcn_kernels.cli import console

MOST = 12  # regions of a picture


def show(
    rois: Any,
    offset: Any,
    *,
    photograph: Any,
    output: str | None,
    spatial_scale: float,
    gamma: float,
    convention: str,
    caption: str,
    as_json: bool,
    wide: bool,
) -> None:
    """Numbers of each region on stdout, and the picture."""
    import numpy as np

    from dcn_kernels import deform_roi_bins
    from dcn_kernels.deformation import bins_picture

    given = {"output_size": offset.shape[2:], "spatial_scale": spatial_scale, "convention": convention}
    try:
        plain, bins = (np.asarray(deform_roi_bins(rois, of, gamma=gamma, **given)) for of in (None, offset))
    except (ValueError, TypeError) as error:
        console.fail(str(error))
    if output and len(rois) > MOST:
        console.fail(f"--rois: a picture shows at most {MOST} regions, got {len(rois)}")
    if output and not np.isfinite(rois).all():
        console.fail("--rois: a picture needs regions that are finite")
    far = bins_picture.moved(plain, bins).reshape(len(rois), -1)
    rows: list[dict[str, Any]] = []
    for number, (roi, of) in enumerate(zip(rois, far, strict=True)):
        finite = of[np.isfinite(of)] if np.isfinite(of).any() else np.array([np.nan])
        row = {"region": number, "box": [float(v) for v in roi[1:]], "median_move": float(np.median(finite))}
        rows.append({**row, "longest_move": float(finite.max()), "not_finite": int((~np.isfinite(of)).sum())})
    if as_json:
        console.say_json(rows)
    else:
        columns = ["region", "x1, y1, x2, y2", "median move", "longest move", "bins not finite"]
        cells = [[str(row["region"]), ", ".join(f"{v:g}" for v in row["box"]), f"{row['median_move']:.2f}",
                  f"{row['longest_move']:.2f}", str(row["not_finite"])] for row in rows]  # fmt: skip
        console.table("moves in pixels of the map", columns, cells, right=columns[2:], wide=wide)
    if not output:
        return
    kind = Path(output).suffix[1:]
    drawn = bins_picture.draw(rois, plain, bins, photograph, spatial_scale, caption=caption, kind=kind)
    console.write_bytes(output, drawn)
    console.note(f"saved {output}")
