"""Worker operations that lower models: native and slow code on files that nobody vouches for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from aivmm.errors import UsageError


def lower(
    state: object, *, model: str, folder: str, precision: str, recipe: str, category: str, samples: list[str], content: str
) -> dict[str, Any]:
    """Lower a prepared model by the recipe of that name, or take what was made earlier from the cache in `folder`.

    Raises:
        Unsupported: the recipe does not apply to this model; with the reason.
    """
    from aivmm.models.lowering import lower_cached, recipes
    from aivmm.probes.operations import load_arrays

    chosen = next((each for each in recipes(precision, category) if each.name == recipe), None)
    if chosen is None:
        raise UsageError(f"there is no way {recipe!r} to lower a model to {precision}")
    made = lower_cached(Path(model), Path(folder), chosen, [load_arrays(each) for each in samples], content=content)
    return {
        "path": str(made.path),
        "nodes": made.nodes,
        "weight_bytes": made.weight_bytes,
        "duration_s": made.duration_s,
        "sha256": _sha256(made.path),
        "notes": list(made.notes),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rebatch(state: object, *, lowered: str, base: str, prepared: str, destination: str) -> dict[str, Any]:
    """Carry a model lowered at one batch over to another batch.

    Raises:
        Unsupported: the two prepared models do not correspond.
    """
    from aivmm.models.lowering_batch import rebatch as carry_over

    carry_over(Path(lowered), Path(base), Path(prepared), Path(destination))
    return {}
