"""Sample inputs: made from types, names and what the graph implies, or read from the user's file."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # comes with onnx: NumPy has no bfloat16, float8 or int4 of its own
import numpy as np
import numpy.typing as npt
import onnx

from aivmm.errors import UsageError
from aivmm.models.input_trace import InputTrace
from aivmm.tensors import TensorSpec

Array = npt.NDArray[Any]

SAMPLE_RATE = 16000
_TEXTS = ("a short text", "the quick brown fox jumps over the lazy dog", "how long does this take?", "aivmm")
_WORDS_IN_TEXT = 64
_PLACE_WORDS = frozenset({"edge", "edges", "index", "indices", "node", "nodes", "adj"})  # ids of places, evenly drawn
_STATE_WORDS = frozenset({"state", "h0", "c0", "h", "c", "hidden", "hn", "cn", "hx", "cx", "past", "cache", "memory"})
_LENGTH_WORDS = frozenset({"length", "lengths", "len", "lens", "seqlen", "seqlens"})
_AUDIO_WORDS = frozenset({"audio", "wav", "wave", "waveform", "speech", "pcm", "sound", "signal"})


def make_inputs(model: onnx.ModelProto, specs: Sequence[TensorSpec], *, seed: int, count: int = 1) -> list[dict[str, Array]]:
    """Make `count` different samples for the inputs `specs` of `model`: C-contiguous arrays by input name, of those types and shapes.

    The same seed gives the same samples, and sample k does not depend on `count`. Indices stay within the tables they are used on, masks
    are ones, states are zeros, lengths are whole extents; 64-bit integers that are only calculated with go beyond 32 bits; images and
    audio look like such, other floats are standard normal.

    Raises:
        UsageError: an extent is unknown, or an input has a type that cannot be made up.
    """
    for spec in specs:
        if not spec.static:
            raise UsageError(f"input {spec} has an extent that is not bound", advice="bind it with --dim or --shape")
    maker = _Maker(model, specs)
    return [
        {spec.name: maker.make(spec, np.random.default_rng([seed, index, zlib.crc32(spec.name.encode())])) for spec in specs}
        for index in range(count)
    ]


def image_like(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return float32 [N, C, H, W] with the look of normalised photographs: mean about 0, deviation about 1, within ±3.

    Details at all scales (natural images have a 1/f spectrum: Field 1987, doi:10.1364/JOSAA.4.002379), and each image has its own
    brightness and contrast. On white noise networks see near-identical images, and accuracy measured on it says little.
    """
    count, channels, height, width = shape
    image = rng.standard_normal((count, channels, 1, 1), dtype=np.float32) * np.float32(0.5)
    contrast = rng.uniform(0.2, 0.5, (count, 1, 1, 1)).astype(np.float32)
    image = np.broadcast_to(image, shape).copy()
    for octave in range(1, 7):
        cells = 2**octave
        coarse = rng.standard_normal((count, channels, min(cells, height), min(cells, width)), dtype=np.float32)
        rows, columns = np.arange(height) * coarse.shape[2] // height, np.arange(width) * coarse.shape[3] // width
        image += contrast * coarse[:, :, rows][:, :, :, columns]
    clipped: Array = np.clip(image, -3, 3)
    return clipped


