"""The dtypes of all arrays, and the type that sums, coordinates and interpolation weights have for each."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
HALVES = (DTYPES["float16"], BFLOAT16)


def accumulator(dtype: np.dtype) -> np.dtype:
    """The type of sums, coordinates and interpolation weights: float64 for float64, else float32."""
    return DTYPES["float64"] if dtype == np.float64 else DTYPES["float32"]
