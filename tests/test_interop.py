"""The plain functions on arrays of other frameworks: the caller's own kind comes back; nothing is copied going in.

torch and jax are optional: where one is not installed, its tests are skipped for that one reason.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import cast, first_cases
from scipy import ndimage

import dcn_kernels
from dcn_kernels.dispatch.arrays import taken_in
from dcn_kernels.dispatch.call import public
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES

FIRST = first_cases()
FRAMEWORKS = ("torch", "jax")
ROWS = {case.values[0].name: case.values for case in FIRST}


def framework(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed")


def to(name: str, array: np.ndarray) -> Any:
    """A framework's own array with a copy of the values."""
    if name == "torch":
        torch = framework("torch")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())
    return framework("jax").numpy.asarray(array)


def back(array: Any) -> np.ndarray:
    if find_spec("torch"):
        torch = framework("torch")
        if isinstance(array, torch.Tensor) and array.dtype == torch.bfloat16:
            return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(array)


def forward(op: Op, arrays: dict[str, Any], params: dict[str, Any], **more: Any) -> Any:
    return public(op)(**arrays, **params, **more)


def backward(op: Op, grad_output: Any, arrays: dict[str, Any], params: dict[str, Any], **more: Any) -> Any:
    return public(op, "backward")(grad_output, **arrays, **params, **more)


@pytest.fixture(autouse=True)
def float64_in_jax() -> Any:
    """JAX makes float32 of float64 unless told otherwise."""
    if not find_spec("jax"):
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------- the caller's own kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_results_are_those_of_numpy_in_the_callers_kind_and_dtype(
    name: str, op: Op, sample: Sample, dtype: str
) -> None:
    module = framework(name)
    numpy_arrays = cast(sample, op, dtype)
    want = forward(op, numpy_arrays, sample.params)
    arrays = {key: to(name, array) for key, array in numpy_arrays.items()}
    got = forward(op, arrays, sample.params)
    assert isinstance(got, module.Tensor if name == "torch" else module.Array)
    assert got.dtype == arrays["input"].dtype
    np.testing.assert_array_equal(back(got), want)
    wants = backward(op, want, numpy_arrays, sample.params)
    gots = backward(op, got, arrays, sample.params)
    assert list(gots) == list(wants)
    for key in wants:
        assert type(gots[key]) is type(got) and gots[key].dtype == arrays[key].dtype
        np.testing.assert_array_equal(back(gots[key]), wants[key])


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_argmax_goes_out_and_in(name: str) -> None:
    op, sample = ROWS["roi_pool"]
    arrays = {key: to(name, array) for key, array in sample.arrays.items()}
    size = {"output_size": 2}
    got, argmax = forward(op, arrays, size, return_argmax=True)
    assert str(argmax.dtype).endswith("int64")
    with_it = backward(op, got, arrays, size, argmax=argmax)["input"]
    np.testing.assert_array_equal(back(with_it), back(backward(op, got, arrays, size)["input"]))


class Foreign:
    """An array of no known framework: nothing but DLPack, from a device of the given kind."""

    def __init__(self, array: np.ndarray, device: int = 1) -> None:
        self.array, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


@pytest.mark.parametrize("device", [1, 3], ids=["cpu", "pinned"])
@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_any_dlpack_array_is_taken_also_from_pinned_memory(op: Op, sample: Sample, device: int) -> None:
    arrays = {key: Foreign(array, device) for key, array in sample.arrays.items()}
    np.testing.assert_array_equal(forward(op, arrays, sample.params), forward(op, sample.arrays, sample.params))


def test_an_array_elsewhere_is_an_error() -> None:
    array = Foreign(np.zeros((1, 1, 2, 2)), device=8)
    with pytest.raises(TypeError, match="input: expected an array on a CPU or an NVIDIA GPU, got DLPack device 8"):
        dcn_kernels.offset_sample2d(array, array)


def test_what_is_no_array_is_an_error() -> None:
    with pytest.raises(TypeError, match="offset: expected an array that supports DLPack, got list"):
        dcn_kernels.offset_sample2d(np.zeros((1, 1, 2, 2)), [[0.0]])
    masked = np.ma.masked_array(np.zeros((1, 1, 2, 2)), True)
    with pytest.raises(TypeError, match="input: expected an array, got a masked array"):
        dcn_kernels.offset_sample2d(masked, np.zeros((1, 2, 2, 2)))


