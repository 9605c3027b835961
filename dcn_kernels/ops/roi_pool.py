"""RoI pooling (Eq. 5), position-sensitive RoI pooling and RoIAlign: public functions and rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.call import call
from dcn_kernels.dispatch.row import Op, Params, Sizes
from dcn_kernels.ops.samples import roi_pool as samples
from dcn_kernels.ops.samples.draw import roi_layer_call

MODES = ("max", "avg")
CONVENTIONS = ("rfcn", "torchvision")


def roi_pool(
    input: Any,
    rois: Any,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    mode: str = "max",
    return_argmax: bool = False,
    deterministic: bool = False,
    validate: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    r"""Pool each region of interest to a fixed size: the maximum, or the mean (Eq. 5), of each bin's pixels.

    .. math::  y(i, j) = \sum_{p \in bin(i, j)} x(p_0 + p) / n_{ij}

    where bin (i, j) of a w x h region holds ``floor(i w/k) <= p_x < ceil((i+1) w/k)``, p_y likewise.

    Parameters
    ----------
    input : array (N, C, H, W)
        float16, bfloat16, float32 or float64; any strides, on a CPU or a GPU.
    rois : array (R, 5)
        Batch index, x1, y1, x2, y2 in pixels of the image. The input's dtype, or float32 beside half precision.
        RoIs have no gradient by definition.
    output_size : int or (h, w)
        PH, PW.
    spatial_scale : float
        Pixels of the feature map per pixel of the image.
    mode : {"max", "avg"}
        "max": an empty bin gives 0; a NaN pixel makes its bin NaN. "avg": pixels outside the map count as 0.
    return_argmax : bool
        Also return where the maxima are: "max" only.
    deterministic : bool
        On a GPU: bitwise repeatable gradients. The CPU backend always is, whatever the number of threads.
    validate : bool
        On a GPU: check the RoIs' values too, which waits for the GPU. Elsewhere they are always checked.
    out : array (R, C, PH, PW), optional
        Where the result is written: C-contiguous, of the input's dtype, overlapping no input.
    backend : {None, "reference", "cpu", "cuda"}
        None: by the arrays' device.

    Returns
    -------
    array (R, C, PH, PW)
        Of the caller's kind and the input's dtype.
    argmax : int64 array (R, C, PH, PW)
        With ``return_argmax=True``: the flat index y*W + x of each maximum, -1 for an empty bin.

    Raises
    ------
    ValueError
        A shape or value does not fit: also a RoI that is not finite or whose batch index is no image's.
    TypeError
        Not an array, a dtype that does not fit, or arrays of two frameworks or on two devices.

    Notes
    -----
    A RoI is rounded to whole pixels, half away from zero, and its last pixel belongs to it. Among equal maxima the
    first in row-major order counts, and a NaN before all else. Coordinates are float32 (float64 for float64 inputs).
    On a GPU, where values are not read back, an invalid RoI gives NaN and zero gradients.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import roi_pool
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> rois = np.array([[0, 0, 0, 3, 3]], np.float32)
    >>> roi_pool(image, rois, 2)[0, 0]
    array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    >>> roi_pool(image, rois, 2, mode="avg")[0, 0]
    array([[ 2.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    """
    params = {
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "mode": mode,
        "return_argmax": return_argmax,
        "deterministic": deterministic,
        "validate": validate,
    }
    return call(ROI_POOL, "forward", {"input": input, "rois": rois}, params, backend=backend, out=out)


def roi_pool_backward(
    grad_output: Any,
    input: Any,
    rois: Any,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    mode: str = "max",
    argmax: Any = None,
    deterministic: bool = False,
    validate: bool = False,
    wrt: Iterable[str] | str | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Gradient of `roi_pool`.

    Parameters
    ----------
    grad_output : array (R, C, PH, PW)
        Gradient of the loss with respect to the output, of the input's dtype.
    argmax : int64 array (R, C, PH, PW), optional
        What the forward's ``return_argmax=True`` returned: saves the search. "max" only.
    wrt : "input" or its list, optional
        Which gradients to compute; None means all there are.

    Other parameters are those of `roi_pool`.

    Returns
    -------
    dict
        ``{"input": array (N, C, H, W)}``.

    Raises
    ------
    ValueError, TypeError
        As `roi_pool`; also an argmax that is no pixel's.

    Notes
    -----
    The gradient of a maximum goes to the pixel that the forward chose. On a GPU it is summed with atomics in no fixed
    order unless ``deterministic=True``.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import roi_pool_backward
    >>> image = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    >>> rois = np.array([[0, 0, 0, 1, 1]], np.float32)
    >>> roi_pool_backward(np.full((1, 1, 1, 1), 8, np.float32), image, rois, 1, mode="avg")["input"][0, 0]
    array([[2., 2.],
           [2., 2.]], dtype=float32)
    """
    arrays = {"grad_output": grad_output, "input": input, "rois": rois, "argmax": argmax}
    params = {
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "mode": mode,
        "deterministic": deterministic,
        "validate": validate,
    }
    if argmax is not None and mode == "avg":
        raise ValueError('roi_pool: argmax: expected None with mode "avg", got an array')
    return call(ROI_POOL, "backward", arrays, params, backend=backend, wrt=wrt)


def ps_roi_pool(
    input: Any,
    rois: Any,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    group_size: int | None = None,
    convention: str = "rfcn",
    deterministic: bool = False,
    validate: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    r"""Position-sensitive RoI pooling: bin (ph, pw) averages pixels of score maps of its own.

    .. math::  y(c, ph, pw) = \sum_{p \in bin(ph, pw)} x_{(c G + g_h) G + g_w}(p) / n,
               \quad g_h = \lfloor ph \cdot G / PH \rfloor, \; g_w = \lfloor pw \cdot G / PW \rfloor

    Parameters
    ----------
    input : array (N, C, H, W)
        The score maps, C a multiple of G*G; dtypes as in `roi_pool`.
    rois : array (R, 5)
        As in `roi_pool`.
    group_size : int, optional
        G; None means the output size, which must then be square.
    convention : {"rfcn", "torchvision"}
        "rfcn" (MXNet, paddle, OpenVINO): RoIs are rounded in the image. "torchvision": rounded on the map, their last
        pixel left out, the map's last row and column never read, and one score map per bin whatever the output size.

    Other parameters are those of `roi_pool`.

    Returns
    -------
    array (R, C/(G*G), PH, PW)
        The mean over the pixels of the bin that are on the map, 0 where there are none.

    Raises
    ------
    ValueError, TypeError
        As `roi_pool`.

    Notes
    -----
    R-FCN, arXiv 1605.06409, Eq. 1. Lengths are in pixels of the map: "rfcn" from ``round(x1)*s`` to
    ``(round(x2) + 1)*s`` and at least 0.1, "torchvision" from ``round(x1*s)`` to ``round(x2*s)`` and at least 1.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import ps_roi_pool
    >>> scores = np.repeat(np.arange(4, dtype=np.float32), 16).reshape(1, 4, 4, 4)
    >>> ps_roi_pool(scores, np.array([[0, 0, 0, 3, 3]], np.float32), 2)[0, 0]
    array([[0., 1.],
           [2., 3.]], dtype=float32)
    """
    params = _ps_params(output_size, spatial_scale, group_size, convention, deterministic, validate)
    return call(PS_ROI_POOL, "forward", {"input": input, "rois": rois}, params, backend=backend, out=out)


def ps_roi_pool_backward(
    grad_output: Any,
    input: Any,
    rois: Any,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    group_size: int | None = None,
    convention: str = "rfcn",
    deterministic: bool = False,
    validate: bool = False,
    wrt: Iterable[str] | str | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Gradient of `ps_roi_pool`.

    Parameters
    ----------
    grad_output : array (R, C/(G*G), PH, PW)
        Gradient of the loss with respect to the output, of the input's dtype.
    wrt : "input" or its list, optional
        Which gradients to compute; None means all there are.

    Other parameters are those of `ps_roi_pool`.

    Returns
    -------
    dict
        ``{"input": array (N, C, H, W)}``.

    Raises
    ------
    ValueError, TypeError
        As `ps_roi_pool`; also where `wrt` names an argument that is absent or has no gradient.

    Notes
    -----
    Each pixel of a bin gets the bin's gradient over its number of pixels. torchvision's own gradient clips bins
    otherwise than its forward; this one is the forward's. Repeatability: as `roi_pool_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import ps_roi_pool_backward
    >>> grad, rois = np.ones((1, 1, 1, 1), np.float32), np.array([[0, 0, 0, 1, 0]], np.float32)
    >>> ps_roi_pool_backward(grad, np.zeros((1, 1, 2, 2), np.float32), rois, 1)["input"][0, 0]
    array([[0.5, 0.5],
           [0. , 0. ]], dtype=float32)
    """
    arrays = {"grad_output": grad_output, "input": input, "rois": rois}
    params = _ps_params(output_size, spatial_scale, group_size, convention, deterministic, validate)
    return call(PS_ROI_POOL, "backward", arrays, params, backend=backend, wrt=wrt)


def roi_align(
    input: Any,
    rois: Any,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    sampling_ratio: int = -1,
    aligned: bool = False,
    deterministic: bool = False,
    validate: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    r"""RoIAlign: each bin is the mean of bilinear samples on a grid; nothing is rounded.

    .. math::  y(ph, pw) = \frac{1}{g_h g_w} \sum_{i < g_h, \, j < g_w} x(y_i, x_j), \quad
               y_i = y_1 + (ph + (i + 0.5) / g_h) \cdot h / PH, \; x_j \text{ likewise}

    Parameters
    ----------
    input : array (N, C, H, W)
        dtypes as in `roi_pool`.
    rois : array (R, 5)
        As in `roi_pool`.
    sampling_ratio : int
        Samples per bin along each axis; 0 or less means as many as the bin has pixels, ``ceil(size/P)``.
    aligned : bool
        Whether positions are moved by half a pixel, as pixel centres ask for, and RoIs may be smaller than a pixel.

    Other parameters are those of `roi_pool`.

    Returns
    -------
    array (R, C, PH, PW)

    Raises
    ------
    ValueError, TypeError
        As `roi_pool`.

    Notes
    -----
    Mask R-CNN, arXiv 1703.06870. x(y, x) is Eq. 3 of arXiv 1703.06211: a sample more than a pixel outside the map is
    0, others are clamped to it, and all count in the mean. A bin without samples is 0.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import roi_align
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> roi_align(image, np.array([[0, 0, 0, 4, 4]], np.float32), 2, aligned=True)[0, 0]
    array([[ 2.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    """
    params = _align_params(output_size, spatial_scale, sampling_ratio, deterministic, validate)
    params["aligned"] = aligned
    return call(ROI_ALIGN, "forward", {"input": input, "rois": rois}, params, backend=backend, out=out)


def roi_align_backward(
    grad_output: Any,
    input: Any,
    rois: Any,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    sampling_ratio: int = -1,
    aligned: bool = False,
    deterministic: bool = False,
    validate: bool = False,
    wrt: Iterable[str] | str | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Gradient of `roi_align`.

    Parameters
    ----------
    grad_output : array (R, C, PH, PW)
        Gradient of the loss with respect to the output, of the input's dtype.
    wrt : "input" or its list, optional
        Which gradients to compute; None means all there are.

    Other parameters are those of `roi_align`.

    Returns
    -------
    dict
        ``{"input": array (N, C, H, W)}``.

    Raises
    ------
    ValueError, TypeError
        As `roi_align`; also where `wrt` names an argument that is absent or has no gradient.

    Notes
    -----
    Each sample's share of the gradient goes to its four pixels with the weights of Eq. 3. Repeatability: as
    `roi_pool_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import roi_align_backward
    >>> grad, rois = np.full((1, 1, 1, 1), 4, np.float32), np.array([[0, 0.5, 0.5, 1.5, 1.5]], np.float32)
    >>> roi_align_backward(grad, np.zeros((1, 1, 2, 2), np.float32), rois, 1, aligned=True)["input"][0, 0]
    array([[1., 1.],
           [1., 1.]], dtype=float32)
    """
    arrays = {"grad_output": grad_output, "input": input, "rois": rois}
    params = _align_params(output_size, spatial_scale, sampling_ratio, deterministic, validate)
    params["aligned"] = aligned
    return call(ROI_ALIGN, "backward", arrays, params, backend=backend, wrt=wrt)


def ps_roi_align(
    input: Any,
    rois: Any,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    sampling_ratio: int = -1,
    deterministic: bool = False,
    validate: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Position-sensitive RoIAlign: `roi_align` (aligned) where each bin reads score maps of its own.

    Output channel c of bin (ph, pw) reads input channel ``(c*PH + ph)*PW + pw``.

    Parameters
    ----------
    input : array (N, C, H, W)
        The score maps, C a multiple of PH*PW; dtypes as in `roi_pool`.
    rois : array (R, 5)
        As in `roi_pool`.

    Other parameters are those of `roi_align`.

    Returns
    -------
    array (R, C/(PH*PW), PH, PW)

    Raises
    ------
    ValueError, TypeError
        As `roi_pool`.

    Notes
    -----
    The sum of `roi_align` with R-FCN's score maps (Light-Head R-CNN, arXiv 1711.07264). A bin without samples is 0
    (torchvision: NaN).

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import ps_roi_align
    >>> scores = np.repeat(np.arange(4, dtype=np.float32), 16).reshape(1, 4, 4, 4)
    >>> ps_roi_align(scores, np.array([[0, 0, 0, 4, 4]], np.float32), 2)[0, 0]
    array([[0., 1.],
           [2., 3.]], dtype=float32)
    """
    params = _align_params(output_size, spatial_scale, sampling_ratio, deterministic, validate)
    return call(PS_ROI_ALIGN, "forward", {"input": input, "rois": rois}, params, backend=backend, out=out)


def ps_roi_align_backward(
    grad_output: Any,
    input: Any,
    rois: Any,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    sampling_ratio: int = -1,
    deterministic: bool = False,
    validate: bool = False,
    wrt: Iterable[str] | str | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Gradient of `ps_roi_align`.

    Parameters
    ----------
    grad_output : array (R, C/(PH*PW), PH, PW)
        Gradient of the loss with respect to the output, of the input's dtype.
    wrt : "input" or its list, optional
        Which gradients to compute; None means all there are.

    Other parameters are those of `ps_roi_align`.

    Returns
    -------
    dict
        ``{"input": array (N, C, H, W)}``.

    Raises
    ------
    ValueError, TypeError
        As `ps_roi_align`; also where `wrt` names an argument that is absent or has no gradient.

    Notes
    -----
    Each sample's share of the gradient goes to its four pixels with the weights of Eq. 3. Repeatability: as
    `roi_pool_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import ps_roi_align_backward
    >>> grad, rois = np.full((1, 1, 1, 1), 4, np.float32), np.array([[0, 0.5, 0.5, 1.5, 1.5]], np.float32)
    >>> ps_roi_align_backward(grad, np.zeros((1, 1, 2, 2), np.float32), rois, 1)["input"][0, 0]
    array([[1., 1.],
           [1., 1.]], dtype=float32)
    """
    arrays = {"grad_output": grad_output, "input": input, "rois": rois}
    params = _align_params(output_size, spatial_scale, sampling_ratio, deterministic, validate)
    return call(PS_ROI_ALIGN, "backward", arrays, params, backend=backend, wrt=wrt)


# ---------------------------------------------------------------- parameters


def _ps_params(
    output_size: Any, spatial_scale: Any, group_size: Any, convention: Any, deterministic: Any, validate: Any
) -> Params:
    return {
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "group_size": group_size,
        "convention": convention,
        "deterministic": deterministic,
        "validate": validate,
    }


def _align_params(
    output_size: Any, spatial_scale: Any, sampling_ratio: Any, deterministic: Any, validate: Any
) -> Params:
    return {
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "sampling_ratio": sampling_ratio,
        "deterministic": deterministic,
        "validate": validate,
    }


def roi_parameters(name: str, params: Params) -> Params:
    """The parameters that all RoI operators share, checked."""
    return {
        "output_size": shapes.pair(name, "output_size", params["output_size"], 1),
        "spatial_scale": shapes.number(name, "spatial_scale", params["spatial_scale"], positive=True),
        "deterministic": shapes.flag(name, "deterministic", params["deterministic"]),
        "validate": shapes.flag(name, "validate", params["validate"]),
    }


def group(name: str, group_size: Any, output_size: tuple[int, int]) -> int:
    """G: `group_size`, or the output size where that is square."""
    if group_size is not None:
        return shapes.integer(name, "group_size", group_size, 1)
    if output_size[0] != output_size[1]:
        raise ValueError(f"{name}: group_size: expected an integer as output_size is not square, got None")
    return output_size[0]


def _roi_pool_parameters(params: Params) -> Params:
    name = ROI_POOL.name
    mode = shapes.choice(name, "mode", params["mode"], MODES)
    checked = {**roi_parameters(name, params), "mode": mode}
    if "return_argmax" in params:
        checked["return_argmax"] = shapes.flag(name, "return_argmax", params["return_argmax"])
        if checked["return_argmax"] and mode != "max":
            raise ValueError(f'{name}: return_argmax: expected False with mode "{mode}", got True')
    return checked


def _ps_roi_pool_parameters(params: Params) -> Params:
    name = PS_ROI_POOL.name
    checked = roi_parameters(name, params)
    convention = shapes.choice(name, "convention", params["convention"], CONVENTIONS)
    size, given = checked["output_size"], params["group_size"]
    if convention == "torchvision":
        if given is not None and (given, given) != size:
            raise ValueError(f'{name}: group_size: expected None or {size} with convention "torchvision", got {given}')
        groups = size
    else:
        groups = (group(name, given, size),) * 2
    return {**checked, "group_size": groups, "convention": convention}


def _align_parameters(name: str) -> Callable[[Params], Params]:
    def parameters(params: Params) -> Params:
        ratio = shapes.integer(name, "sampling_ratio", params["sampling_ratio"], -1, shapes.MOST_SAMPLES)
        checked = {**roi_parameters(name, params), "sampling_ratio": ratio}
        if "aligned" in params:
            checked["aligned"] = shapes.flag(name, "aligned", params["aligned"])
        return checked

    return parameters


# ---------------------------------------------------------------- rows

GPU = {"deterministic": ("backward",), "validate": ()}  # the dispatcher validates

LAYER_SIZES: dict[str, Any] = {
    **dict.fromkeys("NCHW"),
    "N": 1,
    "R": 300,
    "output_size": (7, 7),
    "spatial_scale": 1 / 16,
}

POOLED: dict[str, Callable[[Sizes, Params], int]] = {
    "PH": lambda sizes, params: params["output_size"][0],
    "PW": lambda sizes, params: params["output_size"][1],
}


def score_maps(sizes: Sizes) -> int:
    """How many input channels a class of a position-sensitive operator has, 1 for the others."""
    return sizes.get("(G*G)", sizes.get("(PH*PW)", 1))


def roi_flops(sizes: Sizes, direction: str) -> float:
    """Four bilinear samples of eight operations a bin; what is really computed depends on the RoIs and the mode."""
    bins = sizes["R"] * (sizes["C"] // score_maps(sizes)) * sizes["PH"] * sizes["PW"]
    return 32.0 * bins * (1 if direction == "forward" else 2)


def roi_bytes(sizes: Sizes, direction: str, itemsize: int) -> float:
    """The map and the pooled values once each; backward the map and its gradient."""
    maps = sizes["N"] * sizes["C"] * sizes["H"] * sizes["W"]
    bins = sizes["R"] * (sizes["C"] // score_maps(sizes)) * sizes["PH"] * sizes["PW"]
    return float(itemsize * (maps * (1 if direction == "forward" else 2) + bins + 5 * sizes["R"]))


ROI_POOL = Op(
    name="roi_pool",
    module="roi_pool",
    arrays={"input": "N C H W", "rois": "R 5"},
    output="R C PH PW",
    optional=(),
    differentiable=("input",),
    coordinates=("rois",),
    parameters=_roi_pool_parameters,
    derived=POOLED,
    divides=(),
    samples=samples.roi_pool,
    drawn=samples.roi_pool_drawn,
    kinks=samples.roi_pool_kinks,
    layer_sizes=LAYER_SIZES,
    layer_params={"mode": "max"},
    layer_spread=1.0,
    layer_call=roi_layer_call,
    layer_sample=samples.roi_layer,
    flops=roi_flops,
    bytes=roi_bytes,
    saved={"argmax": "R C PH PW"},
    gpu={"deterministic": ("backward",), "validate": ("backward",)},
    check_values=shapes.check_rois,
)

PS_ROI_POOL = Op(
    name="ps_roi_pool",
    module="roi_pool",
    arrays={"input": "N C H W", "rois": "R 5"},
    output="R C/(G*G) PH PW",
    optional=(),
    differentiable=("input",),
    coordinates=("rois",),
    parameters=_ps_roi_pool_parameters,
    derived={**POOLED, "(G*G)": lambda sizes, params: params["group_size"][0] * params["group_size"][1]},
    divides=(("(G*G)", "C"),),
    samples=samples.ps_roi_pool,
    layer_sizes=LAYER_SIZES,
    layer_params={"group_size": None, "convention": "rfcn"},
    layer_spread=1.0,
    layer_call=roi_layer_call,
    drawn=samples.ps_roi_pool_drawn,
    layer_sample=samples.roi_layer,
    flops=roi_flops,
    bytes=roi_bytes,
    gpu=GPU,
    check_values=shapes.check_rois,
)

ROI_ALIGN = Op(
    name="roi_align",
    module="roi_pool",
    arrays={"input": "N C H W", "rois": "R 5"},
    output="R C PH PW",
    optional=(),
    differentiable=("input",),
    coordinates=("rois",),
    parameters=_align_parameters("roi_align"),
    derived=POOLED,
    divides=(),
    samples=samples.roi_align,
    layer_sizes=LAYER_SIZES,
    layer_params={"sampling_ratio": -1, "aligned": False},
    layer_spread=1.0,
    layer_call=roi_layer_call,
    drawn=samples.roi_align_drawn,
    layer_sample=samples.roi_layer,
    flops=roi_flops,
    bytes=roi_bytes,
    gpu=GPU,
    check_values=shapes.check_rois,
)

PS_ROI_ALIGN = Op(
    name="ps_roi_align",
    module="roi_pool",
    arrays={"input": "N C H W", "rois": "R 5"},
    output="R C/(PH*PW) PH PW",
    optional=(),
    differentiable=("input",),
    coordinates=("rois",),
    parameters=_align_parameters("ps_roi_align"),
    derived={**POOLED, "(PH*PW)": lambda sizes, params: params["output_size"][0] * params["output_size"][1]},
    divides=(("(PH*PW)", "C"),),
    samples=samples.ps_roi_align,
    layer_sizes=LAYER_SIZES,
    layer_params={"sampling_ratio": -1},
    layer_spread=1.0,
    layer_call=roi_layer_call,
    drawn=samples.ps_roi_align_drawn,
    layer_sample=samples.roi_layer,
    flops=roi_flops,
    bytes=roi_bytes,
    gpu=GPU,
    check_values=shapes.check_rois,
)
