"""What a caller hands in, checked: converted only where nothing is lost, refused with the name of the input and what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np

from aivmm.errors import UsageError
from aivmm.runtime.backend import Buffer
from aivmm.tensors import TensorSpec

_PLAIN = frozenset(["bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
_ON_HOST = (1, 3)  # of DLPack's devices: kDLCPU, kDLCUDAHost


def is_numpy(dtype: str) -> bool:
    """Say whether NumPy alone has this type of fixed size: not strings, and bfloat16 and its like only where ml_dtypes was imported."""
    if dtype in _PLAIN:
        return True
    try:
        return np.dtype(dtype).kind in "biufc"
    except TypeError:
        return False


def dtype_of(spec: TensorSpec) -> np.dtype[Any] | None:
    """Return NumPy's type for `spec`, or None for strings and what is unknown: arrays of those are compared by `checked` alone."""
    return None if spec.dtype in ("string", "unknown") else np.dtype(spec.dtype)


def elsewhere(array: Any) -> bool:
    """Say whether an input is a tensor in a device's memory."""
    where = getattr(array, "__dlpack_device__", None)
    return where is not None and not isinstance(array, np.ndarray) and int(where()[0]) not in _ON_HOST


def kept(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of inputs as they were given, to be asked again: an array of a list would be held to a type that the list has not.

    Raises:
        UsageError: one lies on a device, or cannot be copied.
    """
    copies = {}
    for name, array in inputs.items():
        if elsewhere(array):
            raise UsageError(
                f"the input {name!r} lies on a device, and requests with a deadline are kept on the host",
                advice="give an array of the host, use run_on_device, or set timeout_s to None",
            )
        try:
            copies[name] = array.copy() if isinstance(array, np.ndarray) else deepcopy(array)
        except Exception as error:  # whatever an object of a stranger's raises
            raise UsageError(f"the input {name!r} cannot be kept for a deadline ({error})", advice="give an array") from error
    return copies


def checked(array: Any, spec: TensorSpec, known: Mapping[str, TensorSpec]) -> Buffer:
    """Return `array` as the runtimes take it, converting only what loses nothing: a missing dimension of extent 1 is not guessed.

    Raises:
        UsageError: missing, of another type, or of another shape; names the input and what it should be.
    """
    if array is None:
        raise UsageError(f"input {spec.name!r} is missing", advice=f"the plan takes {', '.join(map(str, known.values()))}")
    try:
        value = np.asarray(array)
    except ValueError as error:
        raise UsageError(f"input {spec.name!r} is not an array ({error})") from error
    if spec.dtype == "string":
        value = _strings(value, spec.name)
    elif value.dtype != np.dtype(spec.dtype):
        plain = not isinstance(array, np.ndarray)  # Python numbers and lists have no type of their own to insist on
        if not (plain and np.can_cast(value.dtype, spec.dtype, casting="same_kind")):
            if value.dtype.kind not in "biufc" and spec.dtype in _PLAIN and value.dtype.names is None:
                kind = "text" if value.dtype.kind in "SUT" else f"of type {value.dtype}"
                raise UsageError(f"input {spec.name!r} is {kind}, expected numbers", advice=f"give an array of {spec.dtype}")
            # A float cut to an integer loses its fraction, and numbers that were normalised nearly all of what they say.
            cut = value.dtype.kind == "f" and np.dtype(spec.dtype).kind in "iu"
            advice = "give whole numbers as they are, not normalised" if cut else f"convert it with .astype({spec.dtype!r})"
            raise UsageError(f"input {spec.name!r} has type {value.dtype}, expected {spec.dtype}", advice=advice)
        value = _converted(value, spec)
    if len(value.shape) != len(spec.shape) or any(want not in (None, have) for want, have in zip(spec.shape, value.shape, strict=True)):
        raise UsageError(
            f"input {spec.name!r} has shape {list(value.shape)}, expected {spec}", advice="tune for this shape with --shape or --batch"
        )
    if not value.flags.c_contiguous or not value.flags.writeable or not value.flags.aligned:
        value = value.copy()  # both runtimes share only contiguous memory, and OpenVINO only writeable
    return value


def _converted(value: Buffer, spec: TensorSpec) -> Buffer:
    """Return Python numbers in the type wanted; those that do not fit are refused instead of wrapped around."""
    with np.errstate(over="ignore"):
        converted = value.astype(spec.dtype)
    fits = np.array_equal(converted, value) if converted.dtype.kind in "biu" else np.array_equal(np.isinf(converted), np.isinf(value))
    if not fits:
        raise UsageError(f"input {spec.name!r} holds numbers that do not fit into {spec.dtype}")
    return converted


def _strings(value: Buffer, name: str) -> Buffer:
    if value.dtype.kind == "S":
        try:
            value = np.char.decode(value, "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"input {name!r} holds bytes that are not UTF-8", advice="give strings") from error
    if value.dtype.kind not in "OTU":
        raise UsageError(f"input {name!r} has type {value.dtype}, expected strings")
    value = value.astype(object)
    odd = [each for each in value.flat if not isinstance(each, str)]
    if odd:
        raise UsageError(f"input {name!r} holds {type(odd[0]).__name__}, expected strings")
    return value


def refuse_unnamed(inputs: object) -> None:
    """Raise UsageError for inputs that are not given by name: an array, or a list of them."""
    if not isinstance(inputs, Mapping):
        kind = type(inputs).__name__
        raise UsageError(f"inputs are given by name, and this is a {kind}", advice="give a mapping: {'name': array}") from None


def refuse_unknown(inputs: Mapping[str, Any], known: Mapping[str, TensorSpec]) -> None:
    """Raise UsageError when `inputs` names a tensor that the plan does not take."""
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise UsageError(f"unknown input {unknown[0]!r}", advice=f"the plan takes {', '.join(map(str, known.values()))}")
