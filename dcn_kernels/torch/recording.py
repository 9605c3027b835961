"""Note which layers a PyTorch program calls: ours, and torchvision's, which are watched as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dcn_kernels
from dcn_kernels.ops.recording import LIMITS, Array, Reach, Recording, offsets_of
from dcn_kernels.torch.ops import DTYPES, Arguments, arguments_of

Arguments_ = dict[str, Any]


def _pooled(names: str) -> Callable[..., tuple[Arguments_, Arguments_]]:
    def read(input: Any, rois: Any, scale: float, height: int, width: int, *more: Any) -> tuple[Arguments_, Arguments_]:
        params = {"output_size": (height, width), "spatial_scale": scale, **dict(zip(names.split(), more, strict=True))}
        return {"input": input, "rois": rois}, params

    return read


def _deform_conv(
    input: Any, weight: Any, offset: Any, mask: Any, bias: Any, *numbers: Any
) -> tuple[Arguments_, Arguments_]:
    arrays = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask if numbers[-1] else None}
    return arrays, {"stride": numbers[0:2], "padding": numbers[2:4], "dilation": numbers[4:6]}


# torchvision's operators -> their arguments as ours.
TORCHVISION: dict[str, Callable[..., tuple[Arguments_, Arguments_]]] = {
    "deform_conv2d": _deform_conv,
    "roi_align": _pooled("sampling_ratio aligned"),
    "roi_pool": _pooled(""),
    "ps_roi_align": _pooled("sampling_ratio"),
    "ps_roi_pool": _pooled(""),
}


@cache
def _arguments(name: str) -> Arguments:
    return arguments_of(dcn_kernels.OPS[name])


class _Watch(TorchDispatchMode):
    """Sees every operator that torch calls, after autograd, and calls it unchanged."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._opname, kwargs or {}
        if func.namespace == "dcn_kernels" and name in dcn_kernels.OPS:
            values = [
                *args,
                *(kwargs[each.name] for each in func._schema.arguments[len(args) :] if each.name in kwargs),
            ]
            self._note(name, *_arguments(name).split(values))
        elif func.namespace == "torchvision" and name in TORCHVISION:
            self._note(name, *TORCHVISION[name](*args, **kwargs))
        return func(*args, **kwargs)

    def _note(self, name: str, arrays: Arguments_, params: Arguments_) -> None:
        if name == "ps_roi_pool" and "convention" not in params:
            params["convention"] = "torchvision"
        given = {each: array for each, array in arrays.items() if array is not None}
        described = {
            each: Array(tuple(array.shape), str(array.dtype).removeprefix("torch."), tuple(array.stride()))
            for each, array in given.items()
        }
        if not all(isinstance(size, int) for array in described.values() for size in array.shape):
            return  # traced with sizes left open
        self.recording.add(name, described, params, _reach(offsets_of(dcn_kernels.OPS[name], given)))


def _reach(offsets: Any) -> Reach | None:
    """How far offsets reach; None where there are none, or none that can be read, as in a traced program."""
    if offsets is None or offsets.dtype not in DTYPES or type(offsets) not in (torch.Tensor, torch.nn.Parameter):
        return None
    if not offsets.numel():
        return None
    values = offsets.detach().double()
    size = values.abs()
    within = [(size <= limit).sum() for limit in LIMITS]
    total, squares, *counts = torch.stack(
        [values.sum(), (values * values).sum(), *within]
    ).tolist()  # one wait for a GPU
    return Reach(offsets.numel(), total, squares, [int(count) for count in counts])


@contextmanager
def record_layers(path: str | Path | None = None) -> Iterator[Recording]:
    """Note every forward call of our functions and of torchvision.ops', within.

    Of each: the operator, its sizes, dtype and options, how the input lies in memory, how often it was called, and of
    its offsets the standard deviation and the shares within 1, 4 and 16 (in pixels, for a convolution). Nothing else of
    the tensors' contents. All of torch's operators pass through Python meanwhile, which takes them some microseconds
    each, and the offsets are read, which waits for a GPU.

    Parameters
    ----------
    path : str or Path, optional
        Where the layers are written at the end, also after an exception, for ``dcn-bench profile --shapes``. Nothing is
        written where there was no call.

    Yields
    ------
    Recording
        `toml()` is what is written, `calls` what was seen so far.

    Examples
    --------
    >>> import torch
    >>> from dcn_kernels.torch import DeformConv2dPack, record_layers
    >>> with record_layers() as recording:
    ...     _ = DeformConv2dPack(3, 8, 3, padding=1)(torch.rand(1, 3, 16, 16))
    >>> print(recording.toml().splitlines()[2])
    [layers."deform_conv2d 1"]
    """
    recording = Recording()
    try:
        with _Watch(recording):
            yield recording
    finally:
        if path is not None and recording.calls:
            recording.write(path)
