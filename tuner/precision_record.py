"""What lower precisions gave, for `--json`, the run's row and its report: each form of the model on each target, weighed and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

from aivmm.errors import AivmmError
from aivmm.models.lowering_recipes import Recipe
from aivmm.planner.candidates import Candidate, Rejection
from aivmm.probes.client import WorkerDied
from aivmm.probes.lab import Lab, Sensitivity
from aivmm.runtime.config import Config
from aivmm.runtime.target import Target
from aivmm.tuner.explore import Explorer
from aivmm.tuner.joules import energy_metrics
from aivmm.tuner.precision import Scout
from aivmm.tuner.proof import Proof
from aivmm.tuner.work import Work

_WEIGHING_S = 10.0  # forms that were not in the proof are loaded in fresh processes for so long
_WEIGHTS = ("peak_memory_bytes", "energy_j", "card_energy_j")  # what a form costs on a target, beside its time


Barred = Callable[[Target, Config], str]  # why a form may not be the plan, whatever it gives; "" where it may


def precision_record(work: Work, explorer: Explorer, scout: Scout, proof: Proof, *, barred: Barred) -> dict[str, Any]:
    """Return what scouting found, with what the proof measured of the same forms, and what the others weigh in a process of their own."""
    rows = [*_lowered_rows(work, scout), *_plain_rows(work, explorer, barred)]
    _take_from_proof(rows, proof)
    _mark_plan(rows, proof)
    if not explorer.searched_before:
        _weigh_others(work, rows)
        _remember(work, rows)
    sensitivity = {
        variant: [{"first": first, "last": last, "operators": len(nodes), "noise": noise} for first, last, nodes, noise in found.parts]
        for variant, found in scout.parts.items()
    }
    return {
        "tried": [{name: value for name, value in row.items() if name != "at"} for row in rows],
        "sensitivity": sensitivity,
        "seconds": scout.seconds,
    }


def _lowered_rows(work: Work, scout: Scout) -> list[dict[str, Any]]:
    rows = []
    for (target, variant), metrics in _accuracies(work, scout).items():
        lowerer = work.subject.lowerer
        made, outcome, recipe = lowerer.made(variant), scout.outcome(target, variant), lowerer.recipe(variant)
        rows.append(
            {
                "at": (target, Config(precision=variant)),
                "target": target,
                "precision": variant,
                "kept": kept_plain(recipe, scout.parts.get(recipe.whole.variant) if recipe.whole else None),
                "accuracy": {name: value for name, value in metrics.items() if name not in _WEIGHTS},
                "problem": scout.problems.get((target, variant), ""),
                "ratio": outcome.ratio if outcome else None,
                "median_s": outcome.median_s if outcome else None,
                "lowering_s": made.duration_s if made else None,
                "weight_bytes": made.weight_bytes if made else None,
                "file_bytes": made.file_bytes if made else None,
                **{name: metrics.get(name) for name in _WEIGHTS if name in metrics},
            }
        )
    return rows


def _plain_rows(work: Work, explorer: Explorer, barred: Barred) -> list[dict[str, Any]]:
    """Return the model as it is, in each precision that a target was asked for by a hint, and in its default."""
    subject, rows = work.subject, []
    for candidate, outcome in explorer.known.values():
        if candidate.config.lowered or candidate.config.settings or candidate.callers > 1 or outcome.median_s is None:
            continue
        if candidate.batch != subject.base_batch:
            continue
        default = explorer.default_precision(candidate.target)
        rows.append(
            {
                "at": (str(candidate.target), candidate.config),
                "target": str(candidate.target),
                "precision": candidate.config.precision or (f"default ({default})" if default else "default"),
                "accuracy": explorer.measurer.accuracy(candidate),
                "problem": barred(candidate.target, candidate.config) or (outcome.reason if isinstance(outcome, Rejection) else ""),
                "ratio": outcome.ratio,
                "median_s": outcome.median_s,
                "weight_bytes": subject.structure.weight_bytes,
                "file_bytes": _file_bytes(work),
            }
        )
    return rows


def _file_bytes(work: Work) -> int:
    path = work.subject.path
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def _accuracies(work: Work, scout: Scout) -> dict[tuple[str, str], Mapping[str, float]]:
    """Return what was judged, and what earlier runs judged of the variants that this one knows a time of."""
    if not work.subject.lowered_precisions:
        return {}
    lowerer, content = work.subject.lowerer, work.subject.structure.content
    digests = {recipe.digest(): variant for variant, recipe in lowerer.recipes.items()}
    stored = {
        (target, digests[each.recipe_digest]): metrics
        for each in work.database.lowerings(content)
        if each.recipe_digest in digests and each.calibration in ("", lowerer.calibration_digest)
        for target, metrics in each.accuracy.items()
    }
    timed = {(str(candidate.target), candidate.config.lowered) for candidate, _ in scout.known.values() if candidate.config.lowered}
    return {place: metrics for place, metrics in stored.items() if place in timed} | scout.judged


def _take_from_proof(rows: list[dict[str, Any]], proof: Proof) -> None:
    """Take over what the proof measured, each entrant in a process of its own; of several settings the default's, or else the fastest's."""
    for row in rows:
        target, config = row["at"]
        alike = [
            each
            for each in proof.entrants
            if len(each.draft.pieces) == 1 and each.draft.callers == 1 and each.confirmed is not None
            if str(each.draft.pieces[0].target) == target and each.draft.pieces[0].config.precision == config.precision
        ]
        alike.sort(key=lambda each: (bool(each.draft.pieces[0].config.settings), each.confirmed.median_s if each.confirmed else 0.0))
        for name in _WEIGHTS:
            value = next((each.metrics[name] for each in alike if name in each.metrics), None)
            if value is not None:
                row[name] = value


def _mark_plan(rows: list[dict[str, Any]], proof: Proof) -> None:
    """Mark the forms that the plan runs, with settings of their own perhaps: one for each of its copies. A cut plan runs none of them."""
    if proof.plan is not None and len(proof.plan.draft.pieces) == 1:
        (piece,) = proof.plan.draft.pieces
        runs = {(str(each.target), each.config.precision) for each in piece.everywhere()}
        for row in rows:
            row["is_plan"] = (row["at"][0], row["at"][1].precision) in runs


def _weigh_others(work: Work, rows: list[dict[str, Any]]) -> None:
    """Load forms that were not proven in fresh processes, the fastest first, as long as there is time."""
    ends = perf_counter() + _WEIGHING_S
    by_name = {str(each): each for each in work.targets}
    for row in sorted(rows, key=lambda row: (bool(row.get("problem")), row["median_s"] or float("inf"))):
        target = by_name.get(row["target"])
        if perf_counter() > ends or work.asked():
            return
        if target is None or row["median_s"] is None or "peak_memory_bytes" in row:
            continue
        row |= weigh(work, Candidate(target=target, config=row["at"][1], batch=work.subject.base_batch))


def weigh(work: Work, candidate: Candidate) -> dict[str, float]:
    """Load a form of the model in a process of its own; return its peak memory in bytes, and its energy where that is counted.

    Empty where it does not load there.
    """
    subject = work.subject
    try:
        path, samples = subject.variant(candidate.batch, candidate.config.lowered), subject.at(candidate.batch).samples
        with Lab() as fresh:
            loaded = fresh.load(path, candidate.target, candidate.config, inputs=samples[0], batch=candidate.batch)
            peak = float(loaded.contestant.worker.call("memory", limit_s=10.0)["peak_bytes"])
            energy = energy_metrics(loaded.contestant, {candidate.target})
    except (WorkerDied, AivmmError):
        return {}  # it was raced before: what goes wrong now costs these figures
    return {"peak_memory_bytes": peak, **{name: value for name, value in energy.items() if name in _WEIGHTS}}


def _remember(work: Work, rows: list[dict[str, Any]]) -> None:
    """Store what lowered forms weigh on each target beside their accuracy there."""
    for row in rows:
        config: Config = row["at"][1]
        found = {name: row[name] for name in _WEIGHTS if row.get(name) is not None}
        if config.lowered and found:
            accuracy = {name: value for name, value in row["accuracy"].items() if name != "metric"}
            record = work.subject.lowerer.record(config.lowered, accuracy={row["target"]: {**accuracy, **found}})
            if record is not None:
                work.database.remember_lowering(record)


def kept_plain(recipe: Recipe, parts: Sensitivity | None) -> str:
    """Say what a recipe leaves as it was: "3 blocks", "5 operators", or "" when it lowers all that can be."""
    plain = set(recipe.plain)
    if not plain:
        return ""
    blocks = sum(bool(plain.intersection(nodes)) for _, _, nodes, _ in parts.parts) if parts else 0
    count, noun = (blocks, "block") if blocks else (len(plain), "operator")
    return f"{count} {noun}{'' if count == 1 else 's'}"
