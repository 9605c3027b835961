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
from typing import Any

import numpy as np

from dcn_kernels.bench.inputs import Inputs

WORKER = Path(__file__).with_name("peer_worker.py")
_PATIENCE = 300.0  # seconds that one answer may take

# peer -> how to get it, and whether this project has run it
PEERS = {
    "torchvision": ("pip install torch torchvision", True),
    "torch": ("pip install torch  (plain conv2d of the same shape: what deforming costs)", True),
    "onnxruntime": ("pip install onnxruntime onnx", True),
    "openvino": ("pip install openvino onnx", True),
    "mmcv": ("pip install mmcv with its compiled operators, see mmcv's installation guide", False),
    "paddle": ("pip install paddlepaddle", True),
    "mxnet": ("pip install 'mxnet==1.9.1' 'numpy<1.24' in a Python up to 3.11", True),
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
        self._threads = 1
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="dcn-peer-")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, threads: int) -> None:
        """Start the worker; PeerError where the interpreter or the library is missing."""
        self._threads = threads
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(threads)
        try:
            with open(self._said, "wb") as said:  # a file: a pipe that nobody reads would fill, and stop the peer
                self._process = subprocess.Popen(
                    [self.python, "-I", str(WORKER), self.name, str(threads)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for us: the worker is ended by `close`
                )
        except OSError as error:
            raise PeerError(f"cannot run {self.python}: {error.strerror}") from None
        try:
            self.version = str(self._answer("version")["version"])
        except PeerError as error:
            raise PeerError(f"{error}; to get it: {self.hint}; then --against {self.name}=PYTHON") from None

    @property
    def _said(self) -> Path:
        return Path(self._folder.name) / "stderr.txt"

    def load(self, inputs: Inputs, direction: str, backend: str, ours: Any) -> float | None:
        """Hand over a row's arrays, to be timed on the backend's kind of device, and compare the results.

        A worker that has ended is started again. Returns the largest difference over our largest element, or None
        where the peer computes something else.
        """
        if self._process is None:
            self.start(self._threads)
        arrays = {**inputs.sample.arrays, "grad_output": inputs.grad_output}
        path = str(Path(self._folder.name) / "arrays.npz")
        np.savez(path, **{name: _storable(array) for name, array in arrays.items()})  # type: ignore[arg-type]
        answer = self._ask(
            "what",
            do="load",
            path=path,
            op=inputs.op.name,
            direction=direction,
            device="cuda" if backend == "cuda" else "cpu",
            params=inputs.op.parameters(inputs.sample.params),
            dtype=str(next(iter(inputs.sample.arrays.values())).dtype),
        )
        self.what = str(answer["what"])
        if not answer["comparable"]:
            return None
        with np.load(answer["path"]) as theirs:
            return _difference(ours if isinstance(ours, dict) else {"output": ours}, theirs)

    def run(self, milliseconds: float) -> list[float]:
        """Time for about so long, at least once."""
        return list(self._ask("samples_ms", do="run", milliseconds=milliseconds)["samples_ms"])

    def close(self) -> None:
        """End the worker."""
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, field: str, **request: Any) -> dict[str, Any]:
        if self._process is None or self._process.stdin is None:
            raise PeerError("its process has ended")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and why is told below
        return self._answer(field)

    def _answer(self, field: str) -> dict[str, Any]:
        """The worker's next line, an object with this field. One that fails to answer is ended."""
        if self._process is None or self._process.stdout is None:
            raise PeerError("its process has ended")
        ready, _, _ = select.select([self._process.stdout], [], [], _PATIENCE)
        line = self._process.stdout.readline() if ready else ""
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and "error" in answer:
            raise PeerError(str(answer["error"]))
        if isinstance(answer, dict) and field in answer:
            return answer
        self._end()  # what it may still answer would be taken for the answer to the next question
        if not ready:
            raise PeerError(f"its process did not answer within {_PATIENCE:g} s and was ended")
        if line:
            raise PeerError(f"{self.python} is no Python that can run the peer: it answered {line.strip()[:60]!r}")
        last = self._said.read_text(errors="replace").strip().splitlines()[-1:]
        raise PeerError("its process ended" + (f": {last[0][:300]}" if last else ""))


def _difference(ours: dict[str, np.ndarray], theirs: Any) -> float:
    """The largest difference over our largest element, of the results that both have."""
    both = [name for name in ours if name in theirs]
    if not both:
        raise PeerError(f"gave none of {', '.join(ours)}")
    worst = 0.0
    for name in both:
        mine, other = ours[name].astype(np.float64), theirs[name].astype(np.float64)
        if mine.shape != other.shape:
            raise PeerError(f"{name} has shape {other.shape}, ours {mine.shape}")
        if not np.isfinite(other).all():  # a record holds finite numbers, and such a result is no answer
            raise PeerError(f"{name} has elements that are not finite")
        scale = float(np.abs(mine).max(initial=0)) or 1.0
        worst = max(worst, float(np.abs(mine - other).max(initial=0)) / scale)
    return worst


def _storable(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32: the peer's NumPy may not know it."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
