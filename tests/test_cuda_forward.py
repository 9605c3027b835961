"""The fused forward of deform_conv2d on the stand-in for a GPU: its tiles, launches, memory, accuracy, bank conflicts.

That it agrees with the reference over all options is in test_cuda_host.py; here it runs on the tiles that large layers
get on a GPU, and with faults planted.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_host import accesses
from cuda_host.host import SCHEDULES, HostDevice, Library, missing

from dcn_kernels.check.calls import relative_error, tolerance
from dcn_kernels.cuda import compile, product
from dcn_kernels.cuda.deform_conv_forward import deform_conv2d
from dcn_kernels.cuda.device import shared_bytes_of_a_block
from dcn_kernels.dtypes import DTYPES
from dcn_kernels.reference.deform_conv import deform_conv2d as reference

pytestmark = pytest.mark.cuda_host


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Library:
    """Compiled kernels, kept from run to run."""
    if missing():
        pytest.skip(missing())
    return Library(Path(pytestconfig.cache.mkdir("cuda_host")))


GEOMETRY = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "border": "zeros"}
ODD = [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e9, 0.0, 1.0, -1.0, 6.0, -6.0]


def layer(
    dtype: str, N: int, C: int, side: int, O: int, *, groups: int = 1, OG: int = 1, taps: int = 3, special: bool = True
) -> dict[str, Any]:
    """A layer of odd sizes, with odd coordinates and masks and one infinite weight among the others."""
    rng = np.random.default_rng(C + O)
    shape = (side + 3 - taps, side + 3 - taps)
    offset = rng.standard_normal((N, 2 * OG * taps**2, *shape)) * 1.5
    mask = rng.random((N, OG * taps**2, *shape))
    weight = rng.standard_normal((O, C // groups, taps, taps))
    if special:
        few = rng.random(offset.shape) < 0.01
        offset[few] = rng.choice(ODD, few.sum())
        mask.reshape(-1)[rng.choice(mask.size, 3, replace=False)] = np.nan, np.inf, -np.inf
        weight[0, 0, taps // 2, 0] = np.inf
    arrays = {
        "input": rng.standard_normal((N, C, side, side)), "offset": offset, "weight": weight,
        "bias": rng.standard_normal(O), "mask": mask,
    }  # fmt: skip
    with np.errstate(over="ignore"):
        return {name: array.astype(DTYPES[dtype]) for name, array in arrays.items()}


def run(device: HostDevice, arrays: dict[str, Any], precision: str = "float32", **more: Any) -> np.ndarray:
    """The launcher's result."""
    return deform_conv2d(**arrays, **GEOMETRY, precision=precision, workspace_bytes=None, device=device, **more)


def wanted(arrays: dict[str, Any]) -> np.ndarray:
    """The reference's result in float64."""
    with np.errstate(all="ignore"):
        exact = {name: None if array is None else array.astype(np.float64) for name, array in arrays.items()}
        return reference(**exact, **GEOMETRY)


def is_right(y: np.ndarray, want: np.ndarray, dtype: str, length: int) -> bool:
    """Within the bound of a sum; a half's samples are rounded before the product: one rounding more."""
    return relative_error(y, want)[0] <= tolerance(dtype, length) * (np.sqrt(2) if dtype[-2:] == "16" else 1)


def first_row(device: HostDevice, dtype: str, precision: str = "float32") -> product.Tile:
    """The row of the table that a large layer gets."""
    body = product.body(np.dtype(DTYPES[dtype]), precision, device.capability)
    return product.fitting(body, np.dtype(DTYPES[dtype]), True, device.capability)[0]


# ---------------------------------------------------------------- the tiles of large layers