@pytest.mark.parametrize("name", ["tensorflow", "paddle"])
def test_tensorflow_and_paddle_get_their_own_kind_back(name: str) -> None:
    """By DLPack alone: every operator, both directions; each dtype but bfloat16, which is refused.

    By the reference, which compiles nothing: arrays go in and out the same way for every backend of the CPU.
    """
    module = framework(name)
    make = module.constant if name == "tensorflow" else module.to_tensor
    total = module.reduce_sum if name == "tensorflow" else module.sum
    for op, sample in (case.values for case in FIRST):
        for dtype in ("float16", "float32", "float64"):
            numpy_arrays = cast(sample, op, dtype)
            arrays = {key: make(array) for key, array in numpy_arrays.items()}
            want, got = (
                forward(op, numpy_arrays, sample.params, backend="reference"),
                forward(op, arrays, sample.params, backend="reference"),
            )
            assert type(got) is type(arrays["input"]) and got.dtype == arrays["input"].dtype
            np.testing.assert_array_equal(got.numpy(), want)
            wants = backward(op, want, numpy_arrays, sample.params, backend="reference")
            gots = backward(op, got, arrays, sample.params, backend="reference")
            assert list(gots) == list(wants)
            for key, value in wants.items():
                assert type(gots[key]) is type(got)
                np.testing.assert_array_equal(gots[key].numpy(), value)
    for size in range(1, 20):  # a reduction over memory that is not aligned ends TensorFlow's process
        image, offset = np.ones((1, 1, 1, size), np.float32), np.zeros((1, 2, 1, size), np.float32)
        assert float(total(dcn_kernels.offset_sample2d(make(image), make(offset)))) == size
    half = make(np.zeros((1, 1, 2, 2), np.float32))
    half = module.cast(half, module.bfloat16)
    with pytest.raises(
        TypeError, match=f"input: expected float16, float32 or float64 of {name}, got bfloat16, which N"
    ):
        dcn_kernels.offset_sample2d(half, make(np.zeros((1, 2, 2, 2), np.float32)))


# ---------------------------------------------------------------- no copy


def pointer(array: Any) -> int:
    return array.data_ptr() if hasattr(array, "data_ptr") else array.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_arrays_are_taken_in_without_a_copy(name: str, dtype: str) -> None:
    array = to(name, np.ones((2, 3, 4, 5), DTYPES[dtype]))
    with taken_in("test", {"input": array}, None, None) as taken:
        seen = taken.arrays["input"]
        assert seen.ctypes.data == pointer(array)
        assert seen.dtype == DTYPES[dtype]
        if name == "torch":
            array.fill_(7)
            assert (seen == 7).all(), "a write is not seen"


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_out_is_written_where_it_is(dtype: str) -> None:
    torch = framework("torch")
    op, sample = ROWS["offset_sample2d"]
    arrays = {key: to("torch", array) for key, array in cast(sample, op, dtype).items()}
    out = torch.full_like(arrays["input"], 9).contiguous()
    before = out.data_ptr()
    assert forward(op, arrays, sample.params, out=out) is out and out.data_ptr() == before
    np.testing.assert_array_equal(back(out), back(forward(op, arrays, sample.params)))