def audio_like(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return float32 [..., samples] within ±1: noise of random loudness over a fainter voiced tone of random pitch, as at 16 kHz.

    The noise leads, since voice detectors answer a pure tone like silence (measured on Silero).
    """
    seconds = np.arange(shape[-1]) / SAMPLE_RATE
    lead = (*shape[:-1], 1)
    pitch, voice, noise = rng.uniform(90, 280, lead), rng.uniform(0.01, 0.05, lead), rng.uniform(0.03, 0.15, lead)
    tone = sum(np.sin(2 * np.pi * pitch * harmonic * seconds + rng.uniform(0, 2 * np.pi, lead)) / harmonic for harmonic in range(1, 9))
    return np.clip(voice * tone + noise * rng.standard_normal(shape), -1, 1).astype(np.float32)


def text_like(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> Array:
    """Return int64 ids in [low, high] as texts have them: along the last axis 64 words at most, their frequencies by Zipf's law.

    Evenly drawn ids all look alike to a text model: Magika answers "unknown" to each, at 0.99.
    """
    rows = (*shape[:-1], _WORDS_IN_TEXT)
    words = rng.integers(low, high, rows, endpoint=True)
    shares = np.cumsum(1 / np.arange(1, _WORDS_IN_TEXT + 1))
    picked = np.searchsorted(shares / shares[-1], rng.random(shape), side="right")
    return np.take_along_axis(words, np.minimum(picked, _WORDS_IN_TEXT - 1), axis=-1)


def _words(name: str) -> list[str]:
    """Split `past_key_values.0`, `stateN` or `input/mask:0` into lower-case words."""
    return [each.lower() for each in re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*|\d+", name)]


def _is_mask(words: Sequence[str]) -> bool:
    return any(word.endswith(("mask", "masks")) for word in words)


def _is_state(words: Sequence[str]) -> bool:
    if "hidden" in words and "states" in words:  # `encoder_hidden_states`: a transformer's activations
        return False
    return not _STATE_WORDS.isdisjoint(words) or words == ["states"] or words[:2] == ["initial", "states"]


def _is_sample_rate(words: Sequence[str]) -> bool:
    joined = "".join(words)
    return "sr" in words or "samplerate" in joined or "samplingrate" in joined


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy type of a spec's type name; strings are objects.

    Raises:
        UsageError: no such type.
    """
    if name == "string":
        return np.dtype(object)
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError as error:
        raise UsageError(f"inputs of type {name} are not supported") from error


class _Maker:
    def __init__(self, model: onnx.ModelProto, specs: Sequence[TensorSpec]) -> None:
        self._trace = InputTrace(model, specs)
        self._specs = specs
        self._symbolic = {
            value.name: [axis for axis, extent in enumerate(value.type.tensor_type.shape.dim) if axis and extent.dim_param]
            for value in model.graph.input
        }

    def make(self, spec: TensorSpec, rng: np.random.Generator) -> Array:
        """Make one array."""
        made: Array = np.asarray(self._made(spec, rng), order="C")  # `ascontiguousarray` would give a scalar an axis
        return made

    def _made(self, spec: TensorSpec, rng: np.random.Generator) -> Array:
        dtype = numpy_dtype(spec.dtype)
        shape = tuple(extent for extent in spec.shape if extent is not None)
        if dtype.kind == "O":
            return np.array(rng.choice(_TEXTS, shape), dtype=object).reshape(shape)
        words = _words(spec.name)
        reached = {(node.op_type, index) for node, index in self._trace.reached(spec.name)}
        if dtype.kind == "b":
            ignores = "key" in words and "padding" in words  # PyTorch's key_padding_mask: true means "leave out"
            return np.full(shape, not ignores)
        if _is_sample_rate(words):
            return np.full(shape, SAMPLE_RATE).astype(dtype)
        if _is_mask(words):
            return np.ones(shape, dtype)
        if _is_integer(dtype):
            return self._integers(spec, shape, dtype, words, reached, rng)
        if _is_state(words) or not reached.isdisjoint({(op, index) for op in ("LSTM", "GRU", "RNN") for index in (5, 6)}):
            return np.zeros(shape, dtype)
        if dtype.kind == "c":
            return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
        return self._floats(spec, shape, words, rng).astype(dtype)

    def _integers(
        self,
        spec: TensorSpec,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        words: Sequence[str],
        reached: set[tuple[str, int]],
        rng: np.random.Generator,
    ) -> Array:
        low, high = self._trace.range_of(spec.name)
        if {"position", "positions", "pos"} & set(words):
            places = np.broadcast_to(np.arange(shape[-1] if shape else 1), shape) if shape else np.zeros(())
            return np.clip(places, low, high).astype(dtype) if (low, high) != (None, None) else places.astype(dtype)
        if "segment" in words or {"token", "type"} <= set(words) or _is_state(words):
            return np.full(shape, low or 0).astype(dtype)
        if not _LENGTH_WORDS.isdisjoint(words) or not reached.isdisjoint({("LSTM", 4), ("GRU", 4), ("RNN", 4)}):
            return np.full(shape, self._extent(spec)).astype(dtype)
        if low is None and high is None:
            if (axis := _channel_axis(shape)) is not None and dtype.itemsize == 1:
                pixels = _image(rng, shape, axis) * 60 + (128 if dtype.kind == "u" else 0)
                info = np.iinfo(dtype)
                clipped: Array = np.clip(pixels, info.min, info.max).astype(dtype)
                return clipped
            if dtype.itemsize == 1:  # bytes, or quantised values
                return rng.integers(*_limits(dtype), shape, endpoint=True).astype(dtype)
            if dtype.itemsize == 8 and self._trace.only_counts(spec.name):
                return _beyond_32_bits(shape, rng).astype(dtype)
            low, high = (1, 1) if int(np.prod(shape)) == 1 else (0, 9)  # a lone integer is a count, a size or a switch
        limits = _limits(dtype)
        least = max(limits[0], low if low is not None else min(0, high if high is not None else 0))
        most = min(limits[1], high if high is not None else least + 9)
        most = max(least, most)
        if len(shape) > 1 and shape[-1] > 8 and _PLACE_WORDS.isdisjoint(words):
            return text_like(rng, shape, least, most).astype(dtype)
        return rng.integers(least, most, shape, endpoint=True).astype(dtype)

    def _extent(self, lengths: TensorSpec) -> int:
        """Return the extent that a tensor of lengths counts: of the first other input's dynamic axis, or else its longest but the batch."""
        for spec in self._specs:
            if spec.name != lengths.name and len(spec.shape) > 1:
                axes = self._symbolic.get(spec.name) or range(1, len(spec.shape))
                return max(spec.shape[axis] or 0 for axis in axes)
        return 1

    def _floats(self, spec: TensorSpec, shape: tuple[int, ...], words: Sequence[str], rng: np.random.Generator) -> Array:
        if not _LENGTH_WORDS.isdisjoint(words):  # SpeechBrain's: a share of the longest
            return np.ones(shape)
        if "threshold" in words or "thresholds" in words:
            return np.full(shape, 0.5)
        if not shape:
            return np.ones(shape)
        if (axis := _channel_axis(shape)) is not None:
            return _image(rng, shape, axis)
        if self._is_audio(spec, shape, words):
            return audio_like(rng, shape)
        return rng.standard_normal(shape)

    def _is_audio(self, spec: TensorSpec, shape: tuple[int, ...], words: Sequence[str]) -> bool:
        """Say whether the input is a waveform: by name, or because it feeds an STFT or a 1-D convolution over one channel."""
        if shape[-1] < 160 or (len(shape) == 3 and shape[1] > 2) or len(shape) > 3:
            return False
        if not _AUDIO_WORDS.isdisjoint(words):
            return True
        for node, index in self._trace.reached(spec.name):
            weight = self._trace.shape(node.input[1]) if node.op_type == "Conv" and index == 0 else None
            if (node.op_type == "STFT" and index == 0) or (weight is not None and len(weight) == 3 and weight[1] == 1):
                return True
        return False


def _beyond_32_bits(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Return int64 of which the first and about half of the others need more than 32 bits, as time stamps do; the rest are small.

    OpenVINO calculates int64 in 32 bits; small numbers never show it.
    """
    large = np.asarray(rng.random(shape) < 0.5)
    large.flat[:1] = True
    return np.where(large, rng.integers(1 << 32, 1 << 33, shape), rng.integers(0, 9, shape, endpoint=True))


def _is_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iu" or dtype.name in ("int2", "uint2", "int4", "uint4")


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    info: Any = np.iinfo(dtype) if dtype.kind in "iu" else ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    return int(info.min), min(int(info.max), 2**63 - 1)


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Return the axis of the channels when the shape is an image's (1, 3 or 4 channels, sides of 8 or more), else None."""
    if len(shape) == 4:
        for axis, sides in ((1, shape[2:]), (3, shape[1:3])):
            if shape[axis] in (1, 3, 4) and min(sides) >= 8:
                return axis
    return None


def _image(rng: np.random.Generator, shape: tuple[int, ...], axis: int) -> Array:
    if axis == 1:
        return image_like(rng, shape)
    return np.moveaxis(image_like(rng, (shape[0], shape[3], *shape[1:3])), 1, 3)


def load_inputs(path: Path, specs: Sequence[TensorSpec]) -> list[dict[str, Array]]:
    """Read samples for `specs` from an `.npz` whose arrays are named as the inputs.

    Arrays of exactly the inputs' shapes are one sample; with one more axis in front, of the same extent on every array, they are several.
    A type may differ within its kind as long as no value is lost: int32 for int64, float64 for float32 (rounded, never to infinity).

    Raises:
        UsageError: not a readable `.npz`, or an array is missing, unknown, of another type or shape, or holds NaN. Pickled objects are
            refused unread.
    """
    arrays = _read_npz(path)
    known = ", ".join(map(str, specs))
    for name in arrays:
        if name not in {spec.name for spec in specs}:
            raise UsageError(f"{path}: array {name!r} is no input of the model", advice=f"inputs: {known}")
    cast: dict[str, Array] = {}
    for spec in specs:
        if spec.name not in arrays:
            raise UsageError(f"{path}: no array for input {spec}", advice=f"found: {', '.join(arrays) or 'no arrays'}")
        cast[spec.name] = _cast(path, spec, arrays[spec.name])
    extra = {spec.name: _extra_axis(path, spec, cast[spec.name]) for spec in specs}
    counts = {name: count for name, count in extra.items() if count is not None}
    if not counts:
        return [cast]
    first = next(iter(counts))
    for name, count in extra.items():
        if count != counts[first]:
            found = "one sample without a sample axis" if count is None else f"{count} samples"
            raise UsageError(f"{path}: array {first!r} holds {counts[first]} samples, {name!r} {found}", advice="give every array as many")
    if not counts[first]:
        raise UsageError(f"{path}: array {first!r} holds no samples")
    # `asarray`: a sample of a scalar input is otherwise a NumPy scalar
    return [{name: np.asarray(array[index], dtype=array.dtype) for name, array in cast.items()} for index in range(counts[first])]


def _read_npz(path: Path) -> Mapping[str, Array]:
    if not path.is_file():
        raise UsageError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}", advice="--inputs takes an .npz file")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path}: not an .npz file", advice="write one with numpy.savez(path, name=array, ...)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: _array(path, name, archive[name]) for name in archive.files}
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it holds Python objects, which are not read" if "pickle" in str(error) else " ".join(str(error).split())
        raise UsageError(f"{path}: cannot be read: {reason}", advice="write it with numpy.savez(path, name=array, ...)") from error


def _array(path: Path, name: str, value: object) -> Array:
    if not isinstance(value, np.ndarray):  # a member of the archive that is no .npy comes as bytes
        raise UsageError(f"{path}: {name!r} is not an array")
    return value


def _cast(path: Path, spec: TensorSpec, array: Array) -> Array:
    """Return `array` in the type of `spec`, C-contiguous, in native byte order."""
    wanted = numpy_dtype(spec.dtype)
    refused = UsageError(f"{path}: array {spec.name!r} is {array.dtype}, expected {spec.dtype}")
    if spec.dtype == "string":
        if array.dtype.kind not in "US":
            raise refused
        return np.array(array.astype(str), dtype=object)
    if array.dtype.kind == "V" and wanted.name == spec.dtype and hasattr(ml_dtypes, spec.dtype) and array.itemsize == wanted.itemsize:
        array = array.view(wanted)  # .npy files have no name for bfloat16 and its like
    if _kind(array.dtype) != _kind(wanted):
        raise refused
    if _kind(wanted) == "float" and np.isnan(array).any():
        raise UsageError(f"{path}: array {spec.name!r} holds NaN, expected numbers")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.asarray(array, dtype=wanted, order="C")
    if _kind(wanted) == "integer" and array.size:
        least, most = _limits(wanted)
        if int(array.min()) < least or int(array.max()) > most:
            raise UsageError(f"{path}: array {spec.name!r} holds {array.min()} to {array.max()}, which {spec.dtype} cannot hold")
    elif _kind(wanted) in ("float", "complex") and bool((np.isinf(cast) & ~np.isinf(array)).any()):
        raise UsageError(f"{path}: array {spec.name!r} holds numbers too large for {spec.dtype}")
    return cast


def _kind(dtype: np.dtype[Any]) -> str:
    if _is_integer(dtype):
        return "integer"
    if dtype.kind == "f" or dtype.name.startswith(("bfloat", "float")):
        return "float"
    return {"b": "bool", "c": "complex"}.get(dtype.kind, str(dtype))


def _extra_axis(path: Path, spec: TensorSpec, array: Array) -> int | None:
    """Return the extent of the sample axis, or None when the array is one sample."""

    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == len(spec.shape) and all(want in (None, have) for have, want in zip(shape, spec.shape, strict=True))

    if fits(array.shape):
        return None
    if fits(array.shape[1:]) and array.ndim:
        return int(array.shape[0])
    expected = ", ".join("?" if extent is None else str(extent) for extent in spec.shape)
    raise UsageError(
        f"{path}: array {spec.name!r} has shape {list(array.shape)}, expected [{expected}]",
        advice=f"several samples have one more axis in front: [samples{', ' if expected else ''}{expected}]",
    )
