"""What the search promised of the plan, and how the proof compares with that."""

from __future__ import annotations

import math
from typing import Any

from aivmm.planner.evidence import Estimate
from aivmm.planner.promise import Promise
from aivmm.probes.compare import compare
from aivmm.tuner.expected import in_other_processes
from aivmm.tuner.proof import Entrant, Proof, call_s, typical_s

_Z95 = 1.96


def entrant_of(proof: Proof, name: str | None) -> Entrant | None:
    """Return the entrant of that name that was raced to the end; None where there is none."""
    return next((each for each in proof.entrants if each.draft.name == name and each.confirmed is not None), None)


def proven_ratio(entrant: Entrant, reference: Entrant | None) -> dict[str, float]:
    """Return the time from one answer to the next over the reference's, of rounds of the same proof, and the deviation of its logarithm.

    A round stands by its median, or by its mean where windows were timed, as in the scores that promises are made of (`Measurer.by`),
    also where the verdict goes by least durations since others kept the machine busy. The deviation is that of rounds alone. Empty where
    either was not raced to the end, or both are the same.
    """
    if reference is None or entrant is reference or entrant.confirmed is None or reference.confirmed is None:
        return {}
    windows = all(each.contestant is not None and each.contestant.windows for each in (entrant, reference))
    scale = reference.draft.batch / entrant.draft.batch
    found = compare(entrant.confirmed, reference.confirmed, scale=scale, by="mean" if windows else "median")
    return {"proven_ratio": found.ratio / scale, "proven_sigma": math.log(found.high / found.low) / (2 * _Z95)}


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
