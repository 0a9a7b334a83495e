"""The result in words and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from aivmm.models.records import ModelFacts
from aivmm.planner.candidates import Copy, Draft
from aivmm.planner.choice import rank
from aivmm.planner.constraints import human
from aivmm.planner.objectives import OBJECTIVES, Objective
from aivmm.planner.records import StudyRecord
from aivmm.probes.compare import Comparison
from aivmm.runtime.plan import Accuracy
from aivmm.tuner.measure import Counts
from aivmm.tuner.proof import Entrant, Proof, call_s, constraint_metrics, interval_s, least_s
from aivmm.tuner.tradeoffs import alternatives_text, figure, nearest_json, tradeoffs_json

_FAR = 0.05  # between the ratio of a comparison and that of the medians: beyond it the sentence says which it means
_TELLS_NOTHING = 50.0  # per cent: an interval as wide as this is no comparison
_NAMED = 2  # settings of a target in a headline; all stand below it
_THREADS = {"INFERENCE_NUM_THREADS": "thread", "intra_op_num_threads": "thread", "NUM_STREAMS": "stream"}


def time_text(seconds: float) -> str:
    """Return a duration as people read it."""
    return human(seconds, "latency")


def describe(draft: Draft, *, most: int | None = None) -> str:
    """Say what a draft runs: `openvino:CPU, 2 threads`, `openvino:CPU -> onnxruntime:CPU (2 segments)`.

    Names all settings, or at most `most` of a target and how many more there are.
    """
    parts = [_copies_text(piece.everywhere(), most) for piece in draft.pieces]
    text = parts[0] if len(parts) == 1 else " -> ".join(parts) + f" ({len(parts)} segments)"
    if draft.mode == "pipelined":
        text += ", all stages at once" + (f" with {draft.depth} requests each" if draft.depth > 1 else "")
    extra = [f"batch {draft.batch}"] * (draft.batch > 1) + [f"{draft.callers} callers"] * (draft.callers > 1)
    return ", ".join([text, *extra])


def _copies_text(copies: Sequence[Copy], most: int | None) -> str:
    """Say what copies of the same blocks run, as cards of one kind do, once where it is the same for all."""
    runs = [[*_settings(each, most), *[f"{each.replicas} replicas"] * (each.replicas > 1)] for each in copies]
    shares = ["" if each.share is None or each.share > 0.999 else f"{each.share:.0%} of the requests" for each in copies]
    if len(copies) > 1 and all(each == runs[0] for each in runs):
        everywhere = " beside ".join(f"{each.target}{share and f' ({share})'}" for each, share in zip(copies, shares, strict=True))
        return f"{everywhere}, each with {', '.join(runs[0])}"
    texts = [", ".join([str(each.target), *run, *[share] * bool(share)]) for each, run, share in zip(copies, runs, shares, strict=True)]
    return " beside ".join(texts)


def _settings(copy: Copy, most: int | None) -> list[str]:
    shown, config = [], copy.config
    for name, value in config.settings:
        noun = _THREADS.get(name)
        shown.append(f"{value} {noun}{'' if value == 1 else 's'}" if noun else f"{name}={value}")
    if most is not None and (left := len(shown) - most) > 0:
        shown[most:] = [f"+ {left} setting{'' if left == 1 else 's'}"]
    # Where a target runs several precisions its default may be another one than fp32, so that is said too.
    if config.precision is not None and (config.precision != "fp32" or len(copy.target.precisions) > 1):
        shown.append(str(config.precision))
    return shown or ["default settings"]


def factor_text(found: Comparison) -> str:
    """Say how much faster or slower the first is: `1.9x faster`, `4 % faster`; the comparison is plan over other."""
    if found.verdict == "faster":
        factor = 1 / found.ratio
        return f"{factor:.1f}x faster than" if factor >= 1.3 else f"{(factor - 1) * 100:.0f} % faster than"
    if found.verdict == "slower":
        return f"{found.ratio:.1f}x slower than" if found.ratio >= 1.3 else f"{(found.ratio - 1) * 100:.0f} % slower than"
    width = max(found.high - 1, 1 - found.low) * 100
    if width > _TELLS_NOTHING:
        return "too unsteady here to be compared with"
    if found.low > 1 or found.high < 1:
        return f"within {max(1.0, width):.0f} % of"
    noise = f"(±{max(1.0, width):.0f} %)"
    return f"the same within noise {noise} as" if found.verdict == "same" else f"undecided {noise} against"


def sentence(
    proof: Proof, *, objectives: Sequence[Objective] = (OBJECTIVES["latency"],), accuracy_text: str, prefer: Sequence[str] = ()
) -> str:
    """Say in plain English what to run, and how it compares with what a user would have run otherwise."""
    plan = proof.plan
    assert plan and plan.confirmed
    first = objectives[0]
    objective = first.name
    what = describe(plan.draft, most=_NAMED)
    text = f"{what}: {figure(plan, first) if objective == 'throughput' else time_text(call_s(plan))}"
    if objective not in ("latency", "throughput"):
        text = f"{what}: {first.what} {_bare(plan, first)}, {time_text(call_s(plan))} a call"
    clauses = []
    # What breaks a limit and is faster gets a sentence of its own; what is slower is compared with, whatever it breaks.
    known = [each for each in proof.entrants if each.role == "baseline" and each is not plan and each.confirmed and each.eligible]
    others = [each for each in known if each.draft.name not in proof.violations or _verdict(proof, each) != "slower"]
    others = [each for each in others if objective != "latency" or _driven_alike(plan, each)]
    for each in _worth_telling(plan, others, proof):
        found = proof.against(each)
        assert found and each.confirmed
        told = objective == "latency" and found.verdict in ("faster", "slower")
        # A reader who divides the two medians must not think that we cannot.
        far = abs(found.ratio * call_s(each) / call_s(plan) - 1) > _FAR
        tail = f" ({time_text(call_s(each))}{'; by pairs within rounds' if far else ''})" if told else ""
        clauses.append(f"{factor_text(found)} {each.draft.name}{tail}")
    if clauses:
        text += ", " + " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 2 else clauses)
    text += "."
    if prefer:
        text += f" {_as_preferred(plan.draft, prefer, [each.draft for each in proof.entrants])}"
    elif objective not in ("latency", "throughput"):
        text += f" {_by_objective(plan, proof, first)}"
    elif plan.role == "baseline":
        text += f" {_why_baseline(plan, proof)}"
    if objective in ("latency", "throughput"):
        text += _faster_but_out(plan, proof, alike=objective == "latency")
    if len(objectives) > 1:
        text += f" {alternatives_text(proof, objectives, {each.draft.name: describe(each.draft) for each in proof.entrants})}"
    return " ".join(filter(None, (text, accuracy_text, plan.strays)))


def _bare(entrant: Entrant, objective: Objective) -> str:
    """Return a figure to stand behind what it is of."""
    return figure(entrant, objective).removeprefix("cosine ")


def accuracy_text(accuracy: Accuracy, *, samples: int, kind: str, beside: Mapping[str, float] | None = None) -> str:
    """Say how close the plan's outputs are, and on how many samples of what kind; `beside` are shares to tell in the same breath."""
    where = f"{samples} {kind}"
    match accuracy.metric:
        case "metric":
            return f"Your metric is {accuracy.value:.4g} on {where}."
        case "sqnr":
            return f"Outputs match {accuracy.reference} with an SQNR of {accuracy.value:.1f} dB on {where}."
        case "top1_agreement" | "top5_agreement":
            among = "the same best class as" if accuracy.metric == "top1_agreement" else "among its five best the best class of"
            return f"It has {among} {accuracy.reference} in {accuracy.value:.1%} of {where}."
    more = "".join(f", top-1 agreement {value:.1%}" for name, value in (beside or {}).items() if name == "top1_agreement")
    return f"Outputs match {accuracy.reference}: {accuracy.metric} {accuracy.value:.6f}{more} on {where}."