def test_torch_autograd_sees_that_out_was_written_to() -> None:
    torch = framework("torch")
    factor, image, offset = torch.ones(1, requires_grad=True), torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)
    out = torch.full((1, 1, 2, 2), 3.0)
    product = (factor * out).sum()
    dcn_kernels.offset_sample2d(image, offset, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        out = torch.zeros(1, 1, 2, 2)
        assert dcn_kernels.offset_sample2d(image, offset, out=out) is out


def test_torch_results_are_not_copied() -> None:
    framework("torch")
    result = np.ones((2, 3))
    with taken_in("test", {"input": to("torch", np.zeros(2))}, None, None) as taken:
        assert taken.give(result).data_ptr() == result.ctypes.data


# ---------------------------------------------------------------- the traps of each framework


def torch_views() -> dict[str, Any]:
    return {
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "channels_last": lambda t: t.contiguous(memory_format=framework("torch").channels_last),
        "every other": lambda t: t.repeat_interleave(2, 3)[..., ::2],
        "part of a larger one": lambda t: framework("torch").nn.functional.pad(t, (1, 2, 1, 0))[..., 1:, 1:-2],
        "negated lazily": lambda t: framework("torch")._neg_view(-t),
        "imaginary part of a conjugate": lambda t: framework("torch").complex(t, -t).conj().imag,
        "parameter": lambda t: framework("torch").nn.Parameter(t, requires_grad=False),
    }


@pytest.mark.parametrize(
    "view",
    [
        "transposed",
        "channels_last",
        "every other",
        "part of a larger one",
        "negated lazily",
        "imaginary part of a conjugate",
        "parameter",
    ],
)
def test_torch_view_gives_the_result_of_its_values(view: str) -> None:
    framework("torch")
    op, sample = ROWS["deform_conv2d"]
    arrays = {key: to("torch", array) for key, array in sample.arrays.items()}
    want = forward(op, arrays, sample.params)
    viewed = {key: torch_views()[view](t) if t.ndim == 4 else t for key, t in arrays.items()}
    for key in arrays:
        assert (viewed[key] == arrays[key]).all()
    np.testing.assert_array_equal(back(forward(op, viewed, sample.params)), back(want))


def test_torch_broadcast_gives_the_result_of_its_copy() -> None:
    torch = framework("torch")
    image = torch.arange(6.0).reshape(1, 1, 2, 3).expand(4, 5, 2, 3)
    offset = torch.tensor([0.25, 0.5]).reshape(1, 2, 1, 1).expand(4, 2, 2, 3)
    want = dcn_kernels.offset_sample2d(image.clone(), offset.clone())
    assert torch.equal(dcn_kernels.offset_sample2d(image, offset), want)


def test_numpy_views_that_torch_cannot_take_stay_numpy() -> None:
    """Negative strides make torch abort the process when they reach it, so no argument may pass through it."""
    framework("torch")
    image, offset = np.arange(12.0).reshape(1, 1, 3, 4), np.full((1, 2, 3, 4), 0.5)
    want = dcn_kernels.offset_sample2d(image[..., ::-1].copy(), offset)
    np.testing.assert_array_equal(dcn_kernels.offset_sample2d(image[..., ::-1], offset[:, ::-1]), want)


def test_torch_requires_grad_is_an_error_that_names_the_way_and_works_where_no_gradient_is_recorded() -> None:
    torch = framework("torch")
    image, offset = torch.rand(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 2, 2, 2)
    with pytest.raises(TypeError, match=r"offset_sample2d: input: .* use dcn_kernels.torch"):
        dcn_kernels.offset_sample2d(image, offset)
    with torch.no_grad():
        got = dcn_kernels.offset_sample2d(image, offset)
    assert torch.equal(got, image) and not got.requires_grad


def test_torch_tensors_without_memory_are_an_error() -> None:
    torch = framework("torch")
    offset = torch.zeros(1, 2, 2, 2)
    for tensor, what in (
        (torch.zeros(1, 1, 2, 2, device="meta"), "CPU or an NVIDIA GPU"),
        (torch.zeros(1, 1, 2, 2).to_sparse(), "layout torch.strided"),
    ):
        with pytest.raises(TypeError, match=f"offset_sample2d: input: .*{what}"):
            dcn_kernels.offset_sample2d(tensor, offset)
    for transform in (torch.func.vmap, torch.func.grad, torch.func.functionalize):  # the last has memory, not its own
        with pytest.raises(TypeError, match=r"inside torch.func: use dcn_kernels.torch"):
            transform(lambda image: dcn_kernels.offset_sample2d(image, offset))(torch.zeros(3, 1, 1, 2, 2))


def test_torch_out_that_cannot_be_written_to_is_an_error() -> None:
    torch = framework("torch")
    image, offset = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)
    for out, error, what in (
        (torch._neg_view(torch.zeros(1, 1, 2, 2)), ValueError, "negated or conjugated lazily"),
        (torch.zeros(1, 1, 2, 2, requires_grad=True), TypeError, "requires_grad"),
        (torch.zeros(1, 1, 1, 1).expand(1, 1, 2, 2), ValueError, "C-contiguous"),
    ):
        with pytest.raises(error, match=f"offset_sample2d: out: .*{what}"):
            dcn_kernels.offset_sample2d(image, offset, out=out)


def test_torch_dtype_that_does_not_fit_is_an_error() -> None:
    torch = framework("torch")
    for dtype in (torch.complex64, torch.int32, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="offset_sample2d: input: expected"):
            dcn_kernels.offset_sample2d(torch.zeros(1, 1, 2, 2, dtype=dtype), torch.zeros(1, 2, 2, 2))


def test_jax_tracer_is_an_error_that_names_the_way() -> None:
    jax = framework("jax")
    offset = jax.numpy.zeros((1, 2, 2, 2))
    for transform in (jax.jit, jax.vmap, jax.make_jaxpr):
        with pytest.raises(TypeError, match=r"input: expected a concrete array, got a JAX tracer: use dcn_kernels.jax"):
            transform(lambda image: dcn_kernels.offset_sample2d(image, offset))(jax.numpy.zeros((1, 1, 2, 2)))


