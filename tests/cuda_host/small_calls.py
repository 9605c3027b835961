"""Small calls that together run every kernel: on the stand-in, on a GPU, and there under compute-sanitizer."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from conftest import Backend, assert_close, cast

import dcn_kernels
from dcn_kernels.check.calls import output_shape, reduction_length
from dcn_kernels.cuda import compile
from dcn_kernels.dtypes import DTYPES


def every_kernel() -> set[tuple[str, str]]:
    """(file, kernel) of all."""
    return {(stem, name) for stem in compile.FILES for name in compile.kernel_names(compile.source(stem))}


def run(backend: str) -> None:
    """Forward and all gradients, in every dtype, with and without atomics; every option in float32."""
    reference, tested = Backend("reference"), Backend(backend)
    for op in dcn_kernels.OPS.values():
        if find_spec(f"dcn_kernels.cuda.{op.module}") is None:
            continue
        samples = op.samples(0)
        first = max(samples, key=lambda sample: len(sample.arrays))
        for dtype in DTYPES:
            for sample in samples if dtype == "float32" else [first]:
                sizes, shape = output_shape(op, sample)
                arrays = cast(sample, op, dtype)
                grad_output = np.round(np.random.default_rng(5).standard_normal(shape), 2).astype(DTYPES[dtype])
                got = tested.forward(op, arrays, sample.params)
                length = 2 * reduction_length(op, sizes, "forward", got.size)
                assert_close(
                    got, reference.forward(op, arrays, sample.params), dtype, length, f"{op.name} {sample.label}"
                )
                want = reference.backward(op, {"grad_output": grad_output, **arrays}, sample.params)
                for more in ({"deterministic": False}, {"deterministic": True}) if op.scatters else ({},):
                    grads = tested.backward(op, {"grad_output": grad_output, **arrays}, {**sample.params, **more})
                    for name, grad in grads.items():
                        length = 2 * reduction_length(op, sizes, "backward", grad.size)
                        assert_close(grad, want[name], dtype, length, f"{op.name} {sample.label} grad_{name}")