def _verdict(proof: Proof, entrant: Entrant) -> str:
    found = proof.against(entrant)
    return found.verdict if found is not None else ""


def _why_baseline(plan: Entrant, proof: Proof) -> str:
    """Say why the plan is what a user would have run anyway, and no more than was seen."""
    tried = [each for each in proof.entrants if each.role == "candidate"]
    broken = [each for each in tried if each.draft.name in proof.violations or each.problem]
    if proof.challenger is not None:
        return f"The baseline won: nothing that was tried is faster than {plan.draft.name} beyond noise."
    if broken:
        first = broken[0]
        reason = first.problem or proof.violations[first.draft.name][0].sentence
        return f"The baseline won: of what was tried, {describe(first.draft)} is out ({reason})."
    return "The baseline won: the search found nothing that promised to be faster."


def _as_preferred(draft: Draft, prefer: Sequence[str], proven: Sequence[Draft]) -> str:
    """Say how far down the order of preference the plan runs, and that nothing before it could be the plan."""
    place = rank([str(each) for each in draft.all_targets], prefer)
    if place == 0:
        return f"It is the best on the hardware that is preferred ({', '.join(prefer)})."
    before = " or ".join(prefer[:place])
    where = f"It is the best on {prefer[place]}, which is wanted next" if place < len(prefer) else "It is the best of all others"
    if all(rank([str(each) for each in other.all_targets], prefer) >= place for other in proven):
        return f"{where}: nothing was proven on {before}."
    return f"{where}: nothing that was proven on {before} may be the plan."


