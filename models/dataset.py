"""Calibration and validation data: read from the user's files or callable, checked sample by sample, and split.

A callable is the user's own code, named on the user's own command line (or in the user's own call of our API), and runs with the user's
rights. That is the whole of its licence: nothing that comes from a model, a plan, a bundle or a database may ever name one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # NumPy has no bfloat16, float8 or int4 of its own
import numpy as np
import numpy.typing as npt

from aivmm.errors import UsageError
from aivmm.models.dataset_shapes import Declared, ShapeSurvey
from aivmm.models.user_function import UserFunction, text_of
from aivmm.tensors import TensorSpec

Array = npt.NDArray[Any]
Piece = tuple[str, Mapping[str, Any]]  # where it was found, for messages, and its arrays by name

MOST_CALIBRATION = 300  # NNCF's default subset_size; statistics gain little beyond it

_TAKES = "--dataset takes an .npz or .npy file, a folder of .npy or .npz files, or MODULE:FUNCTION"
_END: Any = object()


class MisshapenError(UsageError):
    """An array of a sample has a shape that its input does not take. `shapes` are those of all its arrays."""

    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one run of the model takes. `extras` are arrays of the data set that are no inputs, such as labels: for the user's metric."""

    inputs: Mapping[str, Array]
    extras: Mapping[str, Array]


def load_dataset(given: str, specs: Sequence[TensorSpec], *, most: int) -> tuple[list[Sample], list[str]]:
    """Return the first `most` samples of a data set, and notes for the user; see `read_samples`, which needs less memory."""
    notes: list[str] = []
    return list(read_samples(given, specs, most=most, notes=notes)), notes


def read_samples(
    given: str, specs: Sequence[TensorSpec], *, most: int, notes: list[str], declared: Callable[[], Declared] | None = None
) -> Generator[Sample]:
    """Yield the first `most` samples for the inputs `specs` one by one, and append notes for the user to `notes` at the end.

    `given` is one of
    - an `.npz` file, arrays named as the inputs: those of exactly the inputs' shapes are one sample; with one more axis in front, of the
      same extent on every array, they are several (as `--inputs` has it). An `.npy` file is the same for a model with one input.
    - a folder of `.npz` files (one sample each) or of `.npy` files (the same, for a model with one input), in natural order: 2 before 10.
    - `module:function` or `path/to/file.py:function`: called without arguments, it returns an iterable of dicts from name to array.

    A sample fits an input's shape exactly, or lacks its leading axis of 1, which is then added, to the sample's extras too. Where that
    axis is longer (a batch of 8), as many consecutive samples that lack it, or have 1 there, become one. (`--inputs` takes whole batches
    only.) Types may differ within their kind if no value is lost: int32 for int64, float64 for float32 (rounded, never to infinity).
    Arrays are copies, C-contiguous, in native byte order. Arrays that are no inputs become extras. Open extents of `specs` (None) take
    samples of any. `declared` says how the model's file has its inputs: where a sample has another shape than `specs`, the shapes of all
    are then looked at, and the error says which ones to tune for.

    Raises:
        UsageError: nothing there, no samples, or one that does not fit: a name, shape or type, NaN or infinity, Python objects (pickles
            are refused unread), or the callable failed. Samples are counted from 0 in messages.
    """
    if most < 1:
        raise ValueError(f"most={most}: at least one sample is needed")
    try:
        pieces, total = _open(given, specs)
    except MisshapenError as error:
        raise _better(error, given, specs, declared, 0, [error.shapes]) from error
    assembler = _Assembler(specs)
    taken = used = made = 0
    with contextlib.closing(pieces):
        for where, arrays in pieces:
            taken += 1
            if made == most:  # only to see whether there are more
                break
            try:
                sample = assembler.add(where, arrays)
            except MisshapenError as error:
                further = (_shapes(each) for _, each in itertools.islice(pieces, most))
                raise _better(error, given, specs, declared, taken - 1, itertools.chain([error.shapes], further)) from error
            if sample is not None:
                used, made = taken, made + 1
                yield sample
                if made == most and total is not None:
                    break
    if not made:
        if assembler.batch > 1 and taken:
            what = f"{given}: {taken} samples are fewer than one batch of {assembler.batch}"
            raise UsageError(what, advice="give more samples with --dataset, or a smaller --batch")
        raise UsageError(f"{given}: no samples", advice=_TAKES)
    given_count = taken if total is None else total
    if made == most and given_count > used:
        count = f"{given_count:,}" if total is not None else f"more than {used:,}"
        notes.append(f"{count} samples were given; the first {used:,} are used")
    elif taken > used:
        left_out = taken - used
        notes.append(f"{taken:,} samples were given; the last {left_out:,} do not fill a batch of {assembler.batch} and are left out")
    if made == 1:
        notes.append("one sample was given, so the model is calibrated and judged on the same one")


