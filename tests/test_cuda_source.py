"""The CUDA sources as text, what NVRTC makes of them, and what cuBLAS is asked for: all without a GPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from cuda_host import primitives

from dcn_kernels.cuda import compile
from dcn_kernels.cuda.device import Device
from dcn_kernels.cuda.taps import CONV
from dcn_kernels.dtypes import DTYPES

FOLDER = compile.FOLDER
RUN_BY_TESTS_ALONE = {"matrix_units.cuh"}  # no kernel uses it yet: tests/test_matrix_units.py runs it


@pytest.fixture(scope="module")
def nvrtc() -> compile.NVRTC:
    """The compiler."""
    try:
        return compile.NVRTC()
    except compile.CompilerNotFound as error:
        pytest.skip(str(error))


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that may be changed."""
    shutil.copytree(FOLDER, tmp_path / "cuda")
    monkeypatch.setattr(compile, "FOLDER", tmp_path / "cuda")
    return tmp_path / "cuda"


def append(path: Path, text: str) -> None:
    """Edit a file."""
    path.write_text(path.read_text() + text)


def test_every_kernel_file_is_compiled_and_has_its_launcher() -> None:
    assert {path.stem for path in FOLDER.glob("*.cu")} == set(compile.FILES)
    for stem in compile.FILES:
        assert compile.kernel_names(compile.source(stem)), stem
        for vector_atomics in (False, True):
            builds = [compile.definitions(flags) for flags in compile.variants(stem, vector_atomics)]
            assert builds and len(set(builds)) == len(builds), stem


@pytest.mark.parametrize("stem", compile.FILES)
def test_every_header_is_pasted_in(stem: str) -> None:
    assert '#include "' not in compile.source(stem)


