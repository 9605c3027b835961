"""The feature map resampled at each pixel plus its offset (ConvOffset2D's resampling): public functions and row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.call import call
from dcn_kernels.dispatch.row import Op, Params, Sizes
from dcn_kernels.ops.deform_conv import BORDERS
from dcn_kernels.ops.samples import offset_sample as samples


def offset_sample2d(
    input: Any,
    offset: Any,
    *,
    border: str = "edge",
    deterministic: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    r"""Resample a feature map at each pixel plus an offset of its own.

    .. math::  y_c(p) = x_c(p + \Delta p_g(p))

    with bilinear ``x`` (Eq. 3, 4) and one offset field per group g of C/OG channels.

    Parameters
    ----------
    input : array (N, C, H, W)
        float16, bfloat16, float32 or float64; any strides.
    offset : array (N, 2*OG, H, W)
        ``dy, dx`` interleaved per offset group, in pixels. The input's dtype, or float32 beside half precision.
        Channel c belongs to group c // (C/OG).
    border : {"edge", "zeros", "msra"}
        As in `deform_conv2d`.
    deterministic : bool
        On a GPU: bitwise repeatable gradients. The CPU backend always is.
    out : array (N, C, H, W), optional
        Where the result is written.
    backend : {None, "reference", "cpu", "cuda"}
        None: by the arrays' device.

    Returns
    -------
    array (N, C, H, W)
        Of the caller's kind and the input's dtype.

    Raises
    ------
    ValueError, TypeError
        As `deform_conv2d`.

    Notes
    -----
    With ``OG = C`` and border "edge" this is ConvOffset2D of pytorch-deform-conv. NaN and infinite coordinates and
    pixels: as `deform_conv2d`.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import offset_sample2d
    >>> image = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    >>> offset = np.full((1, 2, 2, 2), 0.5, np.float32)
    >>> offset_sample2d(image, offset)[0, 0]
    array([[1.5, 2. ],
           [2.5, 3. ]], dtype=float32)
    """
    arrays = {"input": input, "offset": offset}
    params = {"border": border, "deterministic": deterministic}
    return call(OFFSET_SAMPLE2D, "forward", arrays, params, backend=backend, out=out)


def offset_sample2d_backward(
    grad_output: Any,
    input: Any,
    offset: Any,
    *,
    border: str = "edge",
    deterministic: bool = False,
    wrt: Iterable[str] | str | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Gradients of `offset_sample2d`.

    Parameters
    ----------
    grad_output : array (N, C, H, W)
        Gradient of the loss with respect to the output, of the input's dtype.
    wrt : names among "input", "offset"
        Which gradients to compute; None means both.

    Other parameters are those of `offset_sample2d`.

    Returns
    -------
    dict
        Argument name -> gradient, of the argument's shape and dtype.

    Raises
    ------
    ValueError, TypeError
        As `offset_sample2d`.

    Notes
    -----
    Derivatives on pixel lines, NaN and infinite values, repeatability: as `deform_conv2d_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import offset_sample2d_backward
    >>> image = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    >>> offset = np.full((1, 2, 2, 2), 0.5, np.float32)
    >>> grads = offset_sample2d_backward(np.ones_like(image), image, offset)
    >>> grads["offset"][0, :, 0, 0]
    array([2., 1.], dtype=float32)
    """
    arrays = {"grad_output": grad_output, "input": input, "offset": offset}
    params = {"border": border, "deterministic": deterministic}
    return call(OFFSET_SAMPLE2D, "backward", arrays, params, backend=backend, wrt=wrt)


def _parameters(params: Params) -> Params:
    name = OFFSET_SAMPLE2D.name
    return {
        "border": shapes.choice(name, "border", params["border"], BORDERS),
        "deterministic": shapes.flag(name, "deterministic", params["deterministic"]),
    }


def _flops(sizes: Sizes, direction: str) -> float:
    """Four products and sums a sample; backward four more for the offset and four for the input."""
    samples_taken = sizes["N"] * sizes["C"] * sizes["H"] * sizes["W"]
    return 8.0 * samples_taken * (1 if direction == "forward" else 2)


def _bytes(sizes: Sizes, direction: str, itemsize: int) -> float:
    """Input, offset and output once; backward also the two gradients."""
    pixels = sizes["N"] * sizes["H"] * sizes["W"]
    maps, offsets = sizes["C"] * pixels, 2 * sizes["OG"] * pixels
    return float(itemsize * ((2 * maps + offsets) if direction == "forward" else (3 * maps + 2 * offsets)))


OFFSET_SAMPLE2D = Op(
    name="offset_sample2d",
    module="offset_sample",
    arrays={"input": "N C H W", "offset": "N 2*OG H W"},
    output="N C H W",
    optional=(),
    differentiable=("input", "offset"),
    coordinates=("offset",),
    parameters=_parameters,
    derived={},
    divides=(("OG", "C"),),
    samples=samples.offset_sample2d,
    layer_sizes={**dict.fromkeys("NCHW"), "N": 1, "offset_groups": 1},
    layer_call=samples.offset_sample2d_layer_call,
    drawn=samples.offset_sample2d_drawn,
    layer_sample=samples.offset_sample2d_layer,
    kinks=samples.offset_sample2d_kinks,
    flops=_flops,
    bytes=_bytes,
    gpu={"deterministic": ("backward",)},
)
