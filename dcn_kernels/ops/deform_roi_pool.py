"""Deformable RoI pooling (paper, Eq. 6, and version 2's mask), also position-sensitive: public functions and rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.call import call
from dcn_kernels.dispatch.row import Op, Params, Sizes
from dcn_kernels.ops.roi_pool import GPU, LAYER_SIZES, POOLED, group, roi_bytes, roi_flops, roi_parameters, score_maps
from dcn_kernels.ops.samples import deform_roi_pool as samples

CONVENTIONS = ("paper", "rfcn", "mmcv")


def deform_roi_pool(
    input: Any,
    rois: Any,
    offset: Any = None,
    mask: Any = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    gamma: float = 0.1,
    sampling_ratio: int = 0,
    convention: str = "paper",
    deterministic: bool = False,
    validate: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    r"""Deformable RoI pooling: the mean of each bin, moved by an offset of its own.

    .. math::  y(i, j) = m_{ij} \sum_{p \in bin(i, j)} x(p_0 + p + \Delta p_{ij}) / n_{ij},
               \quad \Delta p_{ij} = \gamma \cdot \Delta \hat p_{ij} \circ (w, h)

    Parameters
    ----------
    input : array (N, C, H, W)
        float16, bfloat16, float32 or float64; any strides, on a CPU or a GPU.
    rois : array (R, 5)
        Batch index, x1, y1, x2, y2 in pixels of the image; no gradient by definition. The input's dtype, or float32
        beside half precision, as for `offset` and `mask`.
    offset : array (R, 2, PH, PW), optional
        Normalised offset of each bin, x first, then y: the shift in pixels of the map is ``gamma * offset * (w, h)``
        of the RoI. None means no shift.
    mask : array (R, PH, PW), optional
        Factor of each bin (version 2).
    output_size : int or (h, w)
        PH, PW.
    spatial_scale : float
        Pixels of the feature map per pixel of the image.
    gamma : float
        Factor of the offsets.
    sampling_ratio : int
        Samples per bin along each axis: "mmcv": 0 means as many as the bin has pixels; "rfcn": 0 means 4;
        "paper": not used.
    convention : {"paper", "rfcn", "mmcv"}
        "paper": Eq. 6, every pixel of a bin of `roi_pool` "avg" is moved and sampled, pixels outside the map count
        as 0. "rfcn": `deform_ps_roi_pool` with one group. "mmcv": the grid of `roi_align`, aligned.
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

    Raises
    ------
    ValueError
        A shape or value does not fit: also a RoI that is not finite or whose batch index is no image's.
    TypeError
        Not an array, a dtype that does not fit, or arrays of two frameworks or on two devices.

    Notes
    -----
    Equation 6 of arXiv 1703.06211; without offsets it is Eq. 5. A NaN offset makes its bin NaN, a NaN or infinite mask
    also a bin of 0. A sample that does not count reads no pixel. On a GPU, where values are not read back, an invalid
    RoI gives NaN and zero gradients.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import deform_roi_pool
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> rois = np.array([[0, 0, 0, 1, 1]], np.float32)  # two pixels wide
    >>> offset = np.zeros((1, 2, 1, 1), np.float32)
    >>> offset[0, 0] = 5  # gamma * 5 * 2 = 1 pixel to the right
    >>> deform_roi_pool(image, rois, offset, output_size=1)[0, 0]
    array([[3.5]], dtype=float32)
    """
    arrays = {"input": input, "rois": rois, "offset": offset, "mask": mask}
    params = {
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "gamma": gamma,
        "sampling_ratio": sampling_ratio,
        "convention": convention,
        "deterministic": deterministic,
        "validate": validate,
    }
    return call(DEFORM_ROI_POOL, "forward", arrays, params, backend=backend, out=out)


def deform_roi_pool_backward(
    grad_output: Any,
    input: Any,
    rois: Any,
    offset: Any = None,
    mask: Any = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    gamma: float = 0.1,
    sampling_ratio: int = 0,
    convention: str = "paper",
    deterministic: bool = False,
    validate: bool = False,
    wrt: Iterable[str] | str | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Gradients of `deform_roi_pool`.

    Parameters
    ----------
    grad_output : array (R, C, PH, PW)
        Gradient of the loss with respect to the output, of the input's dtype.
    wrt : names among "input", "offset", "mask"
        Which gradients to compute; None means those of every array given.

    Other parameters are those of `deform_roi_pool`.

    Returns
    -------
    dict
        Argument name -> gradient, of the argument's shape and dtype.

    Raises
    ------
    ValueError, TypeError
        As `deform_roi_pool`; also where `wrt` names an argument that is absent or has no gradient.

    Notes
    -----
    The gradient of an offset is the right-hand derivative of the forward, 0 where a coordinate is clamped ("rfcn": 0
    also at whole pixels). mmcv's own is wrong wherever a coordinate is clamped. A bin with a NaN offset adds nothing
    to the input's gradient and makes both its offset gradients NaN. A NaN or infinite `grad_output` or mask makes NaN
    what it multiplies, also where that is 0. A bin's samples are summed along each axis before a pixel is read: a pixel
    that is not finite may make the gradients of its bin's offsets and mask NaN also where a rule holds a part at 0. On
    a GPU sums are made with atomics in no fixed order unless ``deterministic=True``.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import deform_roi_pool_backward
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> rois, offset = np.array([[0, 0, 0, 1, 1]], np.float32), np.full((1, 2, 1, 1), 2.5, np.float32)
    >>> grad = np.ones((1, 1, 1, 1), np.float32)
    >>> deform_roi_pool_backward(grad, image, rois, offset, output_size=1)["offset"].ravel()  # 0.2 pixels a unit
    array([0.2, 0.8], dtype=float32)
    """
    arrays = {"grad_output": grad_output, "input": input, "rois": rois, "offset": offset, "mask": mask}
    params = {
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "gamma": gamma,
        "sampling_ratio": sampling_ratio,
        "convention": convention,
        "deterministic": deterministic,
        "validate": validate,
    }
    return call(DEFORM_ROI_POOL, "backward", arrays, params, backend=backend, wrt=wrt)