def _driven_alike(plan: Entrant, other: Entrant) -> bool:
    """Say whether the time of a call compares: where throughput is an objective too, some answer more samples or more callers at once."""
    return (plan.draft.batch, plan.draft.callers) == (other.draft.batch, other.draft.callers)


def _faster_but_out(plan: Entrant, proof: Proof, *, alike: bool) -> str:
    """Say of the fastest baseline that beats the plan, and may not be one, what stands against it; "" where there is none.

    With `alike` only those that are driven as the plan is.
    """
    out = {}
    for each in proof.entrants:
        if alike and not _driven_alike(plan, each):
            continue
        against = each.problem or "; ".join(violation.sentence for violation in proof.violations.get(each.draft.name, ()))
        found = proof.against(each) if each.role == "baseline" and each is not plan and against else None
        if found is not None and found.verdict == "slower":
            out[each.draft.name] = (1 / found.ratio, against)
    if not out:
        return ""
    name, (share, against) = min(out.items(), key=lambda each: each[1][0])
    return f" {name} takes {share:.2f} of its time, and may not be the plan: {against}."


def _by_objective(plan: Entrant, proof: Proof, objective: Objective) -> str:
    """Say how the plan's objective compares with that of the best baseline that may be one."""
    rivals = [each for each in proof.entrants if each.role == "baseline" and each is not plan and each.eligible and each.confirmed]
    known = [each for each in rivals if objective.metric in constraint_metrics(each) and each.draft.name not in proof.violations]
    if objective.metric not in constraint_metrics(plan):
        return f"Its {objective.what} could not be measured, so speed decided."
    if not known:
        return f"No baseline's {objective.what} is known."
    best = min(known, key=lambda each: objective.loss_of(constraint_metrics(each)[objective.metric]))
    alone = " It is the card's alone: nothing counts here what the host used." if plan.cards_only and objective.name == "energy" else ""
    return f"The {objective.what} of {best.draft.name} is {_bare(best, objective)}.{alone}"


def _worth_telling(plan: Entrant, baselines: Sequence[Entrant], proof: Proof) -> list[Entrant]:
    """Return the best baseline of each runtime, the slowest to beat last: five near-equal defaults would bury the news."""
    best: dict[str, Entrant] = {}
    for each in baselines:
        runtime = each.draft.pieces[0].target.runtime
        held = best.get(runtime)
        assert each.confirmed
        if each.draft.targets.endswith(":AUTO") and len([b for b in baselines if b.draft.pieces[0].target.runtime == runtime]) > 1:
            continue
        if held is None or (held.confirmed and each.confirmed.median_s / each.draft.batch < held.confirmed.median_s / held.draft.batch):
            best[runtime] = each
    return sorted(best.values(), key=lambda each: -(each.confirmed.median_s if each.confirmed else 0.0))


def stages_json(draft: Draft) -> list[dict[str, Any]]:
    """Return a draft's stages as `tune --json` gives them."""
    return [
        {
            "target": str(piece.target),
            "precision": piece.config.precision or "default",
            "config": piece.config.as_dict(),
            "blocks": [piece.first, piece.last],
            "replicas": piece.replicas,
            "share": piece.share,
            "copies": [
                {
                    "target": str(each.target),
                    "precision": each.config.precision or "default",
                    "config": each.config.as_dict(),
                    "replicas": each.replicas,
                    "share": each.share,
                }
                for each in piece.copies
            ],
        }
        for piece in draft.pieces
    ]


