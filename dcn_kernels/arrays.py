"""Arrays in and out, without a copy: any DLPack producer becomes a NumPy or CuPy array, and the result goes back.

No framework is imported here that the caller has not imported. The device of the arrays names the backend.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLPack's device types
BACKENDS = ("reference", "cpu", "cuda")
_DEVICE_NAMES = {CPU: "cpu", CUDA_HOST: "cpu", CUDA: "cuda", CUDA_MANAGED: "cuda"}


@dataclass(frozen=True)
class Taken:
    """Arguments as the backend's own arrays."""

    backend: str
    arrays: dict[str, Any]
    out: Any
    framework: str

    def give(self, result: Any, out: Any = None) -> Any:
        """The result (array, tuple or dict) in the caller's own kind of array; `out` itself where it was given."""
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
            from dcn_kernels.cuda import arrays as cuda_arrays

            return cuda_arrays.from_cupy(array, self.framework)
        if self.framework == "torch":
            return _to_torch(array)
        if self.framework == "jax":
            return sys.modules["jax"].dlpack.from_dlpack(array)
        return array


def framework_of(array: Any) -> str:
    """The top-level package that an array's type comes from."""
    root = type(array).__module__.partition(".")[0]
    return "jax" if root == "jaxlib" else root


def _device(op: str, name: str, array: Any) -> tuple[str, int]:
    """(device kind, device number) of any DLPack array."""
    if isinstance(array, np.ndarray):
        return "cpu", 0
    if not hasattr(array, "__dlpack_device__"):
        raise TypeError(f"{op}: {name}: expected an array that supports DLPack, got {type(array).__name__}")
    kind, number = array.__dlpack_device__()
    if int(kind) not in _DEVICE_NAMES:
        raise TypeError(f"{op}: {name}: expected an array on a CPU or an NVIDIA GPU, got DLPack device {kind}")
    device = _DEVICE_NAMES[int(kind)]
    return device, int(number) if device == "cuda" else 0


def _to_numpy(op: str, name: str, array: Any) -> np.ndarray:
    """A zero-copy NumPy view of a CPU array."""
    if isinstance(array, np.ndarray):
        return array
    if framework_of(array) == "torch":
        torch = sys.modules["torch"]
        plain = array.detach().resolve_conj().resolve_neg()
        if plain.dtype == torch.bfloat16:  # NumPy's DLPack has no bfloat16
            return np.from_dlpack(plain.view(torch.int16)).view(ml_dtypes.bfloat16)
        return np.from_dlpack(plain)
    try:
        return np.from_dlpack(array)
    except (BufferError, TypeError, RuntimeError, ValueError) as error:
        raise TypeError(f"{op}: {name}: expected an array that NumPy can take by DLPack, got {error}") from error


def _to_torch(array: np.ndarray) -> Any:
    torch = sys.modules["torch"]
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


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
    devices = {name: _device(op, name, array) for name, array in everything.items()}
    first = next(iter(everything))
    for name, array in everything.items():
        if framework_of(array) != framework_of(everything[first]):
            raise TypeError(
                f"{op}: {name}: expected a {framework_of(everything[first])} array as {first} is, "
                f"got a {framework_of(array)} one"
            )
        if devices[name] != devices[first]:
            raise TypeError(
                f"{op}: {name}: expected an array on {_say(devices[first])} as {first} is, got one on {_say(devices[name])}"
            )
    device, number = devices[first]
    chosen = backend or device
    if (chosen == "cuda") != (device == "cuda"):
        raise ValueError(f"{op}: backend: {chosen!r} cannot work on arrays on {_say(devices[first])}")
    framework = framework_of(everything[first])
    if device == "cpu":
        taken = {name: _to_numpy(op, name, array) for name, array in everything.items()}
        yield Taken(chosen, {n: taken[n] for n in arrays}, taken.get("out"), framework)
        return
    from dcn_kernels.cuda import arrays as cuda_arrays  # needs CuPy

    with cuda_arrays.current(everything[first], framework, number):
        taken = {name: cuda_arrays.to_cupy(op, name, array) for name, array in everything.items()}
        yield Taken(chosen, {n: taken[n] for n in arrays}, taken.get("out"), framework)


def _say(device: tuple[str, int]) -> str:
    return "the CPU" if device[0] == "cpu" else f"cuda:{device[1]}"
