"""Arrays by name as files: what parent and workers hand each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aivmm.runtime.backend import Buffer


def load_arrays(path: str) -> dict[str, Buffer]:
    """Read arrays that `save_arrays` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        names = json.loads(stored["__names__"].tobytes())
        shapes = {int(index): shape for index, shape in json.loads(stored["__strings__"].tobytes()).items()}
        arrays = {}
        for index, name in enumerate(names):
            array = stored[f"array_{index}"]
            arrays[name] = _strings(array, shapes[index]) if index in shapes else array
        return arrays


def save_arrays(path: str | Path, arrays: Mapping[str, Buffer]) -> None:
    """Write arrays by name. Names are data: a tensor called `../../x` or `file` must not become a member of the archive.

    Strings are written as JSON: NumPy's own kind drops trailing NULs, and takes the room of the longest for each.
    """
    values = [np.asarray(array) for array in arrays.values()]
    strings = {index: array.shape for index, array in enumerate(values) if array.dtype.kind in "OSTU"}
    stored = {f"array_{index}": _bytes(array.ravel().tolist()) if index in strings else array for index, array in enumerate(values)}
    with Path(path).open("wb") as file:
        np.savez(file, allow_pickle=False, __names__=_bytes(list(arrays)), __strings__=_bytes(strings), **stored)


def _bytes(value: object) -> Buffer:
    return np.frombuffer(json.dumps(value, default=bytes.decode).encode(), dtype=np.uint8)


def _strings(stored: Buffer, shape: Sequence[int]) -> Buffer:
    array = np.empty(tuple(shape), dtype=object)
    array.ravel()[:] = json.loads(stored.tobytes())
    return array
