"""What the search promised of the plan, and how the proof compares with that."""

from __future__ import annotations

import math
from typing import Any

from aivmm.planner.evidence import Estimate
from aivmm.planner.promise import Promise
from aivmm.tuner.expected import in_other_processes
from aivmm.tuner.proof import Entrant, Proof, by_rounds, call_s, typical_s

_Z95 = 1.96


def entrant_of(proof: Proof, name: str | None) -> Entrant | None:
    """Return the entrant of that name that was raced to the end; None where there is none."""
    return next((each for each in proof.entrants if each.draft.name == name and each.confirmed is not None), None)


def proven_ratio(entrant: Entrant, reference: Entrant | None) -> dict[str, float]:
    """Return the time from one answer to the next over the reference's, of rounds of the same proof, and the deviation of its logarithm.

    The deviation is that of rounds alone. Empty where either was not raced to the end, or both are the same.
    """
    if reference is None or entrant is reference or entrant.confirmed is None or entrant.contestant is None:
        return {}
    found = by_rounds(entrant, reference)
    scale = entrant.draft.batch / reference.draft.batch
    sigma = math.log(found.high / found.low) / (2 * _Z95)
    return {"proven_ratio": found.ratio * scale, "proven_sigma": sigma, "proven_by_least": float(found.by in ("least", "window"))}


def nothing_promised(reference: str | None) -> dict[str, Any]:
    """Return what `tune --json` says of a plan of which nothing was expected."""
    return {"median_s": None, "interval_s": None, "source": None, "reference": reference, "ratio_to_reference": None}


def promised(
    proof: Proof, found: Estimate, *, reference: str | None, reference_s: float | None, engine_s: tuple[float, float]
) -> dict[str, Any]:
    """Return what was expected of one call of the plan and what became of it, as `tune --json` has it.

    `found` is what one answer was expected to take, `reference_s` what the reference took in the search; `engine_s` is what calling the
    engine adds to the plan, and to the reference.
    """
    plan = proof.plan
    assert plan is not None
    callers, (own_s, other_s) = plan.draft.callers, engine_s
    expected = in_other_processes(found)
    median_s, searched_s = found.seconds * callers + own_s, reference_s + other_s if reference_s else None
    beside = entrant_of(proof, reference)
    seen = proven_ratio(plan, beside)
    promise = Promise(
        reference=reference or "",
        expected_s=median_s,
        proven_s=call_s(plan),
        ratio=median_s / searched_s if searched_s else None,
        sigma=expected.sigma,
        proven_ratio=seen["proven_ratio"] * callers if seen else None,
        proven_sigma=seen.get("proven_sigma", 0.0),
        by_least=bool(seen.get("proven_by_least")),
        reference_s=searched_s,
        reference_proven_s=typical_s(beside, beside.confirmed) if beside is not None and beside.confirmed else None,
        is_reference=beside is plan,
    )
    return {
        "median_s": median_s,
        "interval_s": [each * callers + own_s for each in expected.interval_s],
        "source": found.source,
        "reference": reference,
        "ratio_to_reference": promise.ratio,
        **promise.as_json(),
    }
