"""The CPU kernels as on hosts of narrower vectors than this one: their operands are packed in narrower panels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dcn_kernels.cpu.columns import Shape, shape_from
from dcn_kernels.cpu.deform_conv_backward import pack_slab
from dcn_kernels.cpu.gemm import DEPTH
from dcn_kernels.cpu.jit import kernel
from dcn_kernels.cpu.slabs import array_from, described, numbers_of

SIZES = dict.fromkeys(Shape._fields, 0) | {"C": 40, "O": 250, "KH": 3, "KW": 3, "groups": 1}


@kernel
def pack(shape, weight, first, count, k0, k1, columns, packed, line):
    pack_slab(shape_from(shape), array_from(weight, 0), 0, first, count, k0, k1, columns, packed, line)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("width", [2, 4, 8, 16])  # from float64 on 128 bits to float32 on 512
def test_weights_of_a_slab_are_packed_in_panels_of_any_width(width: int, lanes: int) -> None:
    shape = Shape(**SIZES | {"lanes": lanes, "width": width, "panel": 2 * width})
    weight = np.random.default_rng(0).standard_normal((shape.O, shape.C, 9), np.float32)
    first, count, k0, k1 = 24, lanes - 1, 2, 9  # an odd number of taps: the last panel is one vector, where it can be
    columns = -(-(k1 - k0) * lanes // width) * width
    expected = np.zeros((shape.O, columns), np.float32)
    for k in range(k0, k1):
        expected[:, (k - k0) * lanes :][:, :count] = weight[:, first : first + count, k]
    parts = []
    for part in (expected[:DEPTH], expected[DEPTH:]):
        parts += [part[:, j : j + shape.panel].ravel() for j in range(0, columns, shape.panel)]
    packed, line = np.full(shape.O * columns, np.nan, np.float32), np.empty(lanes * 9, np.float32)
    call = numbers_of(shape), numbers_of(described(weight.reshape(shape.O, shape.C, 3, 3)))
    pack(*call, first, count, k0, k1, columns, packed, line)
    np.testing.assert_array_equal(packed, np.concatenate(parts))


AS_IF = """
import sys
import llvmlite.binding as llvm
features, without = llvm.get_host_cpu_features(), tuple(sys.argv[1].split(","))
for name in features:
    if name.startswith(without):
        features[name] = False
llvm.get_host_cpu_features = lambda: features
import numpy as np
from dcn_kernels import deform_conv2d, deform_conv2d_backward
from dcn_kernels.cpu import gemm
assert gemm.VECTOR_BYTES <= int(sys.argv[2]), gemm.VECTOR_BYTES
rng = np.random.default_rng(0)
for C, groups in ((32, 1), (24, 1), (48, 2)):
    shapes = {
        "input": (2, C, 7, 9), "offset": (2, 18, 7, 9), "weight": (22, C // groups, 3, 3), "bias": (22,),
        "mask": (2, 9, 7, 9),
    }
    arrays = {name: rng.standard_normal(shape).astype(sys.argv[3]) for name, shape in shapes.items()}
    grad = rng.standard_normal((2, 22, 7, 9)).astype(sys.argv[3])
    def everything(backend):
        given = {"padding": 1, "backend": backend}
        return {"out": deform_conv2d(**arrays, **given), **deform_conv2d_backward(grad, **arrays, **given)}
    expected = everything("reference")
    for name, got in everything("cpu").items():
        bound = 1e-5 if sys.argv[3] == "float32" else 1e-13
        assert np.abs(got - expected[name]).max() <= bound * np.abs(expected[name]).max(), (C, groups, name)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "widest", "dtype"), [("avx512", 32, "float64"), ("avx512,avx2,fma", 16, "float32")]
)
def test_results_are_right_on_a_host_of_narrower_vectors(without: str, widest: int, dtype: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_IF, without, str(widest), dtype],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


ON_TARGET = """
import numpy as np
from dcn_kernels import deform_conv2d, deform_conv2d_backward, roi_align, roi_align_backward
from dcn_kernels.cpu import threads
threads.FLOPS_A_THREAD = 1.0
rng = np.random.default_rng(0)
rois = np.array([[0, 0.3, 0.2, 5.1, 5.7], [0, 2, 1, 4, 6]])
for layer, dtype in enumerate(("float32",) * 12 + ("float16",)):
    H, W = rng.integers(4, 9, 2)
    shapes = {"input": (1, 32, H, W), "offset": (1, 18, H, W), "weight": (64, 32, 3, 3), "mask": (1, 9, H, W)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    grad = rng.standard_normal((1, 64, H, W)).astype(dtype)
    pooled = rng.standard_normal((2, 32, 3, 3)).astype(dtype)
    seen = {}
    for number in (1, 2, 3, 4, 7):
        threads.set_num_threads(number)
        got = {"out": deform_conv2d(**arrays, padding=1), **deform_conv2d_backward(grad, **arrays, padding=1)}
        got["align"] = roi_align(arrays["input"], rois.astype(dtype), 3)
        got["grad_align"] = roi_align_backward(pooled, arrays["input"], rois.astype(dtype), 3)["input"]
        for name, array in got.items():
            assert np.array_equal(array, seen.setdefault(name, array)), (layer, number, name)
    want = deform_conv2d(**arrays, padding=1, backend="reference")
    bound = 1e-5 if dtype == "float32" else 2e-3
    assert np.abs(seen["out"] - want).max() <= bound * np.abs(want).max(), (layer, dtype)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64-v2", "ivybridge", "haswell", "skylake-avx512"])
def test_targets_of_other_instructions_are_the_same_bits_at_every_number_of_threads(
    target: str, tmp_path: Path
) -> None:
    """On a target without fused multiply-add, half conversions or wide vectors, whatever this machine has."""
    flags = (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "").split()
    needed = {"haswell": {"avx2", "fma", "f16c"}, "skylake-avx512": {"avx512f", "avx512dq", "avx512bw"}}
    if not {"sse4_2", *(["avx", "f16c"] if target == "ivybridge" else []), *needed.get(target, ())} <= set(flags):
        pytest.skip(f"this machine does not run {target}'s instructions")
    done = subprocess.run(
        [sys.executable, "-c", ON_TARGET],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": target, "NUMBA_CPU_FEATURES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


HALVES = """
import numpy as np
from dcn_kernels.cpu import convert
from dcn_kernels.cpu.jit import kernel
assert not convert.HALF_INSTRUCTIONS

@kernel
def load(address, to):
    convert.load_run(to, 0, address, 2, len(to), convert.F16)

@kernel
def store(values, address):
    convert.store_run(values, 0, len(values), address, convert.F16)

def same(got, want, bits):
    nan = np.isnan(want)
    return (got.view(bits) == want.view(bits))[~nan].all() and np.isnan(got[nan]).all()

halves, floats = np.arange(1 << 16, dtype=np.uint16).view(np.float16), np.empty(1 << 16, np.float32)
load(halves.ctypes.data, floats)
assert same(floats, halves.astype(np.float32), "u4")
rng = np.random.default_rng(0)
drawn = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
ties = (drawn & 0x80003FFF) | rng.integers(90, 145, 1 << 20, dtype=np.uint32) << 23
for floats in (drawn.view(np.float32), ties.view(np.float32)):
    stored = np.empty(len(floats), np.float16)
    store(floats, stored.ctypes.data)
    with np.errstate(all="ignore"):
        assert same(stored, floats.astype(np.float16), "u2")
"""


def test_halves_are_converted_in_integers_where_the_target_has_no_instructions_for_them(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HALVES],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
