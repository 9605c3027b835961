"""Deformable convolution (paper, Eq. 2; backward Eq. 7) with the modulation of version 2: public functions and row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.arrays import taken_in
from dcn_kernels.dispatch.call import call
from dcn_kernels.dispatch.row import Op, Params, Sizes
from dcn_kernels.ops.samples import deform_conv as samples

BORDERS = ("zeros", "msra", "edge")
PRECISIONS = ("float32", "ieee", "tf32")
LAYOUTS = ("interleaved", "split_yx", "split_xy")


def deform_conv2d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Any = None,
    *,
    border: str = "zeros",
    precision: str = "float32",
    deterministic: bool = False,
    workspace_bytes: int | None = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    r"""Deformable convolution, with a mask also modulated (version 2).

    .. math::  y(p_0) = b + \sum_{p_n \in R} w(p_n) \cdot m_n(p_0) \cdot x(p_0 + p_n + \Delta p_n)

    where ``x`` at a fractional position is bilinear: ``x(p) = sum_q G(q, p) x(q)``,
    ``G = g(q_y, p_y) g(q_x, p_x)``, ``g(a, b) = max(0, 1 - |a - b|)``.

    Parameters
    ----------
    input : array (N, C, H, W)
        float16, bfloat16, float32 or float64; any strides, on a CPU or a GPU.
    offset : array (N, 2*OG*KH*KW, OH, OW)
        How far each tap moves, in pixels of the input: per offset group and tap (row-major) ``dy, dx``
        interleaved, y first. `convert_offsets` takes other layouts. The input's dtype, or float32 beside
        half-precision inputs. Input channel c belongs to offset group c // (C/OG).
    weight : array (O, C/groups, KH, KW)
        ``groups`` is inferred from its second size, ``OG`` from the offset's.
    bias : array (O,), optional
    stride, padding, dilation : int or (h, w)
        In pixels of the input.
    mask : array (N, OG*KH*KW, OH, OW), optional
        Factor of each sample (version 2). Dtype as for `offset`.
    border : {"zeros", "msra", "edge"}
        What a position near or beyond the image reads. "zeros": pixels outside count as 0 (Eq. 3; torchvision,
        mmcv, ONNX). "msra": 0 outside the image, and clamped within the last pixel (MXNet's operator of 2017).
        "edge": positions are clamped to the image.
    precision : {"float32", "ieee", "tf32"}
        How a GPU multiplies float32 matrices: with float32-like accuracy on the matrix units, in plain float32,
        or in TF32.
    deterministic : bool
        On a GPU: bitwise repeatable. The CPU backend always is, whatever the number of threads.
    workspace_bytes : int, optional
        Bound of a GPU's temporary memory; None means 64 MiB.
    out : array (N, O, OH, OW), optional
        Where the result is written: C-contiguous, of the input's dtype, overlapping no input.
    backend : {None, "reference", "cpu", "cuda"}
        None: by the arrays' device.

    Returns
    -------
    array (N, O, OH, OW)
        Of the caller's kind and the input's dtype, with
        ``OH = floor((H + 2*padding - dilation*(KH-1) - 1) / stride) + 1``.

    Raises
    ------
    ValueError
        A shape or value does not fit; the message names the argument, what was expected and what came.
    TypeError
        Not an array, a dtype that does not fit, or arrays of two frameworks or on two devices.

    Notes
    -----
    Equation 2 of arXiv 1703.06211; the mask is that of arXiv 1811.11168. Coordinates and interpolation weights are
    float32 (float64 for float64 inputs) also for half-precision arrays. A NaN coordinate makes its sample NaN, an
    infinite one is outside. A NaN or infinite mask makes its sample NaN also outside, as 0 times it. A sample that does
    not count by its border rule reads no pixel, so no NaN or infinite one reaches it; of one that counts all corners
    on the map do, those of weight 0 too.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import deform_conv2d
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> offset = np.zeros((1, 2, 4, 4), np.float32)
    >>> offset[:, 1] = 0.5  # half a pixel to the right
    >>> deform_conv2d(image, offset, np.ones((1, 1, 1, 1), np.float32))[0, 0, 0]
    array([0.5, 1.5, 2.5, 1.5], dtype=float32)
    """
    arrays = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    params = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "border": border,
        "precision": precision,
        "deterministic": deterministic,
        "workspace_bytes": workspace_bytes,
    }
    return call(DEFORM_CONV2D, "forward", arrays, params, backend=backend, out=out)


def deform_conv2d_backward(
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Any = None,
    *,
    border: str = "zeros",
    precision: str = "float32",
    deterministic: bool = False,
    workspace_bytes: int | None = None,
    wrt: Iterable[str] | str | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    r"""Gradients of `deform_conv2d` (Eq. 7); nothing is saved from the forward.

    .. math::  \frac{\partial y(p_0)}{\partial \Delta p_n}
               = w(p_n) \cdot \sum_q \frac{\partial G(q, p_0 + p_n + \Delta p_n)}{\partial \Delta p_n} x(q)

    Parameters
    ----------
    grad_output : array (N, O, OH, OW)
        Gradient of the loss with respect to the output, of the input's dtype.
    wrt : names among "input", "offset", "weight", "bias", "mask"
        Which gradients to compute; None means those of every array given.

    Other parameters are those of `deform_conv2d`.

    Returns
    -------
    dict
        Argument name -> gradient, of the argument's shape and dtype.

    Raises
    ------
    ValueError, TypeError
        As `deform_conv2d`; also where `wrt` names an argument that is absent or has no gradient.

    Notes
    -----
    Where a position lies on a pixel line the gradient of an offset is the right-hand derivative. In particular at
    y = -1, where every border tap of a zero offset with padding 1 lies, it is that of the cell [-1, 0), as in
    torchvision; mmcv and paddle give 0 there. A sample with a NaN coordinate adds nothing to the input's gradient
    and makes its own offset and mask gradients NaN. A NaN or infinite `grad_output` or mask makes NaN what it
    multiplies, also where that is 0 because a sample is outside or clamped.

    On a CPU the result is bitwise the same at every number of threads. On a GPU the input's gradient is summed with
    atomics in no fixed order unless ``deterministic=True``.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import deform_conv2d_backward
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> offset = np.full((1, 2, 4, 4), 0.5, np.float32)
    >>> one = np.ones((1, 1, 1, 1), np.float32)
    >>> grads = deform_conv2d_backward(np.ones_like(image), image, offset, one, wrt=["offset"])
    >>> grads["offset"][0, :, 0, 0]  # the image rises by 4 a row and by 1 a column
    array([4., 1.], dtype=float32)
    """
    arrays = {
        "grad_output": grad_output,
        "input": input,
        "offset": offset,
        "weight": weight,
        "bias": bias,
        "mask": mask,
    }
    params = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "border": border,
        "precision": precision,
        "deterministic": deterministic,
        "workspace_bytes": workspace_bytes,
    }
    return call(DEFORM_CONV2D, "backward", arrays, params, backend=backend, wrt=wrt)


def convert_offsets(offset: Any, *, source: str, target: str = "interleaved", offset_groups: int = 1) -> Any:
    """Reorder the channels of an offset array from one library's layout to another's.

    Parameters
    ----------
    offset : array (N, 2*OG*K, OH, OW)
        Any dtype and DLPack framework.
    source, target : {"interleaved", "split_yx", "split_xy"}
        "interleaved": dy0, dx0, dy1, dx1, ... (this library, torchvision, mmcv, ONNX, OpenVINO).
        "split_yx": all dy, then all dx (pytorch-deform-conv-v2). "split_xy": all dx, then all dy (Chainer).
    offset_groups : int
        OG; the layout holds within each offset group.

    Returns
    -------
    array (N, 2*OG*K, OH, OW)
        A new C-contiguous array of the caller's kind.

    Raises
    ------
    ValueError
        An unknown layout, or channels that are not 2*OG*K.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import convert_offsets
    >>> offset = np.arange(4.0).reshape(1, 4, 1, 1)  # dy0, dy1, dx0, dx1
    >>> convert_offsets(offset, source="split_yx").ravel()
    array([0., 2., 1., 3.])
    """
    name = "convert_offsets"
    shapes.choice(name, "source", source, LAYOUTS)
    shapes.choice(name, "target", target, LAYOUTS)
    groups = shapes.integer(name, "offset_groups", offset_groups, 1)
    with taken_in(name, {"offset": offset}, None, None) as taken:
        array = taken.arrays["offset"]
        named = "N 2*OG*K OH OW"
        if array.ndim != 4 or array.shape[1] % (2 * groups) or array.shape[1] == 0:
            raise shapes.shape_error(name, "offset", named, {"OG": groups}, array.shape)
        channels = np.arange(array.shape[1]).reshape(groups, -1)
        order = np.empty_like(channels)
        order[:, _positions(target, channels.shape[1])] = channels[:, _positions(source, channels.shape[1])]
        return taken.give(array[:, order.ravel()].copy(order="C"))


def _positions(layout: str, channels: int) -> np.ndarray:
    """Where a group's dy0, dx0, dy1, dx1, ... stand in a layout."""
    if layout == "interleaved":
        return np.arange(channels)
    halves = np.arange(channels).reshape(2, -1)
    return (halves if layout == "split_yx" else halves[::-1]).T.ravel()


def _parameters(params: Params) -> Params:
    name = DEFORM_CONV2D.name
    workspace = params["workspace_bytes"]
    return {
        "stride": shapes.pair(name, "stride", params["stride"], 1),
        "padding": shapes.pair(name, "padding", params["padding"], 0),
        "dilation": shapes.pair(name, "dilation", params["dilation"], 1),
        "border": shapes.choice(name, "border", params["border"], BORDERS),
        "precision": shapes.choice(name, "precision", params["precision"], PRECISIONS),
        "deterministic": shapes.flag(name, "deterministic", params["deterministic"]),
        "workspace_bytes": None if workspace is None else shapes.integer(name, "workspace_bytes", workspace, 1),
    }


def _output_size(axis: int, size: str, kernel: str) -> Any:
    def derive(sizes: Sizes, params: Params) -> int:
        reach = params["dilation"][axis] * (sizes[kernel] - 1) + 1
        padded = sizes[size] + 2 * params["padding"][axis]
        if reach > padded:
            raise ValueError(
                f"{DEFORM_CONV2D.name}: weight: expected a kernel within the padded image, "
                f"dilation*({kernel}-1)+1 <= {size}+2*padding = {padded}, got {reach}"
            )
        return (padded - reach) // params["stride"][axis] + 1

    return derive


def _flops(sizes: Sizes, direction: str) -> float:
    """Of the matrix products alone (one forward, two backward), the convention of convolution benchmarks."""
    s = sizes
    products = s["N"] * s["O"] * (s["C"] // s["groups"]) * s["KH"] * s["KW"] * s["OH"] * s["OW"]
    return 2.0 * products * (1 if direction == "forward" else 2)


def _product(sizes: Sizes) -> tuple[int, int, int, int]:
    """One product an image and group of a plain convolution, its columns as they are."""
    s = sizes
    return s["N"] * s["groups"], s["O"] // s["groups"], s["C"] // s["groups"] * s["KH"] * s["KW"], s["OH"] * s["OW"]


def _bytes(sizes: Sizes, direction: str, itemsize: int) -> float:
    """Each array read or written once: input, offset, mask, weight, output; backward also their gradients."""
    s = sizes
    pixels, taps = s["N"] * s["OH"] * s["OW"], s["KH"] * s["KW"]
    forward = (
        s["N"] * s["C"] * s["H"] * s["W"]
        + 3 * s["OG"] * taps * pixels
        + s["O"] * (s["C"] // s["groups"]) * taps
        + s["O"] * pixels
    )
    return float(itemsize * forward * (1 if direction == "forward" else 2))


DEFORM_CONV2D = Op(
    name="deform_conv2d",
    module="deform_conv",
    arrays={
        "input": "N C H W",
        "weight": "O C/groups KH KW",
        "offset": "N 2*OG*KH*KW OH OW",
        "mask": "N OG*KH*KW OH OW",
        "bias": "O",
    },
    output="N O OH OW",
    optional=("bias", "mask"),
    differentiable=("input", "offset", "weight", "bias", "mask"),
    coordinates=("offset", "mask"),
    parameters=_parameters,
    derived={"OH": _output_size(0, "H", "KH"), "OW": _output_size(1, "W", "KW")},
    divides=(("groups", "C"), ("groups", "O"), ("OG", "C")),
    samples=samples.deform_conv2d,
    layer_sizes={
        **dict.fromkeys("NCHWO"),
        "N": 1,
        "kernel": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "offset_groups": 1,
    },
    layer_call=samples.deform_conv2d_layer_call,
    drawn=samples.deform_conv2d_drawn,
    layer_sample=samples.deform_conv2d_layer,
    kinks=samples.deform_conv2d_kinks,
    part=samples.deform_conv2d_part,
    flops=_flops,
    product=_product,
    bytes=_bytes,
    gpu={
        "precision": ("forward", "backward"),
        "workspace_bytes": ("forward", "backward"),
        "deterministic": ("backward",),
    },
)