def summary(
    *,
    facts: ModelFacts,
    given: str,
    proof: Proof,
    objective: str,
    plan_path: str,
    report: str,
    predicted: Mapping[str, Any],
    certificate: Mapping[str, Any] | None,
    accuracy: Mapping[str, Any],
    counts: Counts,
    wall_s: float,
    verdict: str,
    trouble: Sequence[str] = (),
    objectives: Sequence[Objective] = (),
    nearest: Entrant | None = None,
    study: StudyRecord | None = None,
    best: Mapping[str, str] | None = None,
    assumed: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the object of `tune --json` (DESIGN 7)."""
    plan = proof.plan
    result: dict[str, Any] = {
        "schema": 1,
        "model": {"path": given, "sha256": facts.sha256, "category": facts.category.name},
        "plan": None,
        "report": report,
        "objective": objective,
        "measured": None,
        "predicted": dict(predicted),
        "certificate": None if certificate is None else dict(certificate),
        "baselines": [_baseline_json(each, proof) for each in proof.entrants if each.role == "baseline"],
        "accuracy": dict(accuracy),
        "probes": {"measured": counts.measured, "reused": counts.reused, "refused": counts.refused, "failed": counts.failed},
        "wall_s": wall_s,
        "verdict": verdict,
        "assumed": list(assumed),
    }
    if facts.taken:
        result["taken"] = [asdict(each) for each in facts.taken]
    stages = {each.draft.name: stages_json(each.draft) for each in proof.entrants}
    result |= tradeoffs_json(proof, objectives, study or StudyRecord(), stages, best or {})
    if trouble:
        result["binding"] = list(trouble)
        shown = describe(nearest.draft) if nearest else ""
        result |= nearest_json(nearest, proof, shown, stages[nearest.draft.name] if nearest else ())
    if plan is not None and plan.confirmed is not None:
        low, high = interval_s(plan)
        known = {"path": plan_path, "batch": plan.draft.batch, "callers": plan.draft.callers, "mode": plan.draft.mode}
        deep = {"depth": plan.draft.depth} if plan.draft.mode == "pipelined" else {}
        result["plan"] = {**known, **deep, "stages": stages_json(plan.draft)}
        result["measured"] = {
            "median_s": call_s(plan),
            "ci95_s": [low, high],
            "least_s": least_s(plan),
            "p99_s": plan.metrics.get("p99_s"),
            "throughput_per_s": plan.metrics["throughput_per_s"],
            "samples": len(plan.confirmed.timed_s),
            "peak_memory_bytes": plan.metrics.get("peak_memory_bytes"),
            "device_memory_bytes": plan.metrics.get("device_memory_bytes"),
            "stray_nodes": plan.metrics.get("stray_nodes"),
            "stray_copies": plan.metrics.get("stray_copies"),
            "stray_s": plan.metrics.get("stray_s"),
            "compile_s": plan.metrics.get("compile_s"),
            "load_cached_s": plan.metrics.get("load_cached_s"),
            "first_inference_s": plan.metrics.get("first_inference_s"),
            "energy_j": plan.metrics.get("energy_j"),
            "power_w": plan.metrics.get("power_w"),
            "card_energy_j": plan.metrics.get("card_energy_j"),
            "card_power_w": plan.metrics.get("card_power_w"),
            "not_measured": dict(proof.absent),
        }
    return result


def _baseline_json(each: Entrant, proof: Proof) -> dict[str, Any]:
    piece = each.draft.pieces[0]
    found = proof.against(each)
    interval = list(interval_s(each)) if each.confirmed else None
    against = "; ".join(violation.sentence for violation in proof.violations.get(each.draft.name, ()))
    return {
        "name": each.draft.name,
        "target": str(piece.target),
        "config": piece.config.as_dict(),
        "median_s": call_s(each) if each.confirmed else None,
        "ci95_s": interval,
        "least_s": least_s(each),
        "ratio_to_plan": 1 / found.ratio if found else None,
        "eligible": each.eligible and not against,
        "reason": each.problem or against or None,
        "verdict": found.verdict if found else None,
    }
