"""The inputs and outputs that an ONNX file declares, read straight from its protobuf bytes.

Production must not import `onnx`, yet OpenVINO drops unused inputs and renames some, so the declared names have to come from somewhere.
Only the few fields needed are read; weights are skipped over without being touched. Field numbers: onnx/onnx.proto.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aivmm.errors import ModelError
from aivmm.tensors import TensorSpec

# TensorProto.DataType -> NumPy's (or ml_dtypes') name.
ELEMENT_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16", 17: "float8_e4m3fn",
    18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz", 21: "uint4", 22: "int4", 23: "float4_e2m1fn",
    24: "float8_e8m0fnu", 25: "uint2", 26: "int2", 27: "float6_e2m3fn", 28: "float6_e3m2fn",
}  # fmt: skip

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_View = memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """What a model declares. `inputs` leaves out initializers that old files list as inputs too."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def read_interface(model: Path | bytes) -> Interface:
    """Return the declared interface of `model`.

    Raises:
        ModelError: the bytes are not an ONNX model, or the file cannot be read.
    """
    where = "the model" if isinstance(model, bytes) else str(model)
    try:
        found = _try_interface(memoryview(model)) if isinstance(model, bytes) else _of_file(model)
    except OSError as error:
        raise ModelError(f"{where} cannot be read ({error.strerror or error})") from error
    if isinstance(found, str):
        raise ModelError(f"{where} is not a readable ONNX file ({found})")
    return found


def file_state(path: Path) -> object:
    """Return what is another one when the file at `path` was changed or replaced. Raises OSError where there is none."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _of_file(path: Path) -> Interface | str:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return "it is empty"
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _try_interface(memoryview(mapped))


def _try_interface(view: _View) -> Interface | str:
    """Return the interface or what is wrong. Not raised: an error in flight holds views of the file, which then cannot be unmapped."""
    try:
        return _interface(view)
    except IndexError:
        return "truncated"
    except ValueError as error:
        return str(error)


def _interface(view: _View) -> Interface:
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    initializers: set[str] = set()
    graphs = [value for field, value in _fields(view) if field == 7 and isinstance(value, memoryview)]
    if not graphs:
        raise ValueError("no graph")
    for field, value in _fields(graphs[-1]):
        if not isinstance(value, memoryview):
            continue
        if field == 5:
            initializers.add(_text(value, 8))
        elif field == 15:  # sparse: their values are a tensor, which carries the name
            initializers.update(_text(each, 8) for number, each in _fields(value) if number == 1 and isinstance(each, memoryview))
        elif field == 11:
            inputs.append(_value_info(value))
        elif field == 12:
            outputs.append(_value_info(value))
        value.release()
    return Interface(inputs=tuple(each for each in inputs if each.name not in initializers), outputs=tuple(outputs))


def _value_info(view: _View) -> TensorSpec:
    name, dtype = "", "unknown"
    shape: tuple[int | None, ...] = ()
    for field, value in _fields(view):
        if field == 1 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif field == 2 and isinstance(value, memoryview):
            for kind, tensor in _fields(value):
                if kind == 1 and isinstance(tensor, memoryview):
                    dtype, shape = _tensor_type(tensor)
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _tensor_type(view: _View) -> tuple[str, tuple[int | None, ...]]:
    dtype = "unknown"
    shape: tuple[int | None, ...] = ()
    for field, value in _fields(view):
        if field == 1 and isinstance(value, int):
            dtype = ELEMENT_TYPES.get(value, "unknown")
        elif field == 2 and isinstance(value, memoryview):
            shape = tuple(_extent(dim) for number, dim in _fields(value) if number == 1 and isinstance(dim, memoryview))
    return dtype, shape


def _extent(view: _View) -> int | None:
    for field, value in _fields(view):
        if field == 1 and isinstance(value, int):
            return value if value < 1 << 63 else None  # a negative extent stands for "unknown" in some exporters
    return None


def _text(view: _View, wanted: int) -> str:
    for field, value in _fields(view):
        if field == wanted and isinstance(value, memoryview):
            return bytes(value).decode()
    return ""


def _fields(view: _View) -> Iterator[tuple[int, int | _View]]:
    at, end = 0, len(view)
    while at < end:
        key, at = _varint(view, at)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(view, at)
            yield field, value
        elif wire == _BYTES:
            size, at = _varint(view, at)
            if at + size > end:
                raise ValueError("truncated")
            yield field, view[at : at + size]
            at += size
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
            if at > end:
                raise ValueError("truncated")
        else:
            raise ValueError(f"wire type {wire} at byte {at}")


def _varint(view: _View, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"bad number at byte {at}")
