"""What the search promised of the plan, and how the proof compares with that."""

from __future__ import annotations

import math
from typing import Any

from aivmm.planner.candidates import Candidate, Draft
from aivmm.planner.evidence import Estimate
from aivmm.planner.promise import Promise, unpromised
from aivmm.probes.compare import compare
from aivmm.tuner.expected import in_other_processes
from aivmm.tuner.proof import Entrant, Proof, call_s, interval_s

_Z95 = 1.96


def entrant_of(proof: Proof, name: str | None) -> Entrant | None:
    """Return the entrant of that name that was raced to the end; None where there is none."""
    return next((each for each in proof.entrants if each.draft.name == name and each.confirmed is not None), None)


def proven_ratio(entrant: Entrant, reference: Entrant | None) -> dict[str, float]:
    """Return the time per sample over the reference's, of rounds of the same proof, and the deviation of its logarithm.

    A round stands by its median, or by its mean where windows were timed, as in the scores that promises are made of (`Measurer.by`),
    also where the verdict goes by least durations since others kept the machine busy. The deviation is that of rounds alone. Empty where
    either was not raced to the end, or both are the same.
    """
    if reference is None or entrant is reference or entrant.confirmed is None or reference.confirmed is None:
        return {}
    windows = all(each.contestant is not None and each.contestant.windows for each in (entrant, reference))
    scale = reference.draft.batch / entrant.draft.batch
    found = compare(entrant.confirmed, reference.confirmed, scale=scale, by="mean" if windows else "median")
    return {"proven_ratio": found.ratio, "proven_sigma": math.log(found.high / found.low) / (2 * _Z95)}


def per_sample_s(seconds: float, engine_s: float, what: Draft | Candidate) -> float:
    """Return the seconds from one answered sample to the next, of what takes `seconds` from one call's end to the next.

    Calling the engine adds `engine_s` to each call, and calls of several callers overlap.
    """
    return (seconds + engine_s / what.callers) / what.batch


def nothing_promised(reference: str | None) -> dict[str, Any]:
    """Return what `tune --json` says of a plan of which nothing was expected: the keys of `promised`."""
    return {"median_s": None, "interval_s": None, "source": None, "reference": reference, "ratio_to_reference": None, **unpromised()}


def promised(
    proof: Proof, found: Estimate, *, reference: str | None, reference_s: float | None, engine_s: tuple[float, float]
) -> dict[str, Any]:
    """Return what was expected of one call of the plan and what became of it, as `tune --json` has it.

    `found` is what the plan was expected to take from one call's end to the next, `reference_s` what the reference took so in the search;
    `engine_s` is what calling the engine adds to a call of the plan, and of the reference. Seconds that are returned are of one call,
    ratios of the time per sample.
    """
    plan = proof.plan
    assert plan is not None
    callers, (own_s, other_s) = plan.draft.callers, engine_s
    expected = in_other_processes(found)
    median_s, searched_s, ratio = found.seconds * callers + own_s, None, None
    against = next((each.draft for each in proof.entrants if each.draft.name == reference), None)
    if reference_s and against is not None:
        searched_s = reference_s * against.callers + other_s
        ratio = per_sample_s(found.seconds, own_s, plan.draft) / per_sample_s(reference_s, other_s, against)
    beside = entrant_of(proof, reference)
    promise = Promise(
        reference=reference or "",
        expected_s=median_s,
        proven_s=call_s(plan),
        ratio=ratio,
        sigma=expected.sigma,
        **proven_ratio(plan, beside),
        reference_s=searched_s,
        reference_proven_s=call_s(beside) if beside is not None else None,
        reference_proven_interval_s=interval_s(beside) if beside is not None else None,
        is_reference=beside is plan,
        per_sample=against is not None and (against.batch, against.callers) != (plan.draft.batch, callers),
    )
    return {
        "median_s": median_s,
        "interval_s": [each * callers + own_s for each in expected.interval_s],
        "source": found.source,
        "reference": reference,
        "ratio_to_reference": promise.ratio,
        **promise.as_json(),
    }