def split(samples: Sequence[Sample], *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those for calibration and those held out for validation; see `split_indices`."""
    calibration, validation = split_indices([digest(each) for each in samples], seed=seed)
    return [samples[index] for index in calibration], [samples[index] for index in validation]


def split_indices(digests: Sequence[str], *, seed: int) -> tuple[list[int], list[int]]:
    """Return shuffled indices for calibration and for validation, of samples known by the digests of their inputs.

    Half of the samples calibrate, but at most 300, and the others are held out: a calibration gains little from more, while the error of
    an accuracy shrinks with the root of the number of samples. Samples with the same inputs stay on one side, or else they would not be
    held out. When all are the same, or there is one, both sides get them. The same seed gives the same split on every machine and
    with every version of Python and NumPy, since measurements are remembered by it.
    """
    groups: dict[str, list[int]] = {}
    for index, each in enumerate(digests):
        groups.setdefault(each, []).append(index)
    order = sorted(groups.values(), key=lambda group: hashlib.sha256(f"{seed}:{group[0]}".encode()).digest())
    if len(order) < 2:
        everything = [index for group in order for index in group]
        return everything[:MOST_CALIBRATION], everything
    wanted = min(MOST_CALIBRATION, len(digests) // 2)
    calibration: list[int] = []
    while len(order) > 1 and len(calibration) < wanted:
        calibration += order.pop(0)
    return calibration[:MOST_CALIBRATION], [index for group in order for index in group]


def digest(sample: Sample) -> str:
    """Return a hash of the sample's inputs: names, types, shapes and values."""
    total = hashlib.sha256()
    for name, array in sorted(sample.inputs.items()):
        total.update(repr((name, array.dtype.str, array.shape)).encode())
        total.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes())
    return total.hexdigest()


# --- where samples come from ---


def _open(given: str, specs: Sequence[TensorSpec]) -> tuple[Generator[Piece], int | None]:
    """Return the pieces of a data set, one a sample, and how many there are, where that is known."""
    path = Path(given)
    if path.is_dir():
        return _folder(path, specs)
    if path.is_file():
        arrays = _read(path, specs)
        return _sliced(str(path), arrays, specs)
    if UserFunction.is_named(given):
        return _called(UserFunction.find(given, option="--dataset", arguments=()))
    raise UsageError(f"{given}: no such file or folder", advice=_TAKES)


def _folder(path: Path, specs: Sequence[TensorSpec]) -> tuple[Generator[Piece], int]:
    files = [
        each for each in path.iterdir() if each.suffix.lower() in (".npy", ".npz") and not each.name.startswith(".") and each.is_file()
    ]
    kinds = {each.suffix.lower() for each in files}
    if not files:
        raise UsageError(f"{path}: a folder without .npy and .npz files", advice=_TAKES)
    if len(kinds) > 1:
        raise UsageError(f"{path}: a folder of both .npy and .npz files", advice="give --dataset a folder of one kind")
    files.sort(key=lambda file: [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)])
    return ((str(file), _read(file, specs)) for file in files), len(files)


