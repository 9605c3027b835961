"""The CUDA kernels on the CPU at lines past 2^24 pixels, of whose positions float32 cannot tell all apart."""

from __future__ import annotations

import numpy as np
import pytest
import test_cuda_host as host
from cuda_host.host import HostDevice, Library
from test_far_sizes import line

from dcn_kernels import OPS
from dcn_kernels.dispatch.call import call

library = host.library  # the fixture
pytestmark = [pytest.mark.cuda_host, pytest.mark.slow]

LENGTH = 2**24 + 4  # float32 has no number for the last pixel: it rounds to one past the end
ROI_CALLS = {
    "roi_align": {"sampling_ratio": 2, "aligned": True},
    "deform_roi_pool-mmcv": {"gamma": 0.1, "convention": "mmcv", "sampling_ratio": 2},
    "deform_roi_pool-rfcn": {"gamma": 0.1, "convention": "rfcn", "sampling_ratio": 2},
}


def ends(op: str, arrays: dict[str, np.ndarray], params: dict[str, object], backend: str) -> list[np.ndarray]:
    """The end of the output, and of the gradient of the input for ones."""
    row = OPS[op]
    params = {**row.samples(0)[0].params, **params}
    arrays = {name: arrays.get(name) for name in row.arrays}
    out = call(row, "forward", arrays, params, backend=backend)
    grad = call(row, "backward", {"grad_output": np.ones_like(out), **arrays}, params, backend=backend, wrt="input")
    return [out.ravel()[-8:], grad["input"].ravel()[-16:]]


def rois_are_right(library: Library, which: str, axis: int) -> bool:
    rois = np.array([[0, 0, 0, 0, 0]], np.float32)
    rois[0, [1, 3] if axis == 3 else [2, 4]] = LENGTH - 4, LENGTH + 2
    params = {"output_size": 1, "spatial_scale": 1.0, **ROI_CALLS[which]}
    arrays = {"input": line(LENGTH, axis), "rois": rois}
    monkeypatch = pytest.MonkeyPatch()
    host.install(HostDevice(library), monkeypatch)
    got, want = (ends(which.partition("-")[0], arrays, params, backend) for backend in (host.NAME, "cpu"))
    monkeypatch.undo()
    assert want[1].any()
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    return True


def fields_are_right(library: Library, border: str, axis: int) -> bool:
    image = line(LENGTH, axis)
    offset = np.zeros((1, 2, *image.shape[2:]), np.float32)
    offset[0, axis - 2].reshape(-1)[-6:] = [0, 6, 100, -1, np.inf, 1]
    monkeypatch = pytest.MonkeyPatch()
    host.install(HostDevice(library, max_blocks=1000), monkeypatch)
    got, want = (
        ends("offset_sample2d", {"input": image, "offset": offset}, {"border": border}, backend)
        for backend in (host.NAME, "cpu")
    )
    monkeypatch.undo()
    assert border != "edge" or want[0][-6:][[1, 2, 4]].tolist() == [8, 8, 8]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    return True


IN_PROCESS = """
import sys
from pathlib import Path
import pytest
import test_cuda_host as host
import test_cuda_host_far as t
library = host.Library(Path(sys.argv[1]), host.SANITIZER)
if len(sys.argv) > 5:
    host.plant(pytest.MonkeyPatch(), *sys.argv[5:8])
print("right" if getattr(t, sys.argv[2])(library, sys.argv[3], int(sys.argv[4])) else "wrong")
"""


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("which", ROI_CALLS)
def test_a_roi_at_the_end_reads_and_writes_the_last_pixels(library: Library, which: str, axis: int) -> None:
    result = host.run_in_a_process(library, IN_PROCESS, "rois_are_right", which, str(axis), sanitizer="address")
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr[-4000:]


@pytest.mark.parametrize("axis", [2, 3])
def test_a_sample_beyond_the_end_is_clamped_to_the_last_pixel(library: Library, axis: int) -> None:
    result = host.run_in_a_process(library, IN_PROCESS, "fields_are_right", "edge", str(axis), sanitizer="address")
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr[-4000:]


PLANTED = {
    # name: (the test, what of it, the file, the line, what stands there instead)
    "a sample's line": (
        "rois_are_right", "roi_align", "roi_mean", "const int first = cell < last ? int(cell) : last;",
        "const int first = int(cell);",
    ),
    "a column of the field": (
        "fields_are_right", "edge", "offset_sample",
        "if (at.x >= width || (near && x > column.position)) at.x = width - 1, at.lx = 0;", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_without_the_clamp_of_an_index_it_is_caught(library: Library, bug: str) -> None:
    what, which, *change = PLANTED[bug]
    result = host.run_in_a_process(library, IN_PROCESS, what, which, "3", *change, sanitizer="address")
    assert result.returncode != 0, result.stdout
    assert "heap-buffer-overflow" in result.stderr or "Mismatched elements" in result.stderr, result.stderr[-4000:]
