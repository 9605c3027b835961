"""The CUDA sources as text, what NVRTC makes of them, and how they are started: all without a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_host import primitives

from dcn_kernels.cuda import compile
from dcn_kernels.cuda.device import Device
from dcn_kernels.cuda.taps import CONV

FOLDER = compile.FOLDER


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
        for arch in compile.ARCHS:
            builds = [compile.definitions(flags) for flags in compile.variants(stem, compile.capability(arch))]
            assert builds and len(set(builds)) == len(builds), stem


@pytest.mark.parametrize("stem", compile.FILES)
def test_every_header_is_pasted_in(stem: str) -> None:
    assert '#include "' not in compile.source(stem)


@pytest.mark.parametrize("header", sorted(path.name for path in FOLDER.glob("*.cuh")))
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


@pytest.mark.parametrize("stem", ["common", "deform_conv_forward"])
def test_error_names_file_and_line(copied: Path, nvrtc: compile.NVRTC, stem: str) -> None:
    path = next(copied.glob(f"{stem}.cu*"))
    lines = path.read_text().count("\n")
    append(path, "int broken = ;\n")
    with pytest.raises(compile.CompileError, match=rf"{re.escape(path.name)}\({lines + 1}\): error") as caught:
        nvrtc.compile("deform_conv_forward", compile.variants("deform_conv_forward", (9, 0))[0], "sm_90")
    assert "deform_conv_forward.cu -DBM=" in str(caught.value) and "sm_90" in str(caught.value)


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
    spills(("sm_90",))


@pytest.mark.slow
def test_kernels_compile_without_spilling_for_the_other_architectures(nvrtc: compile.NVRTC) -> None:
    spills(tuple(arch for arch in compile.ARCHS if arch != "sm_90"))


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
    flags = next(flags for flags in compile.variants("depthwise_backward", (9, 0)) if flags["VEC"] == 8)
    rows = compile._check(nvrtc, "depthwise_backward", flags, "sm_90")
    assert any(row["spill_bytes"] > 0 for row in rows)


@pytest.mark.parametrize("stem", ["deform_conv_forward", "deform_conv_backward", "depthwise", "depthwise_backward"])
@pytest.mark.parametrize(("scalar_t", "VEC"), [("float", 4), ("__half", 8), ("__nv_bfloat16", 8), ("double", 2)])
def test_corners_are_loaded_by_one_instruction_of_16_bytes(
    nvrtc: compile.NVRTC, stem: str, scalar_t: str, VEC: int
) -> None:
    flags = next(
        flags
        for flags in compile.variants(stem, (9, 0))
        if flags["scalar_t"] == flags["offset_t"] == flags["mask_t"] == scalar_t and flags["VEC"] == VEC
    )
    assert len(re.findall(r"ld\.global\.nc\.v4\.u32", nvrtc.compile(stem, flags, "sm_90").ptx)) >= 4


def test_input_gradient_is_added_by_vectors_where_the_architecture_can(nvrtc: compile.NVRTC) -> None:
    for arch, can in (("sm_75", False), ("sm_89", False), ("sm_90", True), ("sm_120", True)):
        flags = next(
            flags
            for flags in compile.variants("deform_conv_backward", compile.capability(arch))
            if flags["scalar_t"] == "float" and flags["VEC"] == 4
        )
        ptx = nvrtc.compile("deform_conv_backward", flags, arch).ptx
        assert bool(re.search(r"(red|atom)\.global(\.\w+)*\.v4", ptx)) == can, arch


def test_not_a_number_is_not_optimised_away(nvrtc: compile.NVRTC) -> None:
    """Of all options that assume finite numbers none is given; sm_90's code still compares y with itself."""
    ptx = nvrtc.compile("cells", compile.variants("cells", (9, 0))[0], "sm_90").ptx
    assert re.search(r"setp\.(nan|num)", ptx)


# ---------------------------------------------------------------- launches


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
    device.launch("staging", "copy", {}, 1, 256, (array, None, np.int32(4), struct), op="deform_conv2d")
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
    with pytest.raises(RuntimeError, match=r"deform_conv2d: kernel copy of staging.cu .*CUDA_ERROR_INVALID_VALUE"):
        device.launch("staging", "copy", {}, 100, 256, (), op="deform_conv2d")