def _read(path: Path, specs: Sequence[TensorSpec]) -> Mapping[str, Array]:
    """Read an `.npz` file, or an `.npy` file for the only input."""
    try:
        with path.open("rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
        if is_npy:
            if len(specs) != 1:
                many = f"{path}: an .npy file holds one array, and the model has {len(specs)} inputs"
                raise UsageError(many, advice=f"give --dataset .npz files with {', '.join(spec.name for spec in specs)}")
            return {specs[0].name: np.load(path, mmap_mode="r", allow_pickle=False)}
        if not zipfile.is_zipfile(path):
            raise UsageError(f"{path}: not an .npz or .npy file", advice="write one with numpy.savez(path, name=array, ...)")
        with np.load(path, allow_pickle=False) as archive:
            return {name: _member(path, name, archive[name]) for name in archive.files}
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        pickled = re.search("pickle|Python objects", str(error))  # NumPy's words when it reads a file, and when it maps one
        reason = "it holds Python objects (a pickle), which are not read" if pickled else text_of(error)
        raise UsageError(f"{path}: cannot be read: {reason}", advice="write it with numpy.savez(path, name=array, ...)") from error


def _member(path: Path, name: str, value: object) -> Array:
    if not isinstance(value, np.ndarray):  # a member of the archive that is no .npy comes as bytes
        raise UsageError(f"{path}: {name!r} is not an array", advice="write it with numpy.savez(path, name=array, ...)")
    return value


def _sliced(path: str, arrays: Mapping[str, Array], specs: Sequence[TensorSpec]) -> tuple[Generator[Piece], int]:
    """Take arrays apart along their sample axis, if they have one."""
    _require_all(path, arrays, specs)
    if all(_how(spec, arrays[spec.name].shape) in ("fits", "lacks") for spec in specs):
        return (each for each in [(path, arrays)]), 1
    for spec in specs:
        shape = arrays[spec.name].shape
        if not shape or _how(spec, shape[1:]) is None:
            raise _misshapen(path, spec, arrays, several=True)
    first = specs[0].name
    count = arrays[first].shape[0]
    for name, array in arrays.items():
        if array.shape[:1] != (count,):
            found = f"{array.shape[0]}" if array.shape else "no sample axis"
            raise UsageError(f"{path}: array {first!r} holds {count} samples, {name!r} {found}", advice="give every array as many")
    # `...` keeps a sample of a scalar input an array of its type.
    return ((f"{path}, sample {index}", {name: array[index, ...] for name, array in arrays.items()}) for index in range(count)), count


def _called(function: UserFunction) -> tuple[Generator[Piece], int | None]:
    """Call the user's function and check that samples can come of it."""
    with function.running():
        found = function.call()
        iterable = not isinstance(found, (Mapping, str, bytes)) and (hasattr(found, "__iter__") or hasattr(found, "__getitem__"))
        counted = None
        with contextlib.suppress(TypeError, NotImplementedError):  # PyTorch's DataLoader has a `__len__` that may have no answer
            counted = len(found)
        iterator = iter(found) if iterable else None
    if iterator is None:
        what = f"{function} returned {type(found).__name__}, expected an iterable of dicts"
        raise UsageError(what, advice="let it yield {name: array, ...} for each sample")
    if counted is not None and not hasattr(found, "__iter__"):
        iterator = itertools.islice(iterator, counted)  # PyTorch's data sets may have a `__getitem__` without an end
    return _yielded(function, iterator), counted


def _yielded(function: UserFunction, iterator: Iterator[Any]) -> Generator[Piece]:
    try:
        for index in itertools.count():
            with function.running():
                found = next(iterator, _END)
            if found is _END:
                return
            where = f"{function}, sample {index}"
            if not isinstance(found, Mapping):
                what = f"{where}: it yielded {type(found).__name__}, expected a dict"
                raise UsageError(what, advice="let it yield {name: array, ...} for each sample")
            arrays = {}
            for name, value in found.items():
                if not isinstance(name, str):
                    raise UsageError(f"{where}: the name {text_of(name)} is no string", advice="let it yield {name: array, ...}")
                with function.running(f"cannot make an array of {name!r} in sample {index}"):
                    arrays[name] = np.asarray(value)
            yield where, arrays
    finally:
        if isinstance(iterator, Generator):
            with contextlib.suppress(UsageError), function.running():  # we have what we need, whatever its last words are
                iterator.close()


# --- what a sample has to be ---


class _Assembler:
    """Checks pieces, and makes samples of them: one of each, or one of each `batch` where they lack a batch axis."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.batch = 1
        self._specs = specs
        self._rows: list[Sample] = []
        self._split: tuple[str, ...] = ()  # the inputs that are put together

    def add(self, where: str, arrays: Mapping[str, Any]) -> Sample | None:
        """Take the next piece; return a sample when one is complete."""
        _require_all(where, arrays, self._specs)
        how = {spec.name: _how(spec, np.shape(arrays[spec.name])) for spec in self._specs}
        inputs = {}
        for spec in self._specs:
            if how[spec.name] is None:
                raise _misshapen(where, spec, arrays)
            array = cast_array(where, spec, arrays[spec.name])
            inputs[spec.name] = array[None] if how[spec.name] in ("lacks", "row lacks") else array
        extras = {name: _extra(where, name, value) for name, value in arrays.items() if name not in inputs}
        parts = tuple(name for name, each in how.items() if each in ("row", "row lacks"))
        if "lacks" in how.values() or "row lacks" in how.values():
            extras = {name: array[None] for name, array in extras.items()}
        if self._rows and parts != self._split:
            raise UsageError(f"{where}: its shapes differ from those of the samples before", advice="give all samples the same shapes")
        if not parts:
            return Sample(inputs=inputs, extras=extras)
        return self._add_row(where, Sample(inputs=inputs, extras=extras), parts)

    def _add_row(self, where: str, row: Sample, parts: tuple[str, ...]) -> Sample | None:
        extents = {spec.shape[0] for spec in self._specs if spec.name in parts}
        if len(extents) > 1:
            raise UsageError(f"{where}: {', '.join(parts)} have batches of different extents", advice="give --dataset whole batches")
        self.batch = next(iter(extents)) or 1
        self._split = parts
        self._rows.append(row)
        if len(self._rows) < self.batch:
            return None
        rows, self._rows = self._rows, []
        inputs = {name: _joined(where, name, [each.inputs[name] for each in rows], name in parts) for name in row.inputs}
        if any(each.extras.keys() != row.extras.keys() for each in rows):
            raise UsageError(f"{where}: it has other arrays than the samples before", advice="give all samples the same arrays")
        extras = {}
        for name in row.extras:
            found = [each.extras[name] for each in rows]
            extras[name] = _joined(where, name, [each if each.shape[:1] == (1,) else each[None] for each in found], True)
        return Sample(inputs=inputs, extras=extras)


def _joined(where: str, name: str, arrays: Sequence[Array], parts: bool) -> Array:
    """Join the parts of a batch; what has no batch axis has to be the same in each."""
    if parts and len({each.shape for each in arrays}) == 1:
        return np.concatenate(arrays)
    if not parts and all(np.array_equal(each, arrays[0]) for each in arrays):
        return arrays[0]
    raise UsageError(
        f"{where}: {name!r} {'has different shapes' if parts else 'has different values'} within one batch of {len(arrays)}",
        advice="give --dataset whole batches, or use --batch 1",
    )


def _require_all(where: str, arrays: Mapping[str, Any], specs: Sequence[TensorSpec]) -> None:
    for spec in specs:
        if spec.name not in arrays:
            found = ", ".join(map(str, arrays)) or "no arrays"
            raise UsageError(f"{where}: no array for input {spec}", advice=f"name the arrays of --dataset as the inputs; found: {found}")


def _how(spec: TensorSpec, shape: tuple[int, ...]) -> Literal["fits", "lacks", "row", "row lacks"] | None:
    """Say how one sample's shape fits an input: whole, or a row of a longer batch, with the leading axis or without it."""
    if _fits(shape, spec.shape):
        return "fits"
    if not spec.shape or not spec.shape[0]:
        return None
    if _fits(shape, spec.shape[1:]):
        return "lacks" if spec.shape[0] == 1 else "row lacks"
    return "row" if _fits(shape, (1, *spec.shape[1:])) else None


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (None, have) for have, want in zip(shape, wanted, strict=True))