@pytest.mark.parametrize("header", sorted({path.name for path in FOLDER.glob("*.cuh")} - RUN_BY_TESTS_ALONE))
def test_edited_header_changes_what_is_compiled(copied: Path, header: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's cache is keyed by the text that it is given: what it is given must hold the edit."""
    given: list[str] = []

    def raw_module(code: str, options: tuple[str, ...], backend: str) -> SimpleNamespace:
        given.append(code)
        return SimpleNamespace(get_function=lambda name: None)

    cupy = SimpleNamespace(RawModule=raw_module)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    users = [stem for stem in compile.FILES if f'"{header}"' in compile.source(stem)]
    assert users
    for stem in users:
        compile._function.__wrapped__(stem, (), "copy")
    append(copied / header, "// edited\n")
    for stem in users:
        compile._function.__wrapped__(stem, (), "copy")
    before, after = given[: len(users)], given[len(users) :]
    assert all(one != two and "// edited" in two for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("stem", ["common", "deform_conv"])
def test_error_names_file_and_line(copied: Path, nvrtc: compile.NVRTC, stem: str) -> None:
    path = next(copied.glob(f"{stem}.cu*"))
    lines = path.read_text().count("\n")
    append(path, "int broken = ;\n")
    with pytest.raises(compile.CompileError, match=rf"{re.escape(path.name)}\({lines + 1}\): error") as caught:
        nvrtc.compile("deform_conv", compile.variants("deform_conv", False)[0], "sm_90")
    assert "deform_conv.cu -DSPLIT=0" in str(caught.value) and "sm_90" in str(caught.value)


def spills(archs: tuple[str, ...]) -> None:
    """Compile everything and look at the report."""
    seen = []
    rows = compile.check_kernels(archs, lambda done, total, what: seen.append((done, total)))
    assert {row["arch"] for row in rows} == set(archs)
    assert {row["kernel"].partition(".")[0] for row in rows} == set(compile.FILES)
    assert {row["dtype"] for row in rows} == {"float16", "bfloat16", "float32", "float64", "none"}
    assert seen[-1][0] == seen[-1][1] == len(seen)
    for row in rows:
        assert 0 < row["registers"] <= 255, row
        assert row["spill_bytes"] == row["stack_bytes"] == 0, row
        assert row["shared_bytes"] <= 48 << 10, row


def test_kernels_compile_without_spilling(nvrtc: compile.NVRTC) -> None:
    spills(("sm_75", "sm_90", "sm_120"))


@pytest.mark.slow
def test_kernels_compile_without_spilling_for_the_other_architectures(nvrtc: compile.NVRTC) -> None:
    spills(tuple(arch for arch in compile.ARCHS if arch not in ("sm_75", "sm_90", "sm_120")))


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_kernel_that_compares_the_stand_in_with_a_gpu_compiles(
    nvrtc: compile.NVRTC, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "source", lambda stem: primitives.source())
    nvrtc.compile("primitives", {"VECTOR_ATOMICS": arch == "sm_90"}, arch)


def test_spill_is_reported(copied: Path, nvrtc: compile.NVRTC) -> None:
    """A kernel that asks for more registers than the bound on its blocks leaves."""
    path = copied / "common.cuh"
    path.write_text(path.read_text().replace("__launch_bounds__(threads, 1)", "__launch_bounds__(threads, 8)"))
    flags = next(flags for flags in compile.variants("deform_conv", True) if flags["VEC"] == 8)
    rows = compile._check(nvrtc, "deform_conv", flags, "sm_90")
    assert any(row["spill_bytes"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("scalar_t", "VEC", "vector"),
    [("float", 4, r"ld\.global\.nc\.v4\.[fbu]32"), ("__half", 8, r"ld\.global\.nc\.v4\.[fbu]32"),
     ("__nv_bfloat16", 8, r"ld\.global\.nc\.v4\.[fbu]32"), ("double", 2, r"ld\.global\.nc\.v2\.[fbu]64")],
)  # fmt: skip
def test_vectors_are_loaded_by_one_instruction_of_16_bytes(
    nvrtc: compile.NVRTC, scalar_t: str, VEC: int, vector: str
) -> None:
    flags = next(
        flags
        for flags in compile.variants("deform_conv", True)
        if flags["scalar_t"] == flags["offset_t"] == flags["mask_t"] == scalar_t and flags["VEC"] == VEC
    )
    ptx = nvrtc.compile("deform_conv", flags, "sm_90").ptx
    columns = ptx[ptx.index(".entry columns") : ptx.index(".entry gradients")]
    assert len(re.findall(vector, columns)) >= 4  # the corners


def test_input_gradient_is_added_by_vectors_where_the_architecture_can(nvrtc: compile.NVRTC) -> None:
    for arch, can in (("sm_75", False), ("sm_89", False), ("sm_90", True), ("sm_120", True)):
        flags = next(
            flags
            for flags in compile.variants("deform_conv", compile.capability(arch) >= (9, 0))
            if flags["scalar_t"] == "float" and flags["VEC"] == 4
        )
        ptx = nvrtc.compile("deform_conv", flags, arch).ptx
        assert bool(re.search(r"(red|atom)\.global(\.\w+)*\.v4", ptx)) == can, arch


def test_not_a_number_is_not_optimised_away(nvrtc: compile.NVRTC) -> None:
    """Of all options that assume finite numbers none is given; sm_90's code still compares y with itself."""
    ptx = nvrtc.compile("cells", compile.variants("cells", True)[0], "sm_90").ptx
    assert re.search(r"setp\.(nan|num)", ptx)


# ---------------------------------------------------------------- what cuBLAS is asked for


class GPUArray(np.ndarray):
    """A NumPy array that tells its address as CuPy's do."""

    @property
    def data(self) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data)


TYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}  # cudaDataType


def at(pointer: int, kind: int, rows: int, columns: int, leading: int) -> np.ndarray:
    """A matrix stored by columns at an address."""
    dtype = np.dtype(TYPES[kind])
    assert leading >= rows
    nbytes = (leading * (columns - 1) + rows) * dtype.itemsize
    memory = np.frombuffer((ctypes.c_char * nbytes).from_address(pointer), dtype)
    steps = (dtype.itemsize, leading * dtype.itemsize)
    return np.lib.stride_tricks.as_strided(memory, (rows, columns), steps)


def gemm(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB, beta, C, Ctype, ldc,
    strideC, batch, compute, algorithm,
):  # fmt: skip
    """cublasGemmStridedBatchedEx by its definition: C = alpha op(A) op(B) + beta C, all stored by columns."""
    assert MODE[handle] == 16, "sums of halves in float32, float32 in float32"
    real = np.float64 if compute == 70 else np.float32
    one, keep = (float(np.frombuffer((ctypes.c_char * 8).from_address(p), real)[0]) for p in (alpha, beta))
    for i in range(batch):
        a = at(A + i * strideA * np.dtype(TYPES[Atype]).itemsize, Atype, *((k, m) if transa else (m, k)), lda)
        b = at(B + i * strideB * np.dtype(TYPES[Btype]).itemsize, Btype, *((n, k) if transb else (k, n)), ldb)
        c = at(C + i * strideC * np.dtype(TYPES[Ctype]).itemsize, Ctype, m, n, ldc)
        product = one * (a.T if transa else a).astype(float) @ (b.T if transb else b).astype(float)
        c[...] = product + (keep * c.astype(float) if keep else 0)
    gemm.compute.append(compute)


gemm.compute = []


HANDLE, CALLERS_MODE = 11, 3  # CUBLAS_TF32_TENSOR_OP_MATH
MODE = {HANDLE: CALLERS_MODE}


class CUBLASError(RuntimeError):
    pass


@pytest.fixture
def cublas(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In the place of CuPy's cuBLAS; in its place alone, so that nothing else of CuPy is used."""
    found = SimpleNamespace(
        gemmStridedBatchedEx=gemm, getMathMode=MODE.get, setMathMode=MODE.__setitem__, CUBLASError=CUBLASError
    )
    cuda = SimpleNamespace(device=SimpleNamespace(get_cublas_handle=lambda: HANDLE))
    for name, module in {
        "cupy": SimpleNamespace(cuda=cuda), "cupy_backends": SimpleNamespace(), "cupy_backends.cuda": SimpleNamespace(),
        "cupy_backends.cuda.libs": SimpleNamespace(cublas=found), "cupy_backends.cuda.libs.cublas": found,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [("float32", "float32"), ("float64", "float64"), ("float16", "float32"), ("bfloat16", "bfloat16")],
)
@pytest.mark.parametrize("accumulate", [False, True])
def test_cublas_is_asked_for_the_product(dtype: str, out_dtype: str, accumulate: bool, cublas: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)

    def matrices(batch: int, rows: int, columns: int, kind: str, layout: str) -> np.ndarray:
        shape = {"rows": (batch, rows, columns), "columns": (batch, columns, rows), "wide": (batch, rows, columns + 3),
                 "batch inside": (rows, batch, columns)}[layout]  # fmt: skip
        array = rng.integers(-3, 4, shape).astype(DTYPES[kind]).view(GPUArray)
        if layout == "columns":
            return array.transpose(0, 2, 1)
        return array.transpose(1, 0, 2) if layout == "batch inside" else array[:, :, :columns]

    layouts = ("rows", "columns", "wide", "batch inside")
    for batch, M, N, K in ((1, 5, 4, 3), (2, 3, 7, 4), (3, 1, 4, 2), (2, 4, 1, 3), (2, 3, 3, 1), (1, 1, 1, 1)):
        for left, right, to in itertools.product(layouts, layouts, ("rows", "wide", "batch inside")):
            for shared in (False, True):
                a = matrices(1 if shared else batch, M, K, dtype, left)
                b, out = matrices(batch, K, N, dtype, right), matrices(batch, M, N, out_dtype, to)
                want = a.astype(float) @ b.astype(float) + (out.astype(float) if accumulate else 0)
                if not accumulate:
                    out[...] = np.nan
                Device.matmul(a, b, out, accumulate=accumulate, op="deform_conv2d")
                assert np.array_equal(out.astype(float), want)
    gemm.compute.clear()
    Device.matmul(a, b, out, tf32=True, op="deform_conv2d")
    Device.matmul(a, b, out, op="deform_conv2d")
    # 77: float32 through TF32; 70: float64; 68: sums in float32
    assert gemm.compute == {"float32": [77, 68], "float64": [70, 70]}.get(dtype, [68, 68])
    assert MODE == {HANDLE: CALLERS_MODE}, "the handle is CuPy's: its mode is put back"


@pytest.mark.parametrize(
    "error", [CUBLASError("NOT_SUPPORTED"), NotImplementedError("stream capture: NOT_SUPPORTED by CuPy")], ids=repr
)
def test_failed_product_names_operator_and_sizes(error: Exception, cublas: SimpleNamespace) -> None:
    def fail(*_: object) -> None:
        raise error

    cublas.gemmStridedBatchedEx = fail
    a, b, out = (np.zeros(shape, np.float32).view(GPUArray) for shape in ((2, 3, 4), (2, 4, 5), (2, 3, 5)))
    with pytest.raises(RuntimeError, match=r"deform_conv2d: 2 products of 3 x 4 by 4 x 5 float32 .*NOT_SUPPORTED"):
        Device.matmul(a, b, out, op="deform_conv2d")
    assert MODE == {HANDLE: CALLERS_MODE}


def test_absent_arrays_are_null_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy passes None as 0xffffffff (its issue 9046); scalars and structs go through as they are."""
    given: list[tuple[object, ...]] = []
    errors = SimpleNamespace(CUDADriverError=KeyError, CUDARuntimeError=KeyError, CompileException=KeyError)
    monkeypatch.setitem(
        sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(driver=errors, runtime=errors, compiler=errors))
    )
    monkeypatch.setattr(compile, "kernel", lambda *_: lambda grid, block, args: given.append(args))
    device = Device.__new__(Device)
    device.max_blocks = 7
    array, struct = np.zeros(3), np.zeros(1, CONV)
    device.launch("deform_conv", "columns", {}, 1, 256, (array, None, np.int32(4), struct), op="deform_conv2d")
    first, absent, number, last = given[0]
    assert first is array and last is struct and number == 4
    assert absent == 0 and absent.itemsize == ctypes.sizeof(ctypes.c_void_p) and type(absent).__name__ == "uint64"


def test_failed_launch_names_operator_and_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed(Exception):
        pass

    def launch(*_: object) -> None:
        raise Failed("CUDA_ERROR_INVALID_VALUE")

    cuda = SimpleNamespace(
        driver=SimpleNamespace(CUDADriverError=Failed),
        runtime=SimpleNamespace(CUDARuntimeError=ValueError),
        compiler=SimpleNamespace(CompileException=ValueError),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(compile, "kernel", lambda *_: launch)
    device = Device.__new__(Device)
    device.max_blocks = 7
    with pytest.raises(
        RuntimeError, match=r"deform_conv2d: kernel columns of deform_conv.cu .*CUDA_ERROR_INVALID_VALUE"
    ):
        device.launch("deform_conv", "columns", {}, 100, 256, (), op="deform_conv2d")
