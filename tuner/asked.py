"""What a run was asked for: which targets it leaves, what is assumed where nothing was said, and when two runs asked for the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

from aivmm.errors import UsageError
from aivmm.planner.constraints import ACCURACY
from aivmm.planner.precision import converts
from aivmm.runtime.config import LOWERED
from aivmm.runtime.environment import environment_of
from aivmm.runtime.target import Target, Unavailable, select
from aivmm.tuner.joules import ENERGY, counts_cards_only, why_no_energy
from aivmm.tuner.options import DEFAULT_COSINE, TuneOptions
from aivmm.tuner.together import FACTORS
from aivmm.tuner.work import Work


def allowed(options: TuneOptions, found: Sequence[Target], unavailable: Sequence[Unavailable]) -> tuple[Target, ...]:
    """Return the targets that options and constraints leave.

    Raises:
        UsageError: none is left, or none runs a precision that was asked for.
    """
    if not found:
        reasons = "; ".join(map(str, unavailable)) or "no runtime is installed"
        raise UsageError(f"there is no target to run on: {reasons}")
    targets = select(found, list(options.targets) or ["*"], unavailable)
    for constraint in (each for each in options.parsed_constraints() if each.metric == "targets"):
        keep = select(found, constraint.names, unavailable)
        targets = tuple(target for target in targets if target in keep)
    if not targets:
        limits = [str(each) for each in options.parsed_constraints() if each.metric == "targets"]
        asked = [f"--targets {','.join(options.targets)}"] * bool(options.targets) + [f"the constraint `{each}`" for each in limits]
        raise UsageError(f"{' and '.join(asked)} leave nothing to run on", advice="drop one of them")
    for each in options.precisions:
        if each not in LOWERED and not any(each in target.precisions or converts(target, each) for target in targets):
            known = sorted({precision for target in targets for precision in target.precisions})
            raise UsageError(f"no target here runs {each} natively", advice=f"--precisions can be: {', '.join((*known, *LOWERED))}")
    return targets


def require_counters(options: TuneOptions, targets: Sequence[Target]) -> None:
    """Raise UsageError when energy is an objective, or limited as power may be, and none of the targets' can be counted here."""
    asked = next((each for each in options.parsed_constraints() if each.metric in ENERGY), None)
    reasons = [why_no_energy({target}) for target in targets]
    if all(reasons) and any(each.name in ENERGY for each in options.objectives) and not counts_cards_only(targets):
        advice = "choose another objective, or tune where energy can be counted"
        raise UsageError(f"energy is no objective here: {reasons[0]}", advice=advice)
    if asked is not None and all(reasons):
        raise UsageError(f"{asked.metric} cannot be limited: {reasons[0]}", advice=f"drop {asked}, or tune where energy can be counted")


def assumed(work: Work) -> list[str]:
    """Return what was not asked for and holds all the same, as a user would have written it."""
    options, found = work.options, []
    if options.assumed_objective:
        found.append(f"--objective {options.objective}")
    if not any(each.metric in ACCURACY for each in work.constraints):
        found.append(f'--constraint "cosine>={DEFAULT_COSINE:g}"')
    if not options.precisions:
        known = list(dict.fromkeys(str(each) for target in work.targets for each in work.precisions(target)))
        found.append(f"--precisions {','.join(known)}" + ("" if "int8" in known else " (int8 joins when named, or with --dataset)"))
    if not options.batches:
        found.append(f"--batch {','.join(map(str, work.batches(work.targets)))}")
    if not options.targets:
        found.append(f"--targets {','.join(map(str, work.targets))}")
    return found


def request(work: Work) -> str:
    """Return the digest of all that decides what is searched."""
    options = work.options
    what = {
        "content": work.subject.structure.content,
        "batch": work.subject.base_batch,
        "inputs": None if options.inputs is None else hashlib.sha256(options.inputs.read_bytes()).hexdigest(),
        "objective": options.objective,
        "constraints": sorted(options.constraints),
        "environments": sorted(environment_of(target).fingerprint for target in work.targets),
        "precisions": sorted(options.precisions),
        "lowered": sorted(work.subject.subject_of(each) for each in work.subject.ways()),
        "metric": options.metric,
        "data": work.subject.data_digest,
        "batches": list(options.batches),
        "min_segments": options.min_segments,
        "cut_around": sorted(options.cut_around),
        **({"input_contract": asdict(options.contract)} if options.input_contract != "model" else {}),
        **({"prefer": list(options.prefer)} if options.prefer else {}),  # what is preferred is searched though others are faster
        **({"at_once": FACTORS} if options.drive == "throughput" else {}),  # a run that repeats one of older factors would have none
        "budget_s": options.budget_s,
        "trials": options.trials,
        "seed": options.seed,
        "aivmm": version("aivmm"),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