def _misshapen(where: str, spec: TensorSpec, arrays: Mapping[str, Any], *, several: bool = False) -> MisshapenError:
    expected = ", ".join("?" if extent is None else str(extent) for extent in spec.shape)
    several_are = f"several samples have one more axis in front: [samples{', ' if expected else ''}{expected}]"
    error = MisshapenError(
        f"{where}: array {spec.name!r} has shape {list(np.shape(arrays[spec.name]))}, expected [{expected}]",
        advice=several_are if several else "give --dataset one sample at a time, in the shapes that the model takes (or change --shape)",
    )
    # Of several samples in one file, the shapes are those of each.
    error.shapes = {name: shape[1:] if several else shape for name, shape in _shapes(arrays).items()}
    return error


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(array) for name, array in arrays.items()}


def _better(
    error: MisshapenError,
    given: str,
    specs: Sequence[TensorSpec],
    declared: Callable[[], Declared] | None,
    fitted: int,
    shapes: Iterable[Mapping[str, tuple[int, ...]]],
) -> UsageError:
    """Return `error`, or what the `shapes` of all samples say instead, those that `fitted` before included."""
    if declared is None:
        return error
    survey = ShapeSurvey(specs, declared())
    survey.add_bound(fitted)
    if not all(map(survey.add, shapes)):
        return error  # one has a shape that the model takes in no size: that is the first thing to mend
    return survey.refusal(given) or error


