"""Arrays in and out, without a copy: any DLPack producer becomes a NumPy or CuPy array, and the result goes back.

No framework is imported here that the caller has not imported. The device of the arrays names the backend.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLPack's device types
BACKENDS = ("reference", "cpu", "cuda")
_DEVICE_NAMES = {CPU: "cpu", CUDA_HOST: "cpu", CUDA: "cuda", CUDA_MANAGED: "cuda"}
# What a framework's from_dlpack or its conversion to NumPy may raise.
_REFUSALS = (BufferError, TypeError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Taken:
    """Arguments as the backend's own arrays."""

    backend: str
    arrays: dict[str, Any]
    out: Any
    framework: str
    like: Any = None  # one of the caller's arrays: results become arrays of the same kind

    def give(self, result: Any, out: Any = None) -> Any:
        """The result (array, tuple or dict) in the caller's own kind of array; `out` itself where it was given."""
        if out is not None and self.framework == "torch" and not out.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(out)  # tells autograd that out was written to
        if isinstance(result, dict):
            return {name: self._give(array) for name, array in result.items()}
        if isinstance(result, tuple):
            first = out if out is not None else self._give(result[0])
            return (first, *(self._give(array) for array in result[1:]))
        return out if out is not None else self._give(result)

    def _give(self, array: Any) -> Any:
        if self.framework in ("numpy", "cupy"):
            return array
        if self.backend == "cuda":
            from dcn_kernels.dispatch import gpu_arrays

            return gpu_arrays.from_cupy(array, self.framework)
        if self.framework == "torch":
            return _to_torch(array)
        if self.framework == "jax":
            return _to_jax(array, self.like)
        return _to_other(array, self.like)


def framework_of(array: Any) -> str:
    """The package that an array belongs to, also where its class is a subclass of another package's."""
    if isinstance(array, np.ndarray):
        return "numpy"
    for name, kind in (("torch", "Tensor"), ("jax", "Array")):
        module = sys.modules.get(name)
        if module is not None and isinstance(array, getattr(module, kind)):
            return name
    return type(array).__module__.partition(".")[0]


def _device(op: str, name: str, array: Any) -> tuple[str, int]:
    """(device kind, device number) of any DLPack array."""
    if isinstance(array, np.ndarray):
        return "cpu", 0
    framework = framework_of(array)
    if framework == "torch":
        _check_torch(op, name, array)
        if array.device.type == "cpu":  # also where it is pinned, which DLPack calls a device of its own
            return "cpu", 0
    elif framework == "jax":
        _check_jax(op, name, array)
    if not hasattr(array, "__dlpack_device__"):
        raise TypeError(f"{op}: {name}: expected an array that supports DLPack, got {type(array).__name__}")
    try:
        kind, number = array.__dlpack_device__()
    except _REFUSALS as error:
        raise TypeError(f"{op}: {name}: expected an array on a CPU or an NVIDIA GPU, got {error}") from error
    if int(kind) not in _DEVICE_NAMES:
        raise TypeError(f"{op}: {name}: expected an array on a CPU or an NVIDIA GPU, got DLPack device {kind}")
    device = _DEVICE_NAMES[int(kind)]
    return device, int(number) if device == "cuda" else 0


def _check_torch(op: str, name: str, tensor: Any) -> None:
    """Refuse what has no memory to look at, and what would lose a gradient without a word."""
    torch = sys.modules["torch"]
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        raise TypeError(f"{op}: {name}: expected a plain tensor, got one inside torch.func: use dcn_kernels.torch")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{op}: {name}: expected a tensor without requires_grad, as no gradient is recorded here, got one that "
            f"requires it: use dcn_kernels.torch, torch.no_grad() or detach()"
        )
    if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        raise TypeError(f"{op}: {name}: expected a tensor without a tangent: there is no forward mode")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name}: expected a tensor of layout torch.strided, got {tensor.layout}")


def _check_jax(op: str, name: str, array: Any) -> None:
    """Refuse what is traced, deleted or on several devices."""
    if isinstance(array, sys.modules["jax"].core.Tracer):
        raise TypeError(f"{op}: {name}: expected a concrete array, got a JAX tracer: use dcn_kernels.jax")
    if array.is_deleted():
        raise TypeError(f"{op}: {name}: expected an array, got a JAX array that was deleted or donated")
    if len(array.devices()) != 1:
        raise TypeError(f"{op}: {name}: expected an array on one device, got one on {len(array.devices())}")


def _to_numpy(op: str, name: str, array: Any) -> np.ndarray:
    """A NumPy view of a CPU array: without a copy, unless it is a torch tensor that was negated lazily."""
    framework = framework_of(array)
    if framework == "numpy":
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{op}: {name}: expected an array, got a masked array, whose mask has no meaning here")
        return np.asarray(array)
    if name == "out" and framework == "torch" and (array.is_neg() or array.is_conj()):
        raise ValueError(f"{op}: out: expected a tensor of plain values, got one negated or conjugated lazily")
    try:
        if framework == "torch":
            return _from_torch(array)
        if framework == "jax":
            return np.asarray(array)  # a view, also of bfloat16, for which NumPy has no DLPack
        return np.from_dlpack(array)
    except _REFUSALS as error:
        if "bfloat16" in str(getattr(array, "dtype", "")):
            raise TypeError(
                f"{op}: {name}: expected float16, float32 or float64 of {framework}, got bfloat16, which NumPy cannot "
                "take by DLPack"
            ) from error
        raise TypeError(f"{op}: {name}: expected an array that NumPy can take by DLPack, got {error}") from error


