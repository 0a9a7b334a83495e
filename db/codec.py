"""Records to columns and back, without loss: what is read equals what was stored."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from aivmm.models.records import Category, CutPoint, ModelFacts
from aivmm.probes.records import Caution, ProbeKey, Samples
from aivmm.runtime.environment import Environment
from aivmm.runtime.target import Device, Unavailable
from aivmm.tensors import TensorSpec

_HEADER = struct.Struct("<IIII")  # layout version; how many timed, rounds, warm-up
_LAYOUT = 1
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
_strict = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_last_id = 0
_id_lock = threading.Lock()


def new_id() -> str:
    """Return a UUID of version 7 (RFC 9562 §5.7) as 32 hexadecimal digits; each is greater than the last one made in this process.

    Time-ordered, so that the newest row of a key is the greatest, and inserts append to the B-tree instead of splitting its pages.
    """
    global _last_id
    with _id_lock:
        milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
        stamp = (milliseconds << 12) | (nanoseconds << 12) // 1_000_000  # the 12 bits after the milliseconds: method 3 of §6.2
        _last_id = stamp = max(stamp, _last_id + 1)
    value = (stamp >> 12) << 80 | 0x7 << 76 | (stamp & 0xFFF) << 64 | 0b10 << 62 | int.from_bytes(os.urandom(8), "big") >> 2
    return f"{value:032x}"


def digest(*parts: object) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of the canonical JSON of `parts`: equal facts have equal keys on every machine."""
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()[:32]


def key_digest(key: ProbeKey, config_digest: str = "") -> str:
    """Return what a probe is looked up by: the digest of all fields of its key. `config_digest` saves making that of its config again."""
    return digest(key.kind, key.subject, key.target, key.environment, config_digest or key.config.digest(), key.batch, key.callers)


def dump_json(value: object) -> str:
    """Return JSON; raise ValueError for NaN and infinity, which JSON does not have and a reader could not compare."""
    return _strict(value)


def finite(name: str, value: float) -> float:
    """Return `value` as a float; raise ValueError when it is NaN or infinite (SQLite would store NaN as NULL)."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, only finite numbers are stored")
    return number


def finite_or_none(name: str, value: float | None) -> float | None:
    """As `finite`; None stays None."""
    return None if value is None else finite(name, value)


def clean(text: str) -> str:
    """Return text that every database takes: what a crashed driver printed may hold NULs and lone surrogates, which become U+FFFD."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pack_samples(samples: Samples) -> bytes:
    """Return a header of four uint32 (layout, counts), then float64 timed_s, float64 warmup_s, uint32 rounds, all little-endian."""
    try:
        rounds = np.array(samples.rounds, dtype="<u4")
    except OverflowError as error:
        raise ValueError(f"rounds are counted from 0 to 2**32 - 1: {error}") from error
    return b"".join(
        (
            _HEADER.pack(_LAYOUT, len(samples.timed_s), len(samples.rounds), len(samples.warmup_s)),
            np.array(samples.timed_s, dtype="<f8").tobytes(),
            np.array(samples.warmup_s, dtype="<f8").tobytes(),
            rounds.tobytes(),
        )
    )


def unpack_samples(blob: bytes) -> Samples:
    """Return what `pack_samples` packed; raise ValueError when the bytes are not that."""
    if len(blob) < _HEADER.size:
        raise ValueError(f"{len(blob)} bytes are no samples")
    layout, timed, rounds, warmup = _HEADER.unpack_from(blob)
    if layout != _LAYOUT or len(blob) != _HEADER.size + 8 * (timed + warmup) + 4 * rounds:
        raise ValueError(f"{len(blob)} bytes do not hold {timed} + {warmup} durations and {rounds} rounds of layout {layout}")
    floats = np.frombuffer(blob, dtype="<f8", count=timed + warmup, offset=_HEADER.size).tolist()
    numbers = np.frombuffer(blob, dtype="<u4", count=rounds, offset=_HEADER.size + 8 * (timed + warmup)).tolist()
    return Samples(timed_s=tuple(floats[:timed]), rounds=tuple(numbers), warmup_s=tuple(floats[timed:]))


def spec_to_json(spec: TensorSpec) -> list[Any]:
    """Return `[name, dtype, shape]`."""
    return [spec.name, spec.dtype, list(spec.shape)]


def spec_from_json(value: list[Any]) -> TensorSpec:
    """Invert `spec_to_json`."""
    name, dtype, shape = value
    return TensorSpec(name=name, dtype=dtype, shape=tuple(shape))


def facts_to_json(facts: ModelFacts) -> dict[str, Any]:
    """Return a model's facts as JSON values."""
    specs = {side: [spec_to_json(spec) for spec in getattr(facts, side)] for side in ("inputs", "outputs")}
    return {**asdict(facts), **specs, "notes": list(facts.notes)}


def facts_from_json(value: Mapping[str, Any]) -> ModelFacts:
    """Invert `facts_to_json`."""
    specs = {side: tuple(map(spec_from_json, value[side])) for side in ("inputs", "outputs")}
    return ModelFacts(**{**value, **specs, "category": Category(**value["category"]), "notes": tuple(value["notes"])})


def cut_point_to_json(cut: CutPoint) -> list[Any]:
    """Return `[position, bytes, tensors]`."""
    return [cut.position, cut.bytes, [spec_to_json(spec) for spec in cut.tensors]]


def cut_point_from_json(value: list[Any]) -> CutPoint:
    """Invert `cut_point_to_json`."""
    position, size, tensors = value
    return CutPoint(position=position, bytes=size, tensors=tuple(map(spec_from_json, tensors)))


def environment_from_json(value: Mapping[str, Any]) -> Environment:
    """Return the environment whose `asdict` was stored."""
    return Environment(**{**value, "instruction_sets": tuple(value["instruction_sets"])})


def device_from_json(value: Mapping[str, Any]) -> Device:
    """Return the device whose `asdict` was stored."""
    return Device(**{**value, "instruction_sets": tuple(value["instruction_sets"])})


def caution_from_json(value: Mapping[str, str]) -> Caution:
    """Return the caution whose `asdict` was stored."""
    return Caution(**value)


def unavailable_from_json(value: Mapping[str, str]) -> Unavailable:
    """Return the absent target whose `asdict` was stored."""
    return Unavailable(**value)
