"""What a worker does with a bundle of several plans: answer inputs of any shape, and serve several models at once."""

from __future__ import annotations

from typing import Any

from aivmm.probes.accuracy import judge
from aivmm.runtime.many import load_one


def fit(state: Any, *, bundle: str, samples: list[str], references: list[str]) -> dict[str, Any]:
    """Load the one model of `bundle`, run each sample, and judge its outputs against its reference."""
    from aivmm.probes.operations import load_arrays  # here: it lists this module's operations

    judged = []
    with load_one(bundle) as engine:
        for sample, reference in zip(samples, references, strict=True):
            found = judge(engine.run(load_arrays(sample)), load_arrays(reference))
            judged.append({"accuracy": found.metrics(), "problem": found.problem})
        return {"judged": judged, "stats": {"padded": engine.stats().get("padded", 0)}}


OPERATIONS = {"fit": fit}
