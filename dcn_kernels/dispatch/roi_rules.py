"""The conventions of the RoI operators, once for all backends: an operator's parameters as one definite rule.

Each backend knows what the names of `RULES` mean on one axis (reference/roi_pool.py, cpu/bins.py, cuda/bins.cuh);
which of them an operator's `mode`, `convention` or `aligned` stands for, and with which numbers, is said here alone.
"""

from __future__ import annotations

from typing import NamedTuple

# Where a RoI begins, how long it is, which pixels or points a bin has. Kernels know a rule by its place in this list.
RULES = ("max", "avg", "ps_rfcn", "ps_torchvision", "paper", "aligned", "legacy", "rfcn")
RFCN_SAMPLES = 4  # points of a bin along each axis where deform_roi_pool "rfcn" is given sampling_ratio 0


class Rule(NamedTuple):
    """How a RoI operator pools."""

    name: str  # one of RULES
    samples: int = 0  # points of a bin along each axis; 0: as many as it has pixels, or whole pixels
    maps: tuple[int, int] = (1, 1)  # score maps of each output channel; (1, 1): not position sensitive
    factor: float = 0.0  # what a shift is multiplied with besides the RoI's size: gamma, or trans_std

    @property
    def number(self) -> int:
        """The rule's place in RULES."""
        return RULES.index(self.name)


def roi_pool(mode: str) -> Rule:
    """Mode "max" or "avg"."""
    return Rule(mode)


def ps_roi_pool(group_size: tuple[int, int], convention: str) -> Rule:
    """Convention "rfcn" or "torchvision"."""
    return Rule(f"ps_{convention}", maps=group_size)


def roi_align(sampling_ratio: int, aligned: bool) -> Rule:
    """A `sampling_ratio` of 0 or -1 makes the grid follow the RoI."""
    return Rule("aligned" if aligned else "legacy", max(sampling_ratio, 0))


def ps_roi_align(output_size: tuple[int, int], sampling_ratio: int) -> Rule:
    """Always aligned; each bin has a score map of its own."""
    return Rule("aligned", max(sampling_ratio, 0), output_size)


def deform_roi_pool(gamma: float, sampling_ratio: int, convention: str) -> Rule:
    """Convention "paper", "mmcv" or "rfcn"."""
    if convention == "rfcn":
        return Rule("rfcn", sampling_ratio or RFCN_SAMPLES, factor=gamma)
    return Rule("aligned", sampling_ratio, factor=gamma) if convention == "mmcv" else Rule("paper", factor=gamma)


def deform_ps_roi_pool(group_size: tuple[int, int], sample_per_part: int, trans_std: float) -> Rule:
    """Position sensitive, R-FCN's."""
    return Rule("rfcn", sample_per_part, group_size, trans_std)
