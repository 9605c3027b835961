"""The gradients of deformable convolution on the stand-in for a GPU: against the reference over all options, with the
tiles that a GPU gets; how many launches, how much memory; bank conflicts; planted faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cuda_host import accesses
from cuda_host.host import SCHEDULES, HostDevice, Library, missing

from dcn_kernels.check.calls import relative_error, tolerance
from dcn_kernels.cuda import compile
from dcn_kernels.cuda.deform_conv_backward import deform_conv2d_backward
from dcn_kernels.dtypes import DTYPES, HALVES
from dcn_kernels.reference.deform_conv import deform_conv2d_backward as reference

pytestmark = pytest.mark.cuda_host


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Library:
    """Compiled kernels, kept from run to run."""
    if missing():
        pytest.skip(missing())
    return Library(Path(pytestconfig.cache.mkdir("cuda_host")))


class Shape(NamedTuple):
    """A layer."""

    N: int
    C: int
    H: int
    W: int
    O: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    OG: int = 1


SHAPES = (
    Shape(1, 64, 7, 9, 64),
    Shape(2, 64, 7, 6, 40),  # pixels of two images in a tile
    Shape(1, 128, 6, 7, 24, padding=(2, 2), dilation=(2, 2), OG=2),  # an offset group to each 64 channels
    Shape(1, 160, 5, 5, 24),  # an offset group that goes on in the next channels
    Shape(1, 64, 6, 6, 64, OG=8),  # offset groups of 8 channels
    Shape(1, 32, 6, 6, 32, OG=8),  # of 4
    Shape(2, 24, 7, 6, 12, stride=(2, 1), padding=(1, 0), dilation=(1, 2), OG=3),
    Shape(1, 30, 6, 5, 9, groups=3, OG=5),  # offset groups of 6 channels across groups of 10
    Shape(1, 64, 6, 5, 64, groups=4),
    Shape(1, 96, 5, 5, 20, groups=2, OG=3),  # offset groups of 32 across groups of 48
    Shape(1, 7, 6, 5, 5, kernel=(1, 1), padding=(0, 0), OG=7),
    Shape(3, 8, 5, 5, 3, kernel=(2, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
    Shape(1, 16, 9, 3, 130, kernel=(5, 1), padding=(2, 0), OG=2),  # tails of the outputs
    Shape(1, 1, 4, 4, 1),
    Shape(1, 24, 5, 6, 24, groups=24),  # depthwise
    Shape(2, 20, 5, 4, 40, groups=20, OG=5),  # two outputs of a channel, offset groups of 4
    Shape(1, 7, 5, 4, 21, groups=7, OG=7),
    Shape(2, 6, 4, 4, 30, groups=6),  # five outputs of a channel: a product
)
PARAMS = {"border": "zeros", "precision": "float32", "deterministic": False, "workspace_bytes": None}
SPECIAL = [np.inf, -np.inf, 1e30, -1e30, 3e9, 0.0, 1.0, -1.0, 6.0, -6.0, np.nan]


def case(
    shape: Shape, dtype: str, seed: int = 0, *, special: bool = False, mask: bool = True, wide: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays, with grad_output, and parameters; `wide`: coordinates of float32 beside halves."""
    rng = np.random.default_rng(seed)
    sizes = zip((shape.H, shape.W), shape.kernel, shape.stride, shape.padding, shape.dilation, strict=True)
    OH, OW = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
    slots = shape.OG * shape.kernel[0] * shape.kernel[1]
    own = np.dtype(DTYPES[dtype])
    coordinates = np.dtype(np.float32) if wide and own in HALVES else own
    offset = rng.standard_normal((shape.N, 2 * slots, OH, OW)) * 1.5
    if special:
        where = rng.random(offset.shape) < 0.1
        offset[where] = rng.choice(SPECIAL, where.sum())
    numbers = {
        "grad_output": rng.standard_normal((shape.N, shape.O, OH, OW)),
        "input": rng.standard_normal((shape.N, shape.C, shape.H, shape.W)),
        "weight": rng.standard_normal((shape.O, shape.C // shape.groups, *shape.kernel)) / 2,
        "bias": rng.standard_normal(shape.O),
    }
    arrays: dict[str, Any] = {name: (np.round(a * 32) / 32).astype(own) for name, a in numbers.items()}
    with np.errstate(over="ignore"):
        arrays["offset"] = offset.astype(coordinates)
    arrays["mask"] = rng.random((shape.N, slots, OH, OW)).astype(coordinates) if mask else None
    return arrays, {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation, **PARAMS}


def names(arrays: dict[str, Any]) -> tuple[str, ...]:
    """Of what there is a gradient of."""
    return tuple(name for name in ("input", "offset", "weight", "bias", "mask") if arrays[name] is not None)


def wanted(arrays: dict[str, Any], params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The reference's gradients, in float64."""
    exact = {name: None if a is None else a.astype(np.float64) for name, a in arrays.items()}
    own = {name: params[name] for name in ("stride", "padding", "dilation", "border")}
    with np.errstate(all="ignore"):
        return reference(**exact, **own, wrt=names(arrays))


def check(device: HostDevice, arrays: dict[str, Any], params: dict[str, Any], *, loose: float = 1) -> None:
    """All gradients are the reference's."""
    got = deform_conv2d_backward(**arrays, **params, wrt=names(arrays), device=device)
    for name, want in wanted(arrays, params).items():
        O, _, KH, KW = arrays["weight"].shape
        length = {"weight": arrays["grad_output"].size // O, "bias": arrays["grad_output"].size // O}.get(
            name, O * KH * KW if name == "input" else O * arrays["input"].shape[1]
        )
        # in half precision the samples too are rounded, before the product: one rounding more
        slack = loose * (np.sqrt(2) if arrays["input"].dtype in HALVES else 1)
        error, index = relative_error(got[name], want)
        bound = slack * tolerance(got[name].dtype.name, length)
        if got[name].dtype != arrays["input"].dtype:  # coordinates in float32: what they are computed from is not
            bound = slack * tolerance(arrays["input"].dtype.name, length)
        assert error <= bound, f"{name} at {index}: error {error:.3g}"


@pytest.mark.parametrize("nth", range(len(SHAPES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_reference(library: Library, nth: int, dtype: str) -> None:
    """Borders, schedules, coordinates of float32, deterministic sums and no mask take turns."""
    turn = nth + list(DTYPES).index(dtype)
    schedule = list(SCHEDULES)[turn % 4]
    for special in (False, True):
        arrays, params = case(SHAPES[nth], dtype, nth, special=special, mask=turn % 5 > 0, wide=turn % 2 == 0)
        params |= {"border": ["zeros", "msra", "edge"][(turn + special) % 3], "deterministic": turn % 3 == special}
        check(HostDevice(library, schedule=schedule, seed=nth), arrays, params)


@pytest.mark.parametrize("precision", ["float32", "ieee", "tf32"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0)], ids=str)
def test_every_body_multiplies_float32(library: Library, precision: str, capability: tuple[int, int]) -> None:
    arrays, params = case(SHAPES[2], "float32")
    # TF32 has 11 bits in the place of 24
    check(
        HostDevice(library, capability=capability), arrays, {**params, "precision": precision},
        loose=2**13 if precision == "tf32" else 1,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tiles_of_a_gpu_give_the_same(library: Library, dtype: str) -> None:
    """128 x 128, with tails of pixels, of outputs, and of channels in their second tile."""
    shape = Shape(1, 136, 9, 16, 136, kernel=(1, 2), padding=(0, 1))
    arrays, params = case(shape, dtype)
    device = HostDevice(library, schedule="warps", multiprocessors=1)
    check(device, arrays, params)
    assert any("-DBM=128" in text for text in _flags_of(device)), "or this test would tell nothing of them"


def _flags_of(device: HostDevice) -> list[str]:
    """The macros of what a device ran, as text."""
    return [" ".join(compile.definitions(flags)) for flags in device.flags]


def test_strides_of_any_kind_are_read(library: Library) -> None:
    arrays, params = case(Shape(2, 24, 6, 7, 16, groups=2, OG=3), "float32")
    want = deform_conv2d_backward(**arrays, **params, wrt=names(arrays), device=HostDevice(library))
    for name, array in arrays.items():
        if array.ndim != 4:
            continue
        for axes in ((0, 2, 3, 1), (1, 0, 3, 2), (3, 2, 1, 0)):
            other = np.ascontiguousarray(array.transpose(axes)).transpose(np.argsort(axes))
            assert other.strides != array.strides
            got = deform_conv2d_backward(
                **{**arrays, name: other}, **params, wrt=names(arrays), device=HostDevice(library)
            )
            for gradient in got:
                assert np.array_equal(got[gradient], want[gradient]), f"{gradient} of {name} by {axes}"


def test_only_what_is_asked_for_is_computed(library: Library) -> None:
    for shape in (SHAPES[6], SHAPES[15]):
        arrays, params = case(shape, "float32")
        everything = HostDevice(library)
        want = deform_conv2d_backward(**arrays, **params, wrt=names(arrays), device=everything)
        assert len(everything.launched) == 6
        kernels = {
            ("bias",): ["bias_gradient", "ordered_sums"],
            ("weight",): ["copy", "weight_gradient", "ordered_sums"],
            ("weight", "bias"): ["copy", "weight_gradient", "bias_gradient", "ordered_sums"],
            ("offset",): ["copy", "data_gradients"],
            ("offset", "mask"): ["copy", "data_gradients"],
            ("input",): ["copy", "data_gradients", "copy"],
        }
        for wrt, launched in kernels.items():
            device = HostDevice(library)
            got = deform_conv2d_backward(**arrays, **params, wrt=wrt, device=device)
            assert [name.removeprefix("depthwise_") for _, name in device.launched] == launched
            assert set(got) == set(wrt)
            for name in wrt:
                assert np.array_equal(got[name], want[name]), name


def test_plan_is_looked_up(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, params = case(SHAPES[0], "float32")
    device = HostDevice(library)
    want = deform_conv2d_backward(**arrays, **params, wrt=names(arrays), device=device)
    monkeypatch.setattr(device, "function", None)  # not asked for a kernel again
    arrays["weight"][...] *= 2  # packed weights are not kept: this must count
    got = deform_conv2d_backward(**arrays, **params, wrt=names(arrays), device=device)
    assert np.allclose(got["mask"], 2 * want["mask"], rtol=1e-4, atol=1e-4)


def test_host_time_of_a_repeated_call_is_under_80_us(library: Library) -> None:
    """Of the library's own Python, the best of many: the driver and the memory pool are left out."""

    class Idle(HostDevice):
        def function(self, *_: Any, **__: Any) -> Any:
            return lambda blocks, args: None

        def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            return np.empty(shape, dtype)

        @staticmethod
        def clear(array: np.ndarray) -> None:
            pass

    arrays, params = case(SHAPES[0], "float32")
    device, times = Idle(library), []
    for _ in range(300):
        begin = time.perf_counter()
        deform_conv2d_backward(**arrays, **params, wrt=names(arrays), device=device)
        times.append(time.perf_counter() - begin)
    assert min(times) < 80e-6


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[15]], ids=["product", "depthwise"])
def test_weight_and_bias_are_repeatable_without_being_asked(library: Library, shape: Shape) -> None:
    """Their sums are split over the pixels, and the splits added up in order."""
    arrays, params = case(shape._replace(N=2, H=18, W=19), "float32")
    device = HostDevice(library)
    runs = []
    for i, schedule in enumerate(SCHEDULES):
        device = HostDevice(library, schedule=schedule, seed=i)
        runs.append(deform_conv2d_backward(**arrays, **params, wrt=("weight", "bias"), device=device))
    assert all(np.array_equal(run[name], runs[0][name]) for run in runs for name in run)
    check(device, arrays, params)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[15]], ids=["product", "depthwise"])
def test_memory_stays_within_the_workspace(library: Library, shape: Shape, dtype: str, deterministic: bool) -> None:
    """And does not grow with the number of images."""
    workspace = 900_000 + deterministic * 1_200_000  # the sort's counts
    held = {}
    for N in (1, 64):
        arrays, params = case(shape._replace(N=N), dtype)
        device = Dry(library)
        params |= {"workspace_bytes": workspace, "deterministic": deterministic}
        grads = deform_conv2d_backward(**arrays, **params, wrt=names(arrays), device=device)
        held[N] = sum(device.allocated) - sum(grad.nbytes for grad in grads.values())
        chunks = device.launched.count(("staging", "copy")) // 2
        assert len([name for _, name in device.launched if name in COUNTED]) <= 6 * chunks
        assert chunks == 1 or N > 1
        if not deterministic:
            columns = N * arrays["offset"].shape[2] * arrays["offset"].shape[3] * 9 * shape.C * arrays["input"].itemsize
            assert held[N] < columns or N == 1, "no columns"
    assert max(held.values()) <= workspace


COUNTED = {
    "copy", "data_gradients", "weight_gradient", "depthwise_data_gradients", "depthwise_weight_gradient",
    "bias_gradient", "ordered_sums",
}  # fmt: skip


class Dry(HostDevice):
    """A device that starts nothing: it counts."""

    def function(self, stem: str, kernel: str, *_: Any, **__: Any) -> Any:
        return lambda blocks, args: self.launched.append((stem, kernel))


def test_every_workspace_gives_the_same(library: Library) -> None:
    """Chunks of images, rows of one image's output, and planes as they are."""
    for dtype in ("float16", "float64"):
        arrays, params = case(Shape(3, 16, 12, 13, 8, OG=2), dtype)
        for deterministic in (False, True):
            for workspace_bytes in (1, 60_000, 150_000, 700_000):
                own = {**params, "workspace_bytes": workspace_bytes, "deterministic": deterministic}
                check(HostDevice(library), arrays, own)


# ---------------------------------------------------------------- what the stand-in counts


class Aligned(HostDevice):
    """Memory begins where a sector does, as a GPU's."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = super().empty((nbytes + 256,), np.uint8)
        start = -memory.ctypes.data % 256
        return memory[start : start + nbytes].view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("wrt", [("input", "offset", "mask"), ("weight",)], ids=["data", "weight"])
def test_no_bank_conflicts(library: Library, dtype: str, wrt: tuple[str, ...]) -> None:
    """But for the places of the weight's gradient, 32 bytes apart: two meet. And corners are whole sectors."""
    arrays, params = case(Shape(1, 128, 8, 16, 128), dtype)
    traced = Library(library.cache, trace=True)
    device = Aligned(traced, multiprocessors=1)
    accesses.read(traced)
    deform_conv2d_backward(**arrays, **params, wrt=wrt, device=device)
    table = accesses.read(traced)
    kinds = {kind for kind, _ in table}
    assert {"shared load", "cp.async to shared", "mma", "global load"} <= kinds
    assert ("ldmatrix" in kinds) == (dtype == "float16" or wrt != ("weight",))  # it turns elements of two bytes alone
    lines = (compile.FOLDER / "deform_conv_backward.cu").read_text().splitlines()
    places = {("shared store", i) for i, line in enumerate(lines, 1) if "shared_store(&to->" in line}
    assert len(places) == 2 and set(accesses.conflicts(table)) <= (places if wrt == ("weight",) else set())
    for (kind, _), row in table.items():
        if kind in ("global load", "cp.async from global"):
            assert row.passes <= row.least * 1.01


# ---------------------------------------------------------------- planted faults: each is caught

TILES_READ = "__syncthreads();  // this chunk's tiles are there; those of the last are used up"
PLACES_READ = (
    "__syncthreads();  // this chunk's tiles and the next one's places are there; those of the last are used up"
)
FAULTS = {
    # name: (file, the line, what stands there instead, shape, dtype)
    "no barrier before the tiles are read": ("deform_conv_backward", TILES_READ, "", 2, "float16"),
    "no barrier before the sampled tiles are read": ("deform_conv_backward", PLACES_READ, "//", 0, "float16"),
    "waits for one group too few": (
        "deform_conv_backward", "cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();", 0, "float16"),
    "copies into the stage in use": (
        "deform_conv_backward", "stage == 0 ? STAGES - 1 : stage - 1", "stage", 12, "float16"),
    "no barrier before the columns' gradient": (
        "deform_conv_backward", "__syncthreads();  // the tiles are used up: their memory takes the columns' gradient",
        "", 0, "float16"),
    "no barrier behind the columns' gradient": (
        "deform_conv_backward", "__syncthreads();  // the columns' gradient and the spots are there", "", 0, "float16"),
    "no barrier after the columns' gradient": (
        "deform_conv_backward", "__syncthreads();  // the columns' gradient is used up", "", 3, "float16"),
    "the halves of what is carried not exchanged": ("deform_conv_backward", "turn ^= 1;", "", 3, "float16"),
    "sums of an offset group not carried": (
        "deform_conv_backward", "if (og * per_og < channel) {", "if (false) {", 3, "float16"),
    "spots of the first offset group for all": (
        "deform_conv_backward", "wide && spots_of != first_og", "wide && spots_of < 0", "groups", "float16"),
    "places of the next chunks not found": (
        "deform_conv_backward", "if (chunk + 2 < chunks) find_places(chunk + 2);", "", "long", "float16"),
    "places overwritten": (
        "deform_conv_backward", "places + (chunk % 2 * CHUNK_PLACES + i)", "places + i", "long", "float16"),
    "no barrier behind the first places": (
        "deform_conv_backward", "__syncthreads();  // the places of the first chunks are there", "", 0, "float16"),
    "sampled into the tile in use": (
        "deform_conv_backward", "sampler.blend(i, B + chunk % 2 * B_BYTES",
        "sampler.blend(i, B + (chunk + 1) % 2 * B_BYTES", "long", "float16"),
    "no barrier after the tiles": (
        "deform_conv_backward", "__syncthreads();  // the tiles and places are used up", "", "long", "float16"),
    "pixels of TF32 fragments not spread": (
        "deform_conv_backward", "pixel = pixel_of_row<true>(row);", "pixel = row;", 0, "float32"),
    "halves of transposed fragments exchanged": (
        "deform_conv_backward", "IS_A ? lane / 16 : lane / 8 % 2", "IS_A ? lane / 8 % 2 : lane / 16", 0, "float16"),
    "rows past the last pixel are read": (
        "deform_conv_backward", "pixel + nth < pixels &&", "", 0, "float16"),
    "sums of other images overwritten": (
        "deform_conv_backward", "total = adds ? total + sum : sum;", "total = sum;", "images", "float16"),
    "one split left out": ("sums", "split < weight_splits", "split < weight_splits - 1", "long", "float16"),
    "padding of the rows left as it was": ("staging", ": source_t(0.0f)", ": tile[i][lane]", 12, "float16"),
    "no NaN for a position that is none": (
        "deform_conv_backward", "(at.nan ? NAN_AT : 0)", "0", 0, "float16"),
    "depthwise: no barrier before the spots are read": (
        "depthwise_backward", "__syncthreads();  // the spots are there", "", 14, "float16"),
    "depthwise: no barrier before the spots are overwritten": (
        "depthwise_backward", "__syncthreads();  // the spots are used up", "", 14, "float16"),
    "depthwise: no barrier before the places are read": (
        "depthwise_backward", "__syncthreads();  // the places are there", "", 14, "float16"),
    "depthwise: no barrier before pixels are summed up": (
        "depthwise_backward", "__syncthreads();  // every pixel's part is there", "", 14, "float16"),
    "depthwise: no barrier before the sums are overwritten": (
        "depthwise_backward", "__syncthreads();  // the sums are used up", "", 15, "float16"),
}  # fmt: skip
MORE_SHAPES = {
    "long": Shape(1, 64, 18, 19, 40, kernel=(1, 2)),
    "images": Shape(5, 24, 7, 6, 12),
    "groups": Shape(1, 256, 4, 4, 8, kernel=(1, 1), padding=(0, 0), OG=2),
}


def layer_is_right(library: Library, nth: int | str, dtype: str) -> bool:
    """The gradients of one shape, under every schedule."""
    shape = SHAPES[nth] if isinstance(nth, int) else MORE_SHAPES[nth]
    arrays, params = case(shape, dtype, special=nth == 0)
    if nth == "images":
        params["workspace_bytes"] = 40_000
    for schedule in SCHEDULES:
        try:
            check(HostDevice(library, schedule=schedule, max_blocks=1), arrays, params)
        except AssertionError:
            return False
    return True


RUN = """
import json, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an abort is what some wait for
import test_cuda_backward as t
cache, fault = json.loads(sys.argv[1])
stem, line, instead, nth, dtype = t.FAULTS[fault]
honest = t.compile.source
def source(name):
    text = honest(name)
    if name == stem:
        assert line in text, f"{stem}.cu has changed: {line!r} is not in it"
        text = text.replace(line, instead)
    return text
assert t.layer_is_right(t.Library(Path(cache)), nth, dtype), "wrong without a fault"
t.compile.source = source
print("right" if t.layer_is_right(t.Library(Path(cache)), nth, dtype) else "wrong")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(library: Library, fault: str) -> None:
    """By a wrong result or by the stand-in's own checks, under some schedule."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", RUN, json.dumps([str(library.cache), fault])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout == "wrong\n" or "HOST ERROR" in result.stderr, result.stdout + result.stderr[-2000:]
