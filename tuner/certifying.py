"""The certificate of what was chosen: which search bounds it, and what that search does not speak of."""

from __future__ import annotations

from aivmm.planner.candidates import Draft
from aivmm.planner.certificate import Certificate, certify
from aivmm.planner.evidence import Estimate
from aivmm.planner.lazy import Look
from aivmm.planner.objectives import Objective
from aivmm.tuner.cutting import CutPlan
from aivmm.tuner.expected import in_other_processes
from aivmm.tuner.work import Work


def certificate_of(work: Work, draft: Draft, found: Estimate, *, cut: CutPlan | None, looked: Look | None, engine_s: float) -> Certificate:
    """Return what is known of a draft, of which a call was expected to take `found`, shared among its callers; any call adds `engine_s`.

    `looked` is the search for placements, which speaks of one call at a time; `cut` is the draft's own, where it is one of its plans.
    """
    one_by_one = draft.callers == 1 and draft.mode == "sequential"
    plain = one_by_one and draft.batch == work.subject.base_batch and not draft.lowered
    parts = cut.parts if cut else (found,)
    blocks, targets, least = len(work.subject.structure.blocks), len(work.targets), work.min_segments
    among = f"placements of {blocks} blocks on {targets} {'target' if targets == 1 else 'targets'}"
    among += f" in {least} segments or more" if least > 1 else ""
    why = "the model has one block" if blocks < 2 else "what some blocks take is known on no target"
    if not plain:
        why = "bounds are for one call at a time, at the model's own batch and precision"
    return certify(
        in_other_processes(found),  # the interval that is told of the plan elsewhere, and that the proof is held against
        parts,
        objective="latency" if one_by_one else "throughput",
        call_s=engine_s / draft.callers,
        looked=looked if plain else None,
        among=among,
        why_no_bound=why,
        more=beyond_time(work.options.objectives[0], one_by_one=one_by_one),
    )


def beyond_time(objective: Objective, *, one_by_one: bool) -> str:
    """Say that the time of a call is not what decided, where another objective did; "" where it is."""
    if objective.name == "latency" or (objective.name == "throughput" and not one_by_one):
        return ""
    told = {"throughput": "one call at a time", "p99": "the median of calls"}.get(objective.name, "time")
    return f"All of this is about {told}: its {objective.what} is what the proof measured, and nothing bounds that of other plans."