def _from_torch(tensor: Any) -> np.ndarray:
    torch = sys.modules["torch"]
    # the memory of a lazily negated tensor still holds the old signs, and torch.from_dlpack would hand it out as it is
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(array: np.ndarray) -> Any:
    torch = sys.modules["torch"]
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_jax(array: np.ndarray, like: Any) -> Any:
    """On the device of `like`. JAX copies what is not aligned to 64 bytes, and bfloat16."""
    jax = sys.modules["jax"]
    (device,) = like.devices()
    if array.dtype == ml_dtypes.bfloat16:
        return jax.device_put(array, device)
    return jax.dlpack.from_dlpack(array, device=device)


def _aligned(array: np.ndarray) -> np.ndarray:
    """The array, or a copy whose memory starts at a multiple of 64 bytes: TensorFlow ends the process on any other."""
    if array.ctypes.data % 64 == 0:
        return array
    memory = np.empty(array.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _to_other(array: np.ndarray, like: Any) -> Any:
    """By the array API's own way; a NumPy array where a framework does not have it."""
    array = _aligned(array)
    if hasattr(like, "__array_namespace__"):
        return like.__array_namespace__().from_dlpack(array)
    module = sys.modules.get(type(like).__module__.partition(".")[0])
    from_dlpack = getattr(module, "from_dlpack", None)
    if from_dlpack is not None:
        return from_dlpack(array)
    capsules = getattr(getattr(module, "experimental", None), "dlpack", None)  # TensorFlow takes a capsule
    return array if capsules is None else capsules.from_dlpack(array.__dlpack__())


def _plain_torch(everything: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The usual case, in a few microseconds: torch's own tensors on the CPU with nothing special about them."""
    torch = sys.modules.get("torch")
    if torch is None or torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None  # inside functionalize, numpy() would give memory that nobody has written
    plain = {}
    recorded = torch.is_grad_enabled()
    for name, array in everything.items():
        if type(array) is not torch.Tensor and type(array) is not torch.nn.Parameter:
            return None
        if array.requires_grad:
            if recorded:
                return None
            array = array.detach()
        try:
            plain[name] = array.numpy()  # raises for a tensor that is not plain memory on the CPU
        except (TypeError, RuntimeError):
            return None
    return plain


@contextmanager
def taken_in(op: str, arrays: dict[str, Any], out: Any, backend: str | None) -> Iterator[Taken]:
    """Take all arrays of one call in; on a GPU, make their device and stream current for its duration.

    Raises
    ------
    TypeError
        Something is no array, or the arrays are of two frameworks or on two devices.
    ValueError
        An unknown backend, or one that cannot work on the arrays' device.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{op}: backend: expected one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    everything = dict(arrays) if out is None else {**arrays, "out": out}
    if backend != "cuda" and all(type(array) is np.ndarray for array in everything.values()):
        yield Taken(backend or "cpu", arrays, out, "numpy")
        return
    plain = None if backend == "cuda" else _plain_torch(everything)
    if plain is not None:
        taken_out = plain.pop("out", None)
        yield Taken(backend or "cpu", plain, taken_out, "torch")
        return
    devices = {name: _device(op, name, array) for name, array in everything.items()}
    first = next(iter(everything))
    framework = framework_of(everything[first])
    for name, array in everything.items():
        if framework_of(array) != framework:
            raise TypeError(
                f"{op}: {name}: expected a {framework} array as {first} is, got a {framework_of(array)} one"
            )
        if devices[name] != devices[first]:
            raise TypeError(
                f"{op}: {name}: expected an array on {_say(devices[first])} as {first} is, "
                f"got one on {_say(devices[name])}"
            )
    device, number = devices[first]
    chosen = backend or device
    if (chosen == "cuda") != (device == "cuda"):
        lacks = "" if device == "cuda" or find_spec("cupy") else ", and CuPy is not installed"
        wanted = "a GPU" if chosen == "cuda" else "the CPU"
        raise ValueError(
            f"{op}: backend: {chosen!r} cannot work on arrays on {_say(devices[first])}: move them to {wanted}{lacks}"
        )
    if out is not None and framework == "jax":
        raise TypeError(f"{op}: out: expected None, as JAX arrays cannot be written to, got an array")
    if device == "cpu":
        taken = {name: _to_numpy(op, name, array) for name, array in everything.items()}
        yield Taken(chosen, {n: taken[n] for n in arrays}, taken.get("out"), framework, everything[first])
        return
    from dcn_kernels.dispatch import gpu_arrays  # needs CuPy

    with gpu_arrays.current(everything[first], framework, number):
        taken = {name: gpu_arrays.to_cupy(op, name, array) for name, array in everything.items()}
        yield Taken(chosen, {n: taken[n] for n in arrays}, taken.get("out"), framework, everything[first])


def _say(device: tuple[str, int]) -> str:
    return "the CPU" if device[0] == "cpu" else f"cuda:{device[1]}"
