"""The description of one tensor at the edge of a model or a segment. A leaf: see `aivmm.errors`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_BITS = {"bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, element type (NumPy's name, or `string`, `bfloat16`, ...) and shape; None stands for an extent not known before the run."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def static(self) -> bool:
        """True when every extent is known."""
        return all(extent is not None for extent in self.shape)

    @property
    def nbytes(self) -> int | None:
        """Size in bytes; None when an extent is unknown or elements have no fixed size (strings)."""
        if not self.static or self.dtype == "string":
            return None
        elements = math.prod(extent for extent in self.shape if extent is not None)
        bits = _BITS.get(self.dtype) or np.dtype(self.dtype).itemsize * 8
        return (elements * bits + 7) // 8

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join('?' if extent is None else str(extent) for extent in self.shape)}]"
