"""Records to columns and back, without loss: what is read equals what was stored."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quote
from math import isfinite
from typing import Any

from aivmm.models.records import Category, CutPoint, ModelFacts, taken_in
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
    return new_ids(1)[0]


def new_ids(count: int) -> list[str]:
    """Return `count` ids as `new_id` makes them, in order."""
    global _last_id
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    with _id_lock:
        stamp = max(
            (milliseconds << 12) | (nanoseconds << 12) // 1_000_000, _last_id + 1
        )  # 12 bits after the milliseconds: method 3 of §6.2
        _last_id = stamp + count - 1
    entropy = memoryview(os.urandom(8 * count)).cast("Q")
    return [
        f"{each >> 12:012x}7{each & 0xFFF:03x}{0b10 << 62 | noise >> 2:016x}"
        for each, noise in zip(range(stamp, stamp + count), entropy, strict=True)
    ]


def digest(*parts: object) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of the canonical JSON of `parts`: equal facts have equal keys on every machine."""
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()[:32]


def key_digest(key: ProbeKey, config_digest: str = "") -> str:
    """Return what a probe is looked up by: the digest of all fields of its key. `config_digest` saves making that of its config again."""
    quoted = f"{_quote(key.kind)},{_quote(key.subject)},{_quote(key.target)},{_quote(key.environment)}"
    config = _quote(config_digest or key.config.digest())
    # The text that `digest` makes of these parts, without a walk through an encoder: a test holds the two together.
    return hashlib.sha256(f"[{quoted},{config},{key.batch:d},{key.callers:d}]".encode()).hexdigest()[:32]


def dump_json(value: object) -> str:
    """Return JSON; raise ValueError for NaN and infinity, which JSON does not have and a reader could not compare."""
    return _strict(value)


def finite(name: str, value: float) -> float:
    """Return `value` as a float; raise ValueError when it is NaN or infinite (SQLite would store NaN as NULL)."""
    number = float(value)
    if not isfinite(number):
        raise ValueError(f"{name} is {number}, only finite numbers are stored")
    return number


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Return the JSON of a probe's metrics; raise ValueError when one is NaN or infinite."""
    values = tuple(metrics.values())
    for value in values:
        if type(value) is not float or not isfinite(value):
            return _strict({name: finite(name, value) for name, value in metrics.items()})
    return _metrics_form(tuple(metrics)) % values


@lru_cache(maxsize=4096)
def _metrics_form(names: tuple[str, ...]) -> str:
    """Return a JSON object with a place for each number: thousands of probes share their names, and an encoder takes twice the time."""
    return f"{{{','.join(_quote(name).replace('%', '%%') + ':%r' for name in names)}}}"


def cautions_text(cautions: Sequence[Caution]) -> str:
    """Return the JSON of a probe's cautions."""
    return _strict([{"code": each.code, "message": clean(each.message), "advice": clean(each.advice)} for each in cautions])


def finite_or_none(name: str, value: float | None) -> float | None:
    """As `finite`; None stays None."""
    return None if value is None else finite(name, value)


def clean(text: str) -> str:
    """Return text that every database takes: what a crashed driver printed may hold NULs and lone surrogates, which become U+FFFD."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pack_samples(samples: Samples) -> bytes:
    """Return a header of four uint32 (layout, counts), then float64 timed_s, float64 warmup_s, uint32 rounds, all little-endian."""
    timed, rounds, warmup = len(samples.timed_s), len(samples.rounds), len(samples.warmup_s)
    try:
        return _packer(timed, rounds, warmup).pack(_LAYOUT, timed, rounds, warmup, *samples.timed_s, *samples.warmup_s, *samples.rounds)
    except struct.error as error:
        raise ValueError(f"durations are floats, and rounds are counted from 0 to 2**32 - 1: {error}") from error


def unpack_samples(blob: bytes) -> Samples:
    """Return what `pack_samples` packed; raise ValueError when the bytes are not that."""
    if len(blob) < _HEADER.size:
        raise ValueError(f"{len(blob)} bytes are no samples")
    layout, timed, rounds, warmup = _HEADER.unpack_from(blob)
    if layout != _LAYOUT or len(blob) != _HEADER.size + 8 * (timed + warmup) + 4 * rounds:
        raise ValueError(f"{len(blob)} bytes do not hold {timed} + {warmup} durations and {rounds} rounds of layout {layout}")
    values = _packer(timed, rounds, warmup).unpack(blob)[4:]
    return Samples(timed_s=values[:timed], rounds=values[timed + warmup :], warmup_s=values[timed : timed + warmup])


@lru_cache(maxsize=1024)
def _packer(timed: int, rounds: int, warmup: int) -> struct.Struct:
    return struct.Struct(f"<IIII{timed + warmup}d{rounds}I")


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
    taken = tuple(map(taken_in, value.get("taken", ())))  # rows from before inputs could be taken in fewer bits lack it
    return ModelFacts(**{**value, **specs, "category": Category(**value["category"]), "notes": tuple(value["notes"]), "taken": taken})


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
