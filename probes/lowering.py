"""Worker operations that lower models: native and slow code on files that nobody vouches for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aivmm.errors import UsageError
from aivmm.probes.arrays import load_arrays

if TYPE_CHECKING:
    from aivmm.models.lowering_recipes import Recipe


def lower(
    state: object, *, model: str, folder: str, recipe: str, options: dict[str, Any], samples: list[str], content: str
) -> dict[str, Any]:
    """Lower a prepared model by the recipe of that name, or take what was made earlier from the cache in `folder`.

    `options` are those of the recipe: they tell which part of the model a recipe of a part lowers.

    Raises:
        Unsupported: the recipe does not apply to this model; with the reason.
    """
    from aivmm.models.lowering_cache import lower_cached

    chosen = _recipe(recipe, options)
    made = lower_cached(Path(model), Path(folder), chosen, [load_arrays(each) for each in samples], content=content)
    return {
        "path": str(made.path),
        "nodes": made.nodes,
        "weight_bytes": made.weight_bytes,
        "duration_s": made.duration_s,
        "file_bytes": _size(made.path),
        "sha256": _sha256(made.path),
        "notes": list(made.notes),
    }


def _recipe(name: str, options: dict[str, Any]) -> Recipe:
    from aivmm.models.lowering_recipes import named

    chosen = named(name, options)
    if chosen is None:
        raise UsageError(f"there is no way {name!r} to lower a model")
    return chosen


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    """Bytes of a model on disk, with its external weights."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def rebatch(state: object, *, lowered: str, base: str, prepared: str, destination: str) -> dict[str, Any]:
    """Carry a model lowered at one batch over to another batch.

    Raises:
        Unsupported: the two prepared models do not correspond.
    """
    from aivmm.models.lowering_batch import rebatch as carry_over

    carry_over(Path(lowered), Path(base), Path(prepared), Path(destination))
    return {}


def sensitivity(
    state: object,
    *,
    model: str,
    lowered: str,
    recipe: str,
    options: dict[str, Any],
    blocks: list[list[int]],
    samples: list[str],
    references: list[str],
    most: int,
    within_s: float,
) -> dict[str, Any]:
    """Say how much noise each part of a lowered model adds, lowered alone, and the whole; what was said before is read from beside it.

    Returns `parts` (see `lowering_parts.Part`; fewer than there are when `within_s` was over), `whole`, and `complete`.

    Raises:
        Unsupported: the way of lowering cannot be applied to parts of a model.
    """
    from aivmm.models.lowering_cache import calibration_digest
    from aivmm.models.lowering_parts import Taken

    inputs, expected = [load_arrays(each) for each in samples], [load_arrays(each) for each in references]
    key = hashlib.sha256(f"{most}.{blocks}.{calibration_digest(inputs)}".encode()).hexdigest()[:16]
    told = Path(lowered).with_suffix(f".parts-{key}.json")
    known = _read(told)
    if known is not None:
        return known
    with Taken(Path(model), Path(lowered), _recipe(recipe, options)) as taken:
        known = _read(told)
        if known is not None:  # another process made it while we waited
            return known
        parts = list(taken.parts([(first, last) for first, last in blocks], inputs, expected, most=most, limit_s=within_s))
        answer = {
            "parts": [asdict(each) for each in parts],
            "whole": taken.noise((), inputs, expected),
            "complete": taken.complete,
        }
        if taken.complete:
            taken.keep(told, json.dumps(answer))  # before the next process may begin
    return answer


def _read(told: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(told.read_text())
    except (OSError, ValueError):
        return None
    usable = isinstance(found, dict) and found.keys() == {"parts", "whole", "complete"}
    return found if usable else None


def noise(
    state: object,
    *,
    model: str,
    lowered: str,
    recipe: str,
    options: dict[str, Any],
    plain: list[str],
    samples: list[str],
    references: list[str],
) -> dict[str, Any]:
    """Say how much noise a lowered model adds when the operators named in `plain` stay as they were."""
    from aivmm.models.lowering_parts import Taken

    with Taken(Path(model), Path(lowered), _recipe(recipe, options)) as taken:
        found = taken.noise(plain, [load_arrays(each) for each in samples], [load_arrays(each) for each in references])
    return {"noise": found}