def _extra(where: str, name: str, value: Any) -> Array:
    array = np.array(value)
    strings = array.dtype.kind == "O" and all(isinstance(each, str) for each in array.ravel())
    if array.dtype.kind not in "biufcUS" and not strings:
        found = "Python objects" if array.dtype.kind == "O" else str(array.dtype)
        raise UsageError(f"{where}: {name!r} holds {found}, expected numbers or strings", advice="leave it out of --dataset")
    return array


def cast_array(where: str, spec: TensorSpec, array: Array) -> Array:
    """Return a C-contiguous copy of `array` in the type of `spec`.

    Raises:
        UsageError: another kind of type, values that would be lost, or NaN or infinity.
    """
    wanted = _dtype(spec.dtype)
    refused = UsageError(f"{where}: array {spec.name!r} is {array.dtype}, expected {spec.dtype}", advice="convert it with .astype(...)")
    if spec.dtype == "string":
        return _strings(array, refused)
    if array.dtype.kind == "V" and hasattr(ml_dtypes, spec.dtype) and array.itemsize == wanted.itemsize:
        array = array.view(wanted)  # .npy files have no name for bfloat16 and its like
    kind = _kind(wanted)
    if _kind(array.dtype) != kind:
        raise refused
    if kind in ("float", "complex") and not np.isfinite(array).all():
        found = "NaN" if np.isnan(array).any() else "infinity"
        raise UsageError(f"{where}: array {spec.name!r} holds {found}, expected numbers", advice="leave such samples out of --dataset")
    if kind == "integer" and array.size:
        info: Any = np.iinfo(wanted) if wanted.kind in "iu" else ml_dtypes.iinfo(wanted)  # type: ignore[no-untyped-call]
        if int(array.min()) < info.min or int(array.max()) > info.max:
            held = f"{array.min()} to {array.max()}"
            raise UsageError(f"{where}: array {spec.name!r} holds {held}, which {spec.dtype} cannot hold", advice="mend --dataset")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.array(array, dtype=wanted, order="C")
    if kind in ("float", "complex") and not np.isfinite(cast).all():
        raise UsageError(f"{where}: array {spec.name!r} holds numbers too large for {spec.dtype}", advice="mend --dataset")
    return cast


def _strings(array: Array, refused: UsageError) -> Array:
    if array.dtype.kind not in "US" and not (array.dtype.kind == "O" and all(isinstance(each, str) for each in array.ravel())):
        raise refused
    try:
        return np.array(array.astype(str) if array.dtype.kind == "S" else array, dtype=object)
    except UnicodeDecodeError:
        raise refused from None


def _dtype(name: str) -> np.dtype[Any]:
    if name == "string":
        return np.dtype(object)
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError as error:
        raise UsageError(f"inputs of type {name} are not supported", advice="leave --dataset away") from error


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "iu" or dtype.name in ("int2", "uint2", "int4", "uint4"):
        return "integer"
    if dtype.kind == "f" or dtype.name.startswith(("bfloat", "float")):
        return "float"
    return {"b": "bool", "c": "complex"}.get(dtype.kind, str(dtype))