LARGE_TILES = [
    ("float16", "float32", (9, 0), (128, 256)), ("bfloat16", "float32", (8, 9), (128, 128)),
    ("float32", "float32", (9, 0), (128, 128)), ("float32", "float32", (8, 0), (128, 128)),
    ("float32", "ieee", (12, 0), (128, 128)), ("float64", "float32", (9, 0), (64, 64)),
    ("float16", "float32", (7, 5), (64, 64)),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "precision", "capability", "size"), LARGE_TILES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_large_tiles_are_right(
    library: Library, dtype: str, precision: str, capability: tuple[int, int], size: tuple[int, int]
) -> None:
    """Two tiles of pixels, outputs past the tile, a tail of channels."""
    device = HostDevice(library, capability=capability, multiprocessors=1, max_blocks=1, schedule="warps")
    row = first_row(device, dtype, precision)
    assert size == (row.BM, row.BN)
    arrays = layer(dtype, 2, 72, 9, row.BN + 10)
    assert is_right(run(device, arrays, precision), wanted(arrays), dtype, 72 * 9)
    assert device.launched == [("staging", "copy"), ("deform_conv_forward", "deform_conv_forward")]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("multiple", [1, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_depthwise_layers_have_a_kernel_of_their_own(library: Library, dtype: str, multiple: int) -> None:
    device = HostDevice(library, schedule="lanes")
    arrays = layer(dtype, 2, 72, 9, 72 * multiple, groups=72)
    assert is_right(run(device, arrays), wanted(arrays), dtype, 9)
    assert device.launched == [("staging", "copy"), ("depthwise", "depthwise_forward")]


@pytest.mark.parametrize(("per_og", "VEC"), [(8, 8), (4, 4), (2, 1)])
def test_narrow_offset_groups_are_loaded_as_wide_as_they_are(library: Library, per_og: int, VEC: int) -> None:
    builds = []

    class Noting(HostDevice):
        def function(self, stem: str, kernel: str, flags: compile.Flags, *args: Any, **named: Any) -> Any:
            builds.append(flags)
            return super().function(stem, kernel, flags, *args, **named)

    arrays = layer("float16", 1, 32, 6, 16, OG=32 // per_og, special=False)
    assert is_right(run(Noting(library), arrays), wanted(arrays), "float16", 32 * 9)
    assert builds[0]["VEC"] == VEC and not builds[0]["WIDE"]


# ---------------------------------------------------------------- launches, memory, host time


def test_a_chunk_takes_two_launches_and_one_where_nothing_is_to_be_copied(library: Library) -> None:
    arrays = layer("float16", 3, 16, 9, 16, special=False)
    want = wanted(arrays)
    device = HostDevice(library)
    assert is_right(run(device, arrays), want, "float16", 144) and len(device.launched) == 2
    for name in ("input", "weight"):  # channels last
        last = np.ascontiguousarray(arrays[name].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        aligned = device.empty((last.size + 64,), last.dtype)
        start = -aligned.ctypes.data % 128 // last.itemsize
        arrays[name] = np.ndarray(last.shape, last.dtype, aligned.data, start * last.itemsize, last.strides)
        arrays[name][...] = last
    device = HostDevice(library)
    assert is_right(run(device, arrays), want, "float16", 144)
    assert device.launched == [("deform_conv_forward", "deform_conv_forward")]
    assert len(device.allocated) == 1, "the result alone"


def test_packed_weights_are_not_kept_from_call_to_call(library: Library) -> None:
    device, arrays = HostDevice(library), layer("float32", 1, 16, 6, 8, special=False)
    run(device, arrays)
    arrays["weight"][...] *= 2
    assert is_right(run(device, arrays), wanted(arrays), "float32", 144)


class Stub(HostDevice):
    """Starts nothing."""

    def __init__(self, **more: Any) -> None:
        super().__init__(None, **more)  # type: ignore[arg-type]
        self.memory: dict[Any, np.ndarray] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.allocated.append(math.prod(shape) * dtype.itemsize)
        return self.memory.setdefault((shape, dtype), np.empty(shape, dtype))

    @staticmethod
    def address(array: np.ndarray) -> int:
        return 4  # NumPy takes longer over it than all of the launcher; of CuPy it is an attribute

    def function(self, stem: str, kernel: str, *args: Any, **named: Any) -> Any:
        return lambda blocks, args: self.launched.append((stem, kernel))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("N", [1, 64])
def test_temporary_memory_is_the_staged_images_and_the_packed_weights(N: int, dtype: str) -> None:
    C, O, side = 64, 64, 40
    itemsize = DTYPES[dtype].itemsize
    arrays = {
        "input": np.zeros((N, C, side, side), DTYPES[dtype]), "offset": np.zeros((N, 18, side, side), DTYPES[dtype]),
        "weight": np.zeros((O, C, 3, 3), DTYPES[dtype]), "bias": None, "mask": None,
    }  # fmt: skip
    weights, image = O * C * 9 * itemsize * (2 if dtype == "float32" else 1), C * side**2 * itemsize
    for workspace_bytes in (None, weights + 5 * image, weights + image // 2):
        device = Stub()
        named = {**GEOMETRY, "precision": "float32", "workspace_bytes": workspace_bytes}
        y = deform_conv2d(**arrays, **named, device=device)
        fitting = ((workspace_bytes or 64 << 20) - weights) // image
        assert sum(device.allocated) == y.nbytes + weights + min(N, fitting) * image
        chunks = -(-N // fitting) if fitting else 1
        assert len(device.launched) == (2 * chunks if fitting else 2)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_known_call_costs_the_host_little(dtype: str) -> None:
    device, arrays = Stub(), layer(dtype, 1, 16, 6, 16, special=False)
    run(device, arrays)
    times = []
    for _ in range(300):
        begin = time.perf_counter()
        run(device, arrays)
        times.append(time.perf_counter() - begin)
    assert min(times) < 40e-6


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("arch", compile.ARCHS)
def test_every_architecture_has_a_tile_for_every_layer(arch: str) -> None:
    capability = compile.capability(arch)
    for dtype in map(np.dtype, DTYPES.values()):
        for precision in ("float32", "ieee", "tf32"):
            body = product.body(dtype, precision, capability)
            for wide in (False, True):
                tiles = product.fitting(body, dtype, wide, capability)
                assert tiles[-1].least == 1
                for tile in tiles:
                    assert product.shared_bytes(tile, dtype, body.split, wide) <= shared_bytes_of_a_block(capability)


@pytest.mark.parametrize(
    ("capability", "pixels", "outputs", "multiprocessors", "size"),
    [
        ((9, 0), 8 * 38 * 63, 512, 132, (128, 256)),  # main
        ((9, 0), 1 * 38 * 63, 512, 132, (128, 64)),  # of one image: 152 blocks
        ((9, 0), 1 * 100 * 168, 128, 132, (128, 128)),  # C
        ((9, 0), 1 * 180 * 320, 64, 132, (128, 64)),  # D
        ((8, 9), 8 * 38 * 63, 512, 128, (128, 128)),
        ((7, 5), 8 * 38 * 63, 512, 40, (64, 64)),
        ((9, 0), 4, 512, 132, (64, 32)),
    ],
)
def test_tiles_of_halves(
    capability: tuple[int, int], pixels: int, outputs: int, multiprocessors: int, size: tuple[int, int]
) -> None:
    dtype = np.dtype(np.float16)
    tiles = product.fitting(product.body(dtype, "float32", capability), dtype, True, capability)
    tile = product.choose(tiles, pixels, outputs, 1, multiprocessors)
    assert size == (tile.BM, tile.BN)


def test_float32_is_split_where_that_is_quicker() -> None:
    single = np.dtype(np.float32)
    names = {c: product.body(single, "float32", c).name for c in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0))}
    assert names == {
        (7, 5): "plain",
        (8, 0): "split",
        (8, 6): "plain",
        (8, 9): "plain",
        (9, 0): "split",
        (12, 0): "plain",
    }
    assert product.body(single, "ieee", (9, 0)).name == product.body(np.dtype(float), "tf32", (9, 0)).name == "plain"
    assert product.body(single, "tf32", (8, 6)).name == "tf32" and product.body(single, "tf32", (7, 5)).name == "plain"


# ---------------------------------------------------------------- accuracy of long sums


@pytest.mark.parametrize("positive", [False, True])
def test_split_sums_of_4608_terms_are_nearly_as_exact_as_plain_float32(library: Library, positive: bool) -> None:
    """The stand-in's matrix units round sums towards zero; with all terms of one sign the error shows most.

    Samples are pixels here, so that NumPy's float32 product is the plain one.
    """
    arrays = layer("float32", 1, 4608, 4, 32, taps=1, special=False)
    arrays |= {"offset": np.zeros_like(arrays["offset"]), "mask": None, "bias": None}
    if positive:
        arrays |= {name: np.abs(arrays[name]) for name in ("input", "weight")}
    x, weight = np.pad(arrays["input"], ((0, 0), (0, 0), (1, 1), (1, 1))).reshape(4608, -1), arrays["weight"][..., 0, 0]
    want = weight.astype(np.float64) @ x.astype(np.float64)

    def error(y: np.ndarray) -> float:
        return float(np.sqrt(np.mean((y.reshape(want.shape) - want) ** 2) / np.mean(want**2)))

    errors = {
        precision: error(run(HostDevice(library), arrays, precision)) for precision in ("float32", "ieee", "tf32")
    }
    plain = error(weight @ x)
    assert errors["float32"] <= 4 * plain, (errors, plain)
    assert errors["ieee"] <= 4e-6 and 1e-5 < errors["tf32"] < 1e-3, errors


# ---------------------------------------------------------------- bank conflicts


@pytest.mark.parametrize(
    ("dtype", "precision", "capability", "size"), [row for row in LARGE_TILES if row[0] != "bfloat16"]
)
def test_shared_memory_is_accessed_without_bank_conflicts(
    library: Library, dtype: str, precision: str, capability: tuple[int, int], size: tuple[int, int]
) -> None:
    """But for the places, stored once for nine taps: 32 bytes apart, two at a time meet."""
    traced = Library(library.cache, trace=True)
    device = HostDevice(traced, capability=capability, multiprocessors=1, max_blocks=1)
    arrays = layer(dtype, 1, 64, 7, size[1] + 8, taps=1, special=False)
    run(device, arrays, precision)
    table = accesses.read(traced)
    kinds = {kind for kind, _ in table}
    assert {"shared load", "shared store", "cp.async to shared"} <= kinds
    body = product.body(np.dtype(DTYPES[dtype]), precision, capability)
    assert body.matrix_units == ("mma" in kinds) == ("ldmatrix" in kinds)
    lines = (compile.FOLDER / "deform_conv_forward.cu").read_text().splitlines()
    places = [("shared store", i) for i, line in enumerate(lines, 1) if "shared_store(&places" in line]
    assert len(places) == 2 and set(accesses.conflicts(table)) <= set(places)


# ---------------------------------------------------------------- planted faults

KERNEL = "deform_conv_forward"
PLANTED = {
    # name: (the line, what stands there instead)
    "no barrier before the tiles are read": (
        "__syncthreads();  // this chunk's tiles are there; those of the last are used up", "",
    ),
    "waits for one group too few": ("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();"),
    "weights into the stage in use": ("stage == 0 ? STAGES - 1 : stage - 1", "stage"),
    "sampled into the tile in use": ("(chunk + 1) % 2 * A_BYTES", "chunk % 2 * A_BYTES"),
    "places of another tap": ("(next.k - next.k0) * BM", "0 * BM"),
    "places of the next run of taps not computed": ("if (chunk + 1 < chunks && next.begins()) find_places(next);", ""),
    "no barrier behind the places": ("__syncthreads();  // the places are there", ""),
    "no barrier before the output tile": (
        "__syncthreads();  // the tiles are used up: their memory takes the output, [BN][BM]", "",
    ),
    "no barrier after the output tile": ("__syncthreads();  // the output tile is used up", ""),
    "no barrier behind the output's sums": ("__syncthreads();  // the output tile is there", ""),
    "pieces not exchanged in the copies": (
        "unsigned char* const to = tile + piece_at(row, piece);",
        "unsigned char* const to = tile + row * ROW_BYTES + piece * 16;",
    ),
    "step by addition, not exclusive or": ("A + (at.a ^ step << 5)", "A + (at.a + (step << 5))"),
    "halves of B exchanged": (
        "lane % 8 + lane / 16 * 8, lane / 8 % 2)", "lane % 8 + lane / 8 % 2 * 8, lane / 16)",
    ),
    "weights of a tap's tail from the next tap": (
        "const int last = piece * EL < count ? rows : 0;", "const int last = rows;",
    ),
    "samples of a tail not zero": ("const bool counts = c + run * VEC < width;", "const bool counts = true;"),
    "a corner outside is read": ("inside >> q & 1);\n  }", "true);\n  }"),
    "no NaN for a position that is none": (
        "at.nan ? acc_t(NOT_A_NUMBER) : modulation_of(s, from.mask, sample)", "modulation_of(s, from.mask, sample)",
    ),
    "an infinite mask as a factor of each weight": (
        "to.weight.v[q] = corner_weight(at.ly, at.lx, q);\n  return to;",
        "to.weight.v[q] = corner_weight(at.ly, at.lx, q) * to.cell.scale;\n  to.cell.scale = 1; return to;",
    ),
    "a grid that goes round once": ("tile < tiles; tile += gridDim.x", "tile < gridDim.x; tile += gridDim.x"),
}  # fmt: skip
IN_A_PROCESS = """
import resource, sys
from pathlib import Path
import test_cuda_forward as t
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an abort is what some wait for
print(t.under_every_schedule(t.Library(Path(sys.argv[1])), *sys.argv[2:]))
"""


def under_every_schedule(library: Library, line: str = "", instead: str = "") -> str:
    """Whether layers of halves are right.

    One on the largest tile: two tiles of 128 x 256, two runs of taps, a tail of channels. And one of a single channel,
    of which infinite masks are not mixed with others.
    """
    honest = compile.source
    if line:
        assert honest(KERNEL).count(line) == 1, f"{KERNEL}.cu has changed: {line!r}"
        compile.source = lambda stem: honest(stem).replace(line, instead)
    large, small = layer("float16", 3, 72, 9, 140, taps=4), layer("float16", 1, 1, 5, 1, taps=1, special=False)
    small["mask"][..., 1::2] = np.inf
    assert np.isinf(wanted(small)).any()
    for arrays in (small, large):
        want = wanted(arrays)
        for schedule in SCHEDULES:
            device = HostDevice(library, schedule=schedule, multiprocessors=1, max_blocks=1)
            if not is_right(run(device, arrays), want, "float16", 72 * 16):
                return "wrong"
    return "right"


def in_a_process(library: Library, *fault: str) -> subprocess.CompletedProcess[str]:
    """The layers in a process that may end in an abort."""
    command = [sys.executable, "-W", "ignore", "-c", IN_A_PROCESS, str(library.cache), *fault]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)


def test_without_a_planted_fault_the_layers_are_right(library: Library) -> None:
    result = in_a_process(library)
    assert result.stdout == "right\n", result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_caught(library: Library, fault: str) -> None:
    result = in_a_process(library, *PLANTED[fault])
    assert result.stdout == "wrong\n" or "HOST ERROR" in result.stderr or result.returncode == -signal.SIGSEGV, (
        result.stdout + result.stderr
    )
