"""What it costs to call a small layer from PyTorch and JAX: time over the plain function on NumPy arrays.

    python examples/overhead.py [--rounds 200] [--output overhead.json]

One deformable convolution, input (1, 16, 8, 8), 16 filters of 3x3, float32. In each round each way of calling it is
timed, the median of some calls in a row, so that what disturbs the machine disturbs all. Needs torch and JAX.
"""

import argparse
import json
import os
from datetime import UTC, datetime
from time import perf_counter

import jax
import numpy as np
import torch

import dcn_kernels
import dcn_kernels.jax
import dcn_kernels.torch
from dcn_kernels import environment

CALLS = 11
PLAIN = "plain function, NumPy"


def ways() -> dict:
    """Name -> a call that is done when it returns."""
    rng = np.random.default_rng(0)
    shapes = (1, 16, 8, 8), (1, 18, 8, 8), (16, 16, 3, 3)
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    tensors = [torch.from_numpy(array) for array in arrays]
    learned = [*tensors[:2], tensors[2].clone().requires_grad_()]
    of_jax = [jax.numpy.asarray(array) for array in arrays]
    jitted = jax.jit(lambda *values: dcn_kernels.jax.deform_conv2d(*values, padding=1))
    nearly_nothing = jax.jit(lambda *values: values[0] + 1)
    return {
        PLAIN: lambda: dcn_kernels.deform_conv2d(*arrays, padding=1),
        "plain function, torch tensors": lambda: dcn_kernels.deform_conv2d(*tensors, padding=1),
        "torch": lambda: dcn_kernels.torch.deform_conv2d(*tensors, padding=1),
        "torch, recording a gradient": lambda: dcn_kernels.torch.deform_conv2d(*learned, padding=1),
        "torch.ops, by torch's dispatcher": lambda: torch.ops.dcn_kernels.deform_conv2d(
            *tensors, None, None, [1, 1], [1, 1], [1, 1], "zeros", "float32", False, None
        ),
        "JAX, jitted": lambda: jitted(*of_jax).block_until_ready(),
        "JAX, jitted: x + 1 alone": lambda: nearly_nothing(*of_jax).block_until_ready(),
    }


def measure(rounds: int) -> dict[str, list[float]]:
    """Microseconds of a call, for each way one number a round."""
    calls = ways()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-3, rounds):  # the first rounds warm up
        for name, call in calls.items():
            times = []
            for _ in range(CALLS):
                start = perf_counter()
                call()
                times.append(1e6 * (perf_counter() - start))
            if number >= 0:
                found[name].append(float(np.median(times)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", help="file for the record, as JSON")
    options = parser.parse_args()
    found = measure(options.rounds)
    plain = np.array(found[PLAIN])
    rows = {}
    print(f"{'microseconds a call':34} median   least   over plain: median, quartiles, least")
    for name, samples in found.items():
        low, middle, high = np.quantile(samples - plain, [0.25, 0.5, 0.75])
        least = min(samples) - plain.min()  # both undisturbed
        median = float(np.median(samples))
        rows[name] = {"median_us": median, "over_plain_us": float(middle), "over_plain_least_us": float(least)}
        over = "" if name == PLAIN else f"{middle:+18.0f} {low:+9.0f} {high:+5.0f} {least:+6.0f}"
        print(f"{name:34} {median:6.0f} {min(samples):7.0f} {over}")
    if options.output:
        commit, dirty = environment.commit()
        record = {
            "kind": "examples/overhead.py",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": environment.device(),
            "load": os.getloadavg()[0],
            "versions": {**environment.versions(), "torch": torch.__version__, "jax": jax.__version__},
            "commit": commit,
            "dirty": dirty,
            "rows": rows,
            "samples_us": {name: [round(sample, 1) for sample in samples] for name, samples in found.items()},
        }
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(record, file)


if __name__ == "__main__":
    main()
