"""Other libraries, each in a process of its own, timed on the same arrays in rounds between ours.

`NAME` runs in this interpreter, `NAME=PYTHON` in another: peer_worker.py needs only NumPy and the peer there.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dcn_kernels.profiling import Inputs

WORKER = Path(__file__).with_name("peer_worker.py")
_PATIENCE = 600.0  # seconds that one answer may take

# peer -> how to get it, and whether this project has run it
PEERS = {
    "torchvision": ("pip install torch torchvision", True),
    "torch": ("pip install torch  (plain conv2d of the same shape: what deforming costs)", True),
    "onnxruntime": ("pip install onnxruntime onnx", True),
    "openvino": ("pip install openvino onnx", True),
    "mmcv": ("pip install mmcv with its compiled operators, see mmcv's installation guide", False),
    "paddle": ("pip install paddlepaddle", False),
    "mxnet": ("pip install 'mxnet==1.9.1' 'numpy<1.24' in a Python 3.8", False),
    "tvdcn": ("pip install tvdcn", False),
}


class PeerError(RuntimeError):
    """A peer is missing, does not have the operator, or failed."""


class Peer:
    """A worker process. `what` says what it timed last, `version` which version it is."""

    def __init__(self, spec: str) -> None:
        self.name, _, python = spec.partition("=")
        if self.name not in PEERS:
            raise ValueError(f"no peer {self.name!r}; there are: {', '.join(PEERS)}")
        self.python = python or sys.executable
        self.hint, self.tested = PEERS[self.name]
        self.version = self.what = ""
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="dcn-peer-")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, threads: int) -> None:
        """Start the worker; PeerError where the interpreter or the library is missing."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(threads)
        try:
            self._process = subprocess.Popen(
                [self.python, "-I", str(WORKER), self.name, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if os.environ.get("DCN_PEER_STDERR") is None else None,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise PeerError(f"cannot run {self.python}: {error.strerror}") from None
        try:
            self.version = self._answer()["version"]
        except PeerError as error:
            self.close()
            raise PeerError(f"{error}; to get it: {self.hint}; then --against {self.name}=PYTHON") from None

    def load(self, inputs: Inputs, direction: str, threads: int, ours: Any) -> float | None:
        """Hand over a row's arrays and compare the results.

        Returns the largest relative difference, or None where the peer computes something else.
        """
        arrays = {**inputs.sample.arrays, "grad_output": inputs.grad_output}
        path = str(Path(self._folder.name) / "arrays.npz")
        np.savez(path, **{name: _storable(array) for name, array in arrays.items()})  # type: ignore[arg-type]
        answer = self._ask(
            do="load",
            path=path,
            op=inputs.op.name,
            direction=direction,
            params=inputs.op.parameters(inputs.sample.params),
            dtype=str(next(iter(inputs.sample.arrays.values())).dtype),
        )
        self.what = answer["what"]
        if not answer["comparable"]:
            return None
        results = ours if isinstance(ours, dict) else {"output": ours}
        worst = 0.0
        with np.load(answer["path"]) as theirs:
            for name in theirs.files:
                if name not in results:
                    continue
                mine, other = results[name].astype(np.float64), theirs[name].astype(np.float64)
                if mine.shape != other.shape:
                    raise PeerError(f"{name} has shape {other.shape}, ours {mine.shape}")
                scale = float(np.abs(mine).max(initial=0)) or 1.0
                worst = max(worst, float(np.abs(mine - other).max(initial=0)) / scale)
        return worst

    def run(self, milliseconds: float) -> list[float]:
        """Time for about so long, at least once."""
        return list(self._ask(do="run", milliseconds=milliseconds)["samples_ms"])

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._folder.cleanup()

    def _ask(self, **request: Any) -> dict[str, Any]:
        if self._process is None or self._process.stdin is None:
            raise PeerError("is not running")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError("its process has ended") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _PATIENCE)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            why = "did not answer" if not ready else "ended"
            tail = ""
            if ready and self._process.stderr is not None:
                self._process.wait(10)
                tail = ": " + " ".join(self._process.stderr.read().strip().splitlines()[-1:])
            raise PeerError(f"its process {why}{tail}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return dict(answer)


def _storable(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32: the peer's NumPy may not know it."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