def test_jax_out_and_deleted_arrays_are_errors() -> None:
    jax = framework("jax")
    image, offset = jax.numpy.zeros((1, 1, 2, 2)), jax.numpy.zeros((1, 2, 2, 2))
    with pytest.raises(TypeError, match="out: expected None, as JAX arrays cannot be written to"):
        dcn_kernels.offset_sample2d(image, offset, out=image + 1)
    image.delete()
    with pytest.raises(TypeError, match="input: expected an array, got a JAX array that was deleted"):
        dcn_kernels.offset_sample2d(image, offset)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_two_frameworks_in_one_call_are_an_error_that_names_both(name: str) -> None:
    image, offset = np.zeros((1, 1, 2, 2)), to(name, np.zeros((1, 2, 2, 2)))
    with pytest.raises(TypeError, match=f"offset: expected a numpy array as input is, got a {name} one"):
        dcn_kernels.offset_sample2d(image, offset)
    with pytest.raises(TypeError, match=f"out: expected a {name} array as input is, got a numpy one"):
        dcn_kernels.offset_sample2d(to(name, image), offset, out=image)


class OnGpu(Foreign):
    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array, device=2)


def test_two_devices_in_one_call_are_an_error_that_names_both() -> None:
    image, offset = Foreign(np.zeros((1, 1, 2, 2))), OnGpu(np.zeros((1, 2, 2, 2)))
    with pytest.raises(TypeError, match="offset: expected an array on the CPU as input is, got one on cuda:0"):
        dcn_kernels.offset_sample2d(image, offset)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_convert_offsets_takes_any_kind(name: str) -> None:
    offset = np.arange(36.0).reshape(1, 36, 1, 1)
    options = {"source": "split_xy", "offset_groups": 2}
    got = dcn_kernels.convert_offsets(to(name, offset), **options)
    assert type(got) is type(to(name, offset))
    np.testing.assert_array_equal(back(got), dcn_kernels.convert_offsets(offset, **options))


# ---------------------------------------------------------------- docs/how-to/migrate.md


def resampled(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """scipy's bilinear samples, positions clamped to the image."""
    y, x = y.clip(0, image.shape[0] - 1), x.clip(0, image.shape[1] - 1)
    return ndimage.map_coordinates(image, [y, x], order=1, mode="nearest")


def test_offsets_of_pytorch_deform_conv() -> None:
    """dy and dx of a pixel are neighbours in the memory of a channel's two offset channels together."""
    N, C, H, W = 2, 3, 4, 5
    rng = np.random.default_rng(0)
    image, offset = rng.random((N, C, H, W)), rng.normal(0, 2, (N, 2 * C, H, W))
    pairs = offset.reshape(N, C, H, W, 2)
    rows, columns = np.mgrid[:H, :W]
    want = [
        [resampled(image[n, c], rows + pairs[n, c, ..., 0], columns + pairs[n, c, ..., 1]) for c in range(C)]
        for n in range(N)
    ]
    ours = offset.reshape(N, C, H * W, 2).swapaxes(2, 3).reshape(N, 2 * C, H, W)
    np.testing.assert_allclose(dcn_kernels.offset_sample2d(image, ours), want, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1)])
def test_offsets_of_pytorch_deform_conv_v2(kernel: int, stride: int) -> None:
    """It clamps positions to the padded image, and its taps are centred on pixel 1 of that for every kernel."""
    C, O, H, W, pad = 2, 3, 5, 7, (kernel - 1) // 2
    OH, OW = (H - 1) // stride + 1, (W - 1) // stride + 1
    rng = np.random.default_rng(0)
    image, weight = rng.random((1, C, H, W)), rng.random((O, C, kernel, kernel))
    offset, mask = rng.normal(0, 3, (1, 2 * kernel**2, OH, OW)), rng.random((1, kernel**2, OH, OW))
    rows, columns = 1 + stride * np.mgrid[:OH, :OW]
    want = np.zeros((1, O, OH, OW))
    for c in range(C):
        padded = np.pad(image[0, c], pad)
        for k in range(kernel**2):
            y = rows + k // kernel - pad + offset[0, k]
            x = columns + k % kernel - pad + offset[0, kernel**2 + k]
            want += weight[:, c, k // kernel, k % kernel, None, None] * mask[0, k] * resampled(padded, y, x)
    ours = dcn_kernels.convert_offsets(offset, source="split_yx") - (kernel - 3) / 2
    got = dcn_kernels.deform_conv2d(image, ours, weight, None, stride, pad, 1, mask)
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("size", range(1, 40))
def test_memory_for_other_frameworks_is_aligned_to_64_bytes(size: int) -> None:
    """TensorFlow ends the process at the first reduction over any other."""
    from dcn_kernels.dispatch.arrays import _to_other

    class Framework:
        """Takes an array over as it is."""

        from_dlpack = staticmethod(lambda array: array)

    class Theirs:
        def __array_namespace__(self) -> type[Framework]:
            return Framework

    whole = np.arange(size + 1, dtype=np.float32)
    for array in (whole[1:], whole[:size].reshape(size, 1)):
        aligned = _to_other(array, Theirs())
        assert aligned.ctypes.data % 64 == 0 and aligned.flags.c_contiguous
        np.testing.assert_array_equal(aligned, array)
