"""The conventions of the RoI operators stand once, in dispatch/roi_rules.py; kernels know a rule by its number."""

from __future__ import annotations

import inspect
import re

import pytest

import dcn_kernels
from dcn_kernels.check.gradients import not_written
from dcn_kernels.cpu import bins
from dcn_kernels.cuda.compile import FOLDER
from dcn_kernels.dispatch import roi_rules
from dcn_kernels.dispatch.call import function, parameters_for

BACKENDS = ("reference", "cpu", "cuda")


def test_kernels_number_the_rules_alike() -> None:
    assert [getattr(bins, name.upper()) for name in roi_rules.RULES] == list(range(len(roi_rules.RULES)))
    enumerated = re.search(r"enum rule_t \{([^}]*)\}", (FOLDER / "bins.cuh").read_text())
    assert enumerated and [name.strip().lower() for name in enumerated[1].split(",")] == list(roi_rules.RULES)


def test_every_parameter_of_a_convention_becomes_a_rule() -> None:
    assert {roi_rules.roi_pool(mode).name for mode in ("max", "avg")} == {"max", "avg"}
    assert roi_rules.ps_roi_pool((3, 2), "torchvision") == ("ps_torchvision", 0, (3, 2), 0.0)
    assert roi_rules.roi_align(-1, True) == ("aligned", 0, (1, 1), 0.0)
    assert roi_rules.roi_align(2, False) == ("legacy", 2, (1, 1), 0.0)
    assert roi_rules.ps_roi_align((7, 5), 0) == ("aligned", 0, (7, 5), 0.0)
    assert roi_rules.deform_roi_pool(0.1, 0, "rfcn") == ("rfcn", 4, (1, 1), 0.1)
    assert roi_rules.deform_roi_pool(0.1, 3, "mmcv") == ("aligned", 3, (1, 1), 0.1)
    assert roi_rules.deform_roi_pool(0.1, 3, "paper") == ("paper", 0, (1, 1), 0.1)
    assert roi_rules.deform_ps_roi_pool((7, 7), 4, 0.2) == ("rfcn", 4, (7, 7), 0.2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", dcn_kernels.OPS)
def test_a_backend_takes_the_row_s_parameters_and_no_others(name: str, direction: str, backend: str) -> None:
    """What the dispatcher passes is what the function names: a forgotten or misspelt one is a TypeError."""
    op = dcn_kernels.OPS[name]
    if not_written(op, backend):
        pytest.skip(not_written(op, backend))
    kernels = inspect.signature(function(op, direction, backend))
    assert all(parameter.kind != parameter.VAR_KEYWORD for parameter in kernels.parameters.values())
    arrays = [*(["grad_output"] if direction == "backward" else []), *op.arrays]
    params = parameters_for(op, direction, backend, op.parameters(op.samples(0)[0].params))
    more = {"out": None} if direction == "forward" else {"wrt": ()}
    kernels.bind(**dict.fromkeys(arrays), **params, **more)