def deform_ps_roi_pool(
    input: Any,
    rois: Any,
    trans: Any = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    group_size: int | None = None,
    part_size: int | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    deterministic: bool = False,
    validate: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    r"""Deformable position-sensitive RoI pooling: the mean of samples of each bin's own score maps, moved.

    .. math::  y(c, ph, pw) = \sum_{i, j \, \text{on the map}} x(p_{ij} + \Delta p) / n,
               \quad \Delta p = \text{trans\_std} \cdot \text{trans} \circ (w, h)

    Output channel c of bin (ph, pw) reads input channel ``(c*G + gh)*G + gw``, ``gh = floor(ph*G/PH)``, and is moved
    by the translation of its class ``c // (output channels / classes)`` and of part ``floor(ph*part/PH)``.

    Parameters
    ----------
    input : array (N, C, H, W)
        The score maps, C a multiple of G*G; dtypes as in `deform_roi_pool`.
    rois : array (R, 5)
        As in `deform_roi_pool`.
    trans : array (R, 2*classes, part, part), optional
        Normalised translations, channel 2*cls x and 2*cls + 1 y: the shift is ``trans * trans_std`` of the RoI's size.
        None means no shift.
    group_size : int, optional
        G; None means the output size, which must then be square.
    part_size : int, optional
        Parts of a RoI along each axis; None means the output size.
    sample_per_part : int
        Samples per bin along each axis, from the bin's corner on.
    trans_std : float
        Factor of the translations.

    Other parameters are those of `deform_roi_pool`.

    Returns
    -------
    array (R, C/(G*G), PH, PW)
        The mean of the samples that are on the map (at most half a pixel outside), 0 where there are none.

    Raises
    ------
    ValueError, TypeError
        As `deform_roi_pool`.

    Notes
    -----
    Section 2.2 of arXiv 1703.06211 (position-sensitive RoI pooling) as its authors published it (MXNet, OpenVINO):
    sample (i, j) lies ``i*bin/sample_per_part`` below and ``j*bin/sample_per_part`` right of its bin's corner, in
    pixels of the map, and is clamped to the map.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import deform_ps_roi_pool
    >>> scores = np.repeat(np.arange(4, dtype=np.float32), 16).reshape(1, 4, 4, 4)
    >>> deform_ps_roi_pool(scores, np.array([[0, 0, 0, 3, 3]], np.float32), output_size=2)[0, 0]
    array([[0., 1.],
           [2., 3.]], dtype=float32)
    """
    arrays = {"input": input, "rois": rois, "trans": trans}
    params = {
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "group_size": group_size,
        "part_size": part_size,
        "sample_per_part": sample_per_part,
        "trans_std": trans_std,
        "deterministic": deterministic,
        "validate": validate,
    }
    return call(DEFORM_PS_ROI_POOL, "forward", arrays, params, backend=backend, out=out)


def deform_ps_roi_pool_backward(
    grad_output: Any,
    input: Any,
    rois: Any,
    trans: Any = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    group_size: int | None = None,
    part_size: int | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    deterministic: bool = False,
    validate: bool = False,
    wrt: Iterable[str] | str | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Gradients of `deform_ps_roi_pool`.

    Parameters
    ----------
    grad_output : array (R, C/(G*G), PH, PW)
        Gradient of the loss with respect to the output, of the input's dtype.
    wrt : names among "input", "trans"
        Which gradients to compute; None means those of every array given.

    Other parameters are those of `deform_ps_roi_pool`.

    Returns
    -------
    dict
        Argument name -> gradient, of the argument's shape and dtype.

    Raises
    ------
    ValueError, TypeError
        As `deform_ps_roi_pool`; also where `wrt` names an argument that is absent or has no gradient.

    Notes
    -----
    The derivative along an axis is 0 where the coordinate was clamped and where it is a whole number. NaN and
    infinite values and repeatability: as `deform_roi_pool_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import deform_ps_roi_pool_backward
    >>> image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> rois, trans = np.array([[0, 1, 1, 2, 2]], np.float32), np.ones((1, 2, 1, 1), np.float32)
    >>> grad = np.ones((1, 1, 1, 1), np.float32)
    >>> deform_ps_roi_pool_backward(grad, image, rois, trans, output_size=1)["trans"].ravel()  # 0.2 pixels a unit
    array([0.2, 0.8], dtype=float32)
    """
    arrays = {"grad_output": grad_output, "input": input, "rois": rois, "trans": trans}
    params = {
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "group_size": group_size,
        "part_size": part_size,
        "sample_per_part": sample_per_part,
        "trans_std": trans_std,
        "deterministic": deterministic,
        "validate": validate,
    }
    return call(DEFORM_PS_ROI_POOL, "backward", arrays, params, backend=backend, wrt=wrt)


def _deform_roi_pool_parameters(params: Params) -> Params:
    name = DEFORM_ROI_POOL.name
    return {
        **roi_parameters(name, params),
        "gamma": shapes.number(name, "gamma", params["gamma"]),
        "sampling_ratio": shapes.integer(name, "sampling_ratio", params["sampling_ratio"], 0, shapes.MOST_SAMPLES),
        "convention": shapes.choice(name, "convention", params["convention"], CONVENTIONS),
    }


def _deform_ps_roi_pool_parameters(params: Params) -> Params:
    name = DEFORM_PS_ROI_POOL.name
    checked, part = roi_parameters(name, params), params["part_size"]
    return {
        **checked,
        "group_size": (group(name, params["group_size"], checked["output_size"]),) * 2,
        "part_size": checked["output_size"] if part is None else (shapes.integer(name, "part_size", part, 1),) * 2,
        "sample_per_part": shapes.integer(name, "sample_per_part", params["sample_per_part"], 1, shapes.MOST_SAMPLES),
        "trans_std": shapes.number(name, "trans_std", params["trans_std"]),
    }


def _bytes(sizes: Sizes, direction: str, itemsize: int) -> float:
    """As without offsets, and the offsets once; backward the offsets' gradient too."""
    offsets = 2 * sizes.get("classes", 1) * sizes["R"] * sizes["PH"] * sizes["PW"]
    return roi_bytes(sizes, direction, itemsize) + float(itemsize * offsets * (1 if direction == "forward" else 2))


DEFORM_ROI_POOL = Op(
    name="deform_roi_pool",
    module="deform_roi_pool",
    arrays={"input": "N C H W", "rois": "R 5", "offset": "R 2 PH PW", "mask": "R PH PW"},
    output="R C PH PW",
    optional=("offset", "mask"),
    differentiable=("input", "offset", "mask"),
    coordinates=("rois", "offset", "mask"),
    parameters=_deform_roi_pool_parameters,
    derived=POOLED,
    divides=(),
    samples=samples.deform_roi_pool,
    drawn=samples.deform_roi_pool_drawn,
    kinks=samples.deform_roi_pool_kinks,
    layer_sizes=LAYER_SIZES,
    layer_params={"gamma": 0.1, "sampling_ratio": 4, "convention": "rfcn"},
    layer_spread=1.0,
    layer_call=samples.deform_roi_layer_call,
    layer_sample=samples.deform_roi_layer,
    flops=roi_flops,
    bytes=_bytes,
    gpu=GPU,
    check_values=shapes.check_rois,
    sums_lines=True,
)

DEFORM_PS_ROI_POOL = Op(
    name="deform_ps_roi_pool",
    module="deform_roi_pool",
    arrays={"input": "N C H W", "rois": "R 5", "trans": "R 2*classes part_h part_w"},
    output="R C/(G*G) PH PW",
    optional=("trans",),
    differentiable=("input", "trans"),
    coordinates=("rois", "trans"),
    parameters=_deform_ps_roi_pool_parameters,
    derived={
        **POOLED,
        "(G*G)": lambda sizes, params: params["group_size"][0] * params["group_size"][1],
        "C/(G*G)": lambda sizes, params: sizes["C"] // score_maps(sizes),
        "part_h": lambda sizes, params: params["part_size"][0],
        "part_w": lambda sizes, params: params["part_size"][1],
    },
    divides=(("(G*G)", "C"), ("classes", "C/(G*G)")),
    samples=samples.deform_ps_roi_pool,
    drawn=samples.deform_ps_roi_pool_drawn,
    kinks=samples.deform_ps_roi_pool_kinks,
    layer_sizes={**LAYER_SIZES, "classes": 1},
    layer_params={"group_size": None, "part_size": None, "sample_per_part": 4, "trans_std": 0.1},
    layer_spread=1.0,
    layer_call=samples.deform_ps_roi_layer_call,
    layer_sample=samples.deform_ps_roi_layer,
    flops=roi_flops,
    bytes=_bytes,
    gpu=GPU,
    check_values=shapes.check_rois,
    sums_lines=True,
)
