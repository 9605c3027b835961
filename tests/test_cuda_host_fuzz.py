"""The calls of `dcn-check fuzz` on the CUDA kernels, run on the CPU: plain, and in slow tests under the sanitizers."""

from __future__ import annotations

import random

import pytest
import test_cuda_host as host
from conftest import has_kernels
from cuda_host.host import SCHEDULES, HostDevice, Library

from dcn_kernels import OPS
from dcn_kernels.check.drawn_calls import drawn
from dcn_kernels.check.wrong_calls import wrong
from dcn_kernels.dispatch.row import Op
from dcn_kernels.dtypes import DTYPES, HALVES

library = host.library  # the fixture
pytestmark = pytest.mark.cuda_host
ROWS = [pytest.param(op, id=op.name) for op in OPS.values() if has_kernels(op)]


def failures(library: Library, op: Op, seed: int, count: int, values: str) -> list[str]:
    """What is wrong with drawn calls, each on a drawn stand-in for a GPU."""
    found = []
    for number in range(count):
        call, pick = drawn(op, (seed, number), values), random.Random(number)
        for name, value in call.choices.items():
            if value == "unaligned":  # a GPU's memory is aligned to its elements: the hardware allows nothing else
                call.choices[name] = "contiguous"
        how = {
            "schedule": pick.choice(list(SCHEDULES)),
            "seed": number,
            "capability": pick.choice([(7, 5), (8, 0), (9, 0)]),
            "max_blocks": pick.choice([1, 2, 5, 1000]),
            "cache_bytes": pick.choice([1 << 20, 48 << 20]),
        }
        # in half precision the samples too are rounded, before the product: one rounding more
        slack = 2**0.5 if DTYPES[call.dtype] in HALVES else 1.0
        with pytest.MonkeyPatch.context() as patch:
            host.install(HostDevice(library, **how), patch)
            problem = wrong(call, host.NAME, slack=slack)
        if problem:
            found.append(f"{problem} {how} {call.recipe}")
    return found


@pytest.mark.parametrize("op", ROWS)
@pytest.mark.parametrize("values", ["finite", "all"])
def test_drawn_calls_are_those_of_the_reference(library: Library, op: Op, values: str) -> None:
    assert failures(library, op, 1, 12, values) == []


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("op", ROWS)
def test_many_drawn_calls_are_those_of_the_reference(library: Library, op: Op) -> None:
    assert failures(library, op, 2, 300, "all") == []


IN_A_PROCESS = """
import sys
from pathlib import Path
import test_cuda_host as t
import test_cuda_host_fuzz as fuzz
library = t.Library(Path(sys.argv[1]), t.SANITIZER)
for name in sys.argv[3:]:
    for failure in fuzz.failures(library, fuzz.OPS[name], 3, int(sys.argv[2]), "all"):
        print(failure)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "op",
    [
        op if op.name in ("offset_sample2d", "roi_align") else pytest.param(op, marks=pytest.mark.nightly)
        for op in (row.values[0] for row in ROWS)
    ],
    ids=lambda op: op.name,
)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_say_nothing_of_drawn_calls(library: Library, op: Op, sanitizer: str) -> None:
    """ "address" is built with the undefined-behaviour sanitizer too."""
    result = host.run_in_a_process(library, IN_A_PROCESS, "40", op.name, sanitizer=sanitizer)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stdout + result.stderr[-4000:]
