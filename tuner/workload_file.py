"""A workload file: the models that one machine serves at once, and what is asked for each.

[silero]                 # the model's name: its file's, without .onnx
priority = 1             # 1 is served first; models of one priority are equal
latency = "5ms"          # limit on the median from arrival to answer
p99 = "20ms"             # limit on the 99th percentile
rate = "31/s"            # requests arriving at random; without it the next one comes when the last one is answered
dim = { seq = 128 }      # as --dim and --shape, for this model
shape = { input = "1x512" }
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aivmm.errors import UsageError
from aivmm.planner.constraints import parse
from aivmm.planner.workload import Demand
from aivmm.tuner.options import parse_dims, parse_shapes

_MOST_BYTES = 1 << 20
_KEYS = ("priority", "latency", "p99", "rate", "dim", "shape")
_EXAMPLE = 'priority = 1, latency = "5ms", p99 = "20ms", rate = "31/s"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One model of a workload."""

    model: str  # a path, or "demo:NAME"
    demand: Demand
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)


def name_of(model: str) -> str:
    """Return the name by which a workload file speaks of a model: `silero` for `models/silero.onnx` and for `demo:silero`."""
    return model.removeprefix("demo:") if model.startswith("demo:") else Path(model).stem


def read_workload(path: Path, models: Sequence[str]) -> tuple[tuple[Wish, ...], tuple[str, ...]]:
    """Return what is asked for each of `models`, in their order, and notes on what the file leaves open.

    Raises:
        UsageError: the file cannot be read, names a model that was not given, or asks for what cannot be.
    """
    names = [name_of(each) for each in models]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise UsageError(f"two models are named {twice!r}", advice="rename one of the files: a workload tells models apart by name")
    tables = _tables(path)
    unknown = next((name for name in tables if name not in names), None)
    if unknown is not None:
        raise UsageError(f"{path} names the unknown model {unknown!r}", advice=f"the models given are {', '.join(map(repr, names))}")
    last = max((_priority(path, name, table) for name, table in tables.items()), default=0) + 1
    notes = tuple(
        f"{path} says nothing of {name!r}: it is served last, priority {last}, without a limit" for name in names if name not in tables
    )
    wishes = [_wish(path, model, name, tables.get(name, {"priority": last})) for model, name in zip(models, names, strict=True)]
    return tuple(wishes), notes


def _tables(path: Path) -> dict[str, Mapping[str, Any]]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} is larger than {_MOST_BYTES >> 20} MiB", advice="is it a workload file?")
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", advice="name a workload file with --workload FILE") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{path} is no TOML ({said})", advice=f"a table for each model: [name] with {_EXAMPLE}") from error
    for name, table in raw.items():
        if not isinstance(table, Mapping):
            raise UsageError(f"{path}: {name!r} is no table", advice=f"write [{name}] above its settings: {_EXAMPLE}")
        odd = next((key for key in table if key not in _KEYS), None)
        if odd is not None:
            raise UsageError(f"{path}: {name!r} has the unknown setting {odd!r}", advice=f"known: {', '.join(_KEYS)}")
    return raw


def _wish(path: Path, model: str, name: str, table: Mapping[str, Any]) -> Wish:
    try:
        demand = Demand(
            name=name,
            priority=_priority(path, name, table),
            latency_s=_limit(path, name, table, "latency", "latency<="),
            p99_s=_limit(path, name, table, "p99", "p99<="),
            rate_per_s=_limit(path, name, table, "rate", "throughput>="),
        )
    except UsageError as error:
        known = error.message.startswith(str(path))
        raise error if known else UsageError(f"{path}: {error.message}", advice=error.advice) from error
    dims = parse_dims([f"{key}={value}" for key, value in _table(path, name, table, "dim").items()])
    shapes = parse_shapes([f"{key}={value}" for key, value in _table(path, name, table, "shape").items()])
    return Wish(model=model, demand=demand, dims=dims, shapes=shapes)


def _priority(path: Path, name: str, table: Mapping[str, Any]) -> int:
    value = table.get("priority", 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{path}: the priority of {name!r} is {value!r}", advice="give 1 for what is served first, 2 for the next, ...")
    return value


def _limit(path: Path, name: str, table: Mapping[str, Any], key: str, comparison: str) -> float | None:
    """Return a limit in seconds, or a rate per second."""
    value = table.get(key)
    if value is None:
        return None
    example = '"31/s"' if key == "rate" else '"5ms"'
    if not isinstance(value, str) or "," in value:
        raise UsageError(f"{path}: {key} of {name!r} is {value!r}", advice=f"write it with its unit, like {key} = {example}")
    try:
        (constraint,) = parse(comparison + value)
    except UsageError as error:
        raise UsageError(f"{path}: {key} of {name!r} is {value!r}", advice=f"write it with its unit, like {key} = {example}") from error
    return constraint.limit


def _table(path: Path, name: str, table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise UsageError(f"{path}: {key} of {name!r} is {value!r}", advice=f"write it like {key} = {{ seq = 128 }}")
    return value
