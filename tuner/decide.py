"""Deciding: who is proven, and what the proof makes the plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from aivmm.planner.candidates import Candidate, Draft, Rejection, Score
from aivmm.planner.certificate import Certificate
from aivmm.planner.choice import Option, best_in, distance, rank, relaxed
from aivmm.planner.constraints import ACCURACY, AGREEMENT, check
from aivmm.planner.evidence import Estimate, shares
from aivmm.probes.transfers import TransferFit
from aivmm.runtime.config import Config
from aivmm.runtime.plan import Accuracy
from aivmm.runtime.target import Target
from aivmm.tuner.anatomy import Anatomist
from aivmm.tuner.certifying import certificate_of
from aivmm.tuner.copying import Known, can_be_copied
from aivmm.tuner.cutting import CutPlan, Cutter
from aivmm.tuner.emit import Other, folder_bytes
from aivmm.tuner.expected import expected, in_other_processes, unmeasured_auto
from aivmm.tuner.explore import Explorer
from aivmm.tuner.finalists import Selection
from aivmm.tuner.judging import judged_on
from aivmm.tuner.options import DEFAULT_COSINE
from aivmm.tuner.precision_record import kept_plain
from aivmm.tuner.promised import entrant_of, nothing_promised, per_sample_s, promised, proven_ratio
from aivmm.tuner.proof import Entrant, Proof, constraint_metrics
from aivmm.tuner.subject import Prepared
from aivmm.tuner.throughput import Finder
from aivmm.tuner.tried import Tried
from aivmm.tuner.verdict import accuracy_text, describe, factor_text, sentence
from aivmm.tuner.whole import at_its_batch, engine_factor, raced_whole, runs_same
from aivmm.tuner.work import Work
from aivmm.tuner.worth import HOPELESS, keeps

_ALL = 1000
_PARTS_S = 4.0  # for racing settings on parts of a processor


class Decider:
    """Turns what was explored into entrants of the proof, and a proof into a plan."""

    def __init__(self, work: Work, explorer: Explorer, anatomist: Anatomist, handovers: Mapping[tuple[str, str], TransferFit]) -> None:
        self.work = work
        self.handovers = handovers  # (source, destination) -> what handing a tensor over costs
        self.explorer = explorer
        self.anatomist = anatomist
        self._predicted: dict[str, Estimate] = {}  # draft name -> seconds of one call, where the reference takes what it took in the search
        self._whole: dict[str, Estimate] = {}  # candidate key -> what one of several callers takes, seen on the engine
        self._factors: list[tuple[Candidate, float]] = []  # of those, and what that is over what the search saw
        self._on_engine: set[str] = set()  # names of drafts at once whose expected time has what the engine takes in it
        self._cut_plans: dict[str, CutPlan] = {}  # by draft name
        self._cutter: Cutter | None = None
        self._cut_configs: dict[str, Config] = {}  # what stages on each target are compiled with
        self.tried: Sequence[Tried] = ()  # of plans whose parts run at once

    def entrants(self) -> list[Entrant]:
        """Choose who is proven: every baseline, the best few of the search, and cut plans that are forced or promise to win."""
        baselines, search = self.explorer.baselines, self.explorer.search
        blocks = len(self.work.subject.structure.blocks)
        drafts = [(Draft.whole(each.name, candidate, blocks), "baseline") for each, candidate in baselines]
        # What may not be the plan is no reason to leave out what is slower: a bf16 default where fp32 was asked for.
        allowed = [candidate for _, candidate in baselines if not self.explorer.barred(candidate.target, candidate.config)]
        scored = [(candidate, score) for candidate in allowed if isinstance(score := self.explorer.outcome(candidate), Score)]
        selection = Selection(
            search=search,
            baselines=scored,
            known={candidate.key for _, candidate in baselines},
            keeps=lambda candidate, score: keeps(self.work.constraints, candidate, score),
            constraints=self.work.constraints,
            objectives=self.work.options.objectives,
            prefer=self.work.options.prefer,
            top=self.work.options.top,
        )
        chosen = selection.finalists() if self.work.min_segments == 1 else []
        finalists = [Draft.whole(f"candidate {number}", each.candidate, blocks) for number, each in enumerate(chosen, 1)]
        both = list(zip(chosen, finalists, strict=True))
        ends = {draft.name: each.ends for each, draft in both}
        self._race_whole([*scored, *((each.candidate, each.score) for each in chosen)])
        self._predicted |= {draft.name: self._expected(each.candidate, each.score) for each, draft in both}
        finalists += self._cuts()
        finalists += self._at_once()
        near = self._near(scored)
        # Batching alone is no merit of ours: whoever may batch gets the defaults at the best finalist's batch as a yardstick.
        for batch in sorted({draft.batch for draft in finalists} - {self.work.subject.base_batch}):
            for baseline, candidate in baselines:
                if not baseline.config.settings and baseline.target.name != "AUTO" and candidate.key in near:
                    drafts.append((Draft.whole(f"{baseline.name}, batch {batch}", replace(candidate, batch=batch), blocks), "baseline"))
        drafts += [(draft, "candidate") for draft in finalists]
        return [self._entrant(number, draft, role, ends.get(draft.name, ())) for number, (draft, role) in enumerate(drafts)]

    def _race_whole(self, scored: Sequence[tuple[Candidate, Score]]) -> None:
        """Race what has several callers on the engine, as far as it may be the plan: not beside a forced cut, nor for what is barred."""
        kept = [each for each in scored if keeps(self.work.constraints, *each) and not self._may_leave_targets(each[0].target)]
        ranks = [rank([str(each.target)], self.work.options.prefer) for each, _ in kept]
        rivals = [each for each, place in zip(kept, ranks, strict=True) if place == min(ranks) and self.work.min_segments == 1]
        reference_s, new = self._reference_s(), not self.explorer.searched_before
        self._whole = whole = raced_whole(self.work, self.explorer.measurer, rivals, reference_s=reference_s, measure_new=new)
        self._factors = [(one, whole[one.key].seconds / self._searched(one, seen).seconds) for one, seen in rivals if one.key in whole]

    def _near(self, scored: Sequence[tuple[Candidate, Score]]) -> set[str]:
        """Return the keys of the baselines that a larger batch may bring to the front: a CPU's seconds are no match for a card."""
        least = min((score.ratio for _, score in scored), default=0.0)
        measured = {candidate.key: score.ratio for candidate, score in scored}
        return {
            candidate.key
            for _, candidate in self.explorer.baselines
            if measured.get(candidate.key, least) <= HOPELESS[self.work.options.drive] * least
        }

    def _cuts(self) -> list[Draft]:
        """Return the cut plans worth proving, with the best config known for each target."""
        baselines, search = self.explorer.baselines, self.explorer.search
        best_config = {str(candidate.target): candidate.config for _, candidate in reversed(baselines)}
        base = self.work.subject.base_batch
        alone = [
            (candidate, score)
            for candidate, score in search.best(_ALL)
            if candidate.callers == 1 and candidate.batch == base and candidate.config.lowered is None
        ]
        best_config |= {str(candidate.target): candidate.config for candidate, _ in reversed(alone)}
        best_config = {str(each): self._allowed(each, best_config[str(each)]) for each in self.work.targets if str(each) in best_config}
        wholes: dict[str, Estimate] = {}
        for candidate, score in alone:
            name, expected_ = str(candidate.target), self._expected(candidate, score)
            if name not in wholes or expected_.seconds < wholes[name].seconds:
                wholes[name] = expected_
        self._cutter = Cutter(
            self.work,
            self.anatomist,
            self.handovers,
            self.explorer.measurer,
            reference_s=self._reference_s(),
            measure_new=not self.explorer.searched_before,
        )
        self._cut_configs = {name: _as_checked(config) for name, config in best_config.items()}
        plans = self._cutter.plans(configs=self._cut_configs, wholes=wholes)
        self.explorer.measurer.release()
        self._cut_plans = {each.draft.name: each for each in plans}
        return [each.draft for each in plans]

    def _at_once(self) -> list[Draft]:
        """Return the pipelined and the replicated plan worth proving, for throughput."""
        if self.work.options.drive != "throughput" or self.work.asked():
            return []
        finder = Finder(
            work=self.work,
            measurer=self.explorer.measurer,
            evidence=self._cutter.evidence if self._cutter is not None else None,
            configs={str(each): self._cut_configs.get(str(each), Config(precision="fp32")) for each in self.work.targets},
            known=self.copyable(),
            learn=self._learn,
            reference_s=self._reference_s(),
            best_s=self.best_s(),
            measure_new=not self.explorer.searched_before,
        )
        found, self.tried = finder.find(), finder.tried
        self.explorer.measurer.release()
        self._predicted |= {each.draft.name: each.expected for each in found}
        self._on_engine |= {each.draft.name for each in found if each.expected.source == "measured"}
        return [each.draft for each in found]

    def _learn(self, wanted: Sequence[Candidate]) -> list[Known]:
        """Measure candidates that the search has not met; return what is known of them then, as far as they may be a part of the plan."""
        known = self.explorer.known
        missing = [each for each in wanted if each.key not in known and not self.explorer.barred(each.target, each.config)]
        if missing and not self.explorer.searched_before:
            self.work.progress.phase("measuring parts of the processor")
            found = self.explorer.measurer.measure(missing, budget_s=_PARTS_S, tell=self.work.tell_race, keep=missing)
            known |= {each.key: (each, found[each.key]) for each in missing if each.key in found}
        scored = [known[each.key] for each in wanted if each.key in known]
        return self._known((each, score) for each, score in scored if isinstance(score, Score))

    def copyable(self) -> list[Known]:
        """Return what may be a copy among others. A limit on throughput is theirs together: alone none of them may reach it."""
        return self._known(self.explorer.search.best(_ALL))

    def best_s(self) -> float | None:
        """Return the least seconds per sample that the search knows of a plan, replicas included; None where none keeps the limits.

        A limit on throughput is left out: what has to be beaten where none reaches it is the best there is.
        """
        found = (
            self._engine_expected_s(each, score) / each.batch
            for each, score in self.explorer.search.best(_ALL)
            if not self.explorer.barred(each.target, each.config) and keeps(self.work.constraints, each, score, without=("throughput",))
        )
        return min(found, default=None)

    def _known(self, scored: Iterable[tuple[Candidate, Score]]) -> list[Known]:
        return [
            Known(candidate=each, seconds=self._engine_expected_s(each, score), memory_bytes=score.metrics.get("device_memory", 0.0))
            for each, score in scored
            if can_be_copied(each) and not self.explorer.barred(each.target, each.config)
            if keeps(self.work.constraints, each, score, without=("throughput",))
        ]

    def reference_name(self) -> str | None:
        """Return the name that the reference has among the baselines."""
        return next((each.name for each, candidate in self.explorer.baselines if candidate == self.explorer.measurer.reference), None)

    def _reference_s(self) -> float | None:
        """Return what one call of the reference took in the search."""
        outcome = self.explorer.outcome(self.explorer.measurer.reference)
        return outcome.median_s if isinstance(outcome, Score | Rejection) else None

    def _engine_s(self, draft: Draft | None = None) -> float:
        """Return what calling the engine adds to a draft, or to the reference: the search runs executables, the proof runs engines."""
        within = draft is not None and (draft.name in self._on_engine or any(each.key in self._whole for each, _ in self._scored_as(draft)))
        return 0.0 if self._cutter is None or within else self._cutter.engine_s

    def _expected(self, candidate: Candidate, score: Score) -> Estimate:
        """Return what one call of a candidate takes where the reference takes what it took in the search: races are minutes apart."""
        return self._whole.get(candidate.key) or self._searched(candidate, score)

    def _engine_expected_s(self, candidate: Candidate, score: Score) -> float:
        """Return that for what runs beside others or has to be beaten; of several callers as the engine gives it, raced there or not."""
        raced = candidate.key in self._whole
        return self._expected(candidate, score).seconds * (1.0 if raced else engine_factor(candidate, self._factors))

    def _searched(self, candidate: Candidate, score: Score) -> Estimate:
        reference_s, reference = self._reference_s(), self.explorer.measurer.reference
        seconds = score.median_s if reference_s is None else score.ratio * reference_s * candidate.batch / reference.batch
        sigma = math.log(score.high / score.low) / (2 * 1.96) if 0 < score.low <= score.high else 0.0
        return Estimate(seconds=seconds, sigma=sigma, source="measured", because="the whole model")

    def _allowed(self, target: Target, config: Config) -> Config:
        """Return `config`, in the first native precision that the user allows where its own is not allowed (bf16 is a default of some)."""
        allowed = [each for each in self.work.precisions(target) if each in target.precisions]
        return replace(config, precision=allowed[0]) if allowed and self.explorer.barred(target, config) else config

    def _entrant(self, number: int, draft: Draft, role: str, ends: tuple[str, ...] = ()) -> Entrant:
        prepared: Prepared = self.work.subject.at(draft.batch)
        bundle = self.work.folder / f"entrant-{number}.aivmm"
        draft = at_its_batch(self.work, draft)
        self.work.emitter(draft.batch).write(draft, bundle, objective=self.work.options.objective)
        return Entrant(
            draft=draft,
            role=role,
            ends=ends,
            problem=self._not_allowed(draft),
            bundle=bundle,
            size_bytes=folder_bytes(bundle),
            sample=prepared.samples[-1],
            reference=prepared.references[-1],
            samples=prepared.samples[:-1],
            references=prepared.references[:-1],
            extras=prepared.extras,
        )

    def _not_allowed(self, draft: Draft) -> str:
        """Say why a baseline may be shown but must not be the plan, by what the user allowed; "" when nothing is against it."""
        if self._may_leave_targets(draft.pieces[0].target):
            return "AUTO may use devices outside --targets"
        everything = (each for piece in draft.pieces for each in piece.everywhere())
        return next(filter(None, (self.explorer.barred(each.target, each.config) for each in everything)), "")

    def _may_leave_targets(self, target: Target) -> bool:
        others = set(self.work.all_targets) - set(self.work.targets)
        return target.name == "AUTO" and any(each.runtime == target.runtime for each in others)

    def _prediction(self, draft: Draft) -> Estimate | None:
        """Return what the search expected of a draft, or None when it never measured it."""
        if draft.name in self._cut_plans:
            return self._cut_plans[draft.name].expected
        known = [self._expected(each, score) for each, score in self._scored_as(draft)]
        if draft.pieces[0].target.name == "AUTO":
            known = [*map(unmeasured_auto, known)]
        return self._predicted.get(draft.name, known[0] if known else None)

    def predicted(self, proof: Proof) -> dict[str, Any]:
        """Return what the search expected of one call of the plan, as `tune --json` has it; Nones when it never measured it.

        `ratio_to_reference` is what it expected over what the reference took in the search.
        """
        found = None if proof.plan is None else self._prediction(proof.plan.draft)
        if proof.plan is None or found is None:
            return nothing_promised(self.reference_name())
        engine_s = (self._engine_s(proof.plan.draft), self._engine_s())
        return promised(proof, found, reference=self.reference_name(), reference_s=self._reference_s(), engine_s=engine_s)

    def note_predictions(self, proof: Proof) -> None:
        """Put beside what the proof found of each entrant what was expected of it per sample, over what the reference took in the search.

        `predicted_measured` is the share of that which rests on measurements. A cut plan also has the sum of segments and boundaries it was
        planned at, `planned_ratio` (`planned_assembled`: 1 where no segment was timed in this chain yet), and what was believed before it
        was first timed, `believed_ratio`. Callers raced on the engine have executables' own, `searched_ratio`. Proven is `proven_ratio`.
        """
        searched_s, engine_s, reference = self._reference_s(), self._engine_s(), entrant_of(proof, self.reference_name())
        reference_s = per_sample_s(searched_s, engine_s, self.explorer.measurer.reference) if searched_s else None
        for each in proof.entrants:
            found = self._prediction(each.draft)
            if found is None or not reference_s:
                continue
            cut, time_s = self._cut_plans.get(each.draft.name), partial(per_sample_s, what=each.draft)
            for candidate, score in self._scored_as(each.draft):
                if candidate.key in self._whole:
                    each.metrics["searched_ratio"] = time_s(self._searched(candidate, score).seconds, engine_s) / reference_s
            each.metrics |= {
                "predicted_ratio": time_s(found.seconds, self._engine_s(each.draft)) / reference_s,
                "predicted_sigma": in_other_processes(found).sigma,
                "predicted_measured": shares(cut.parts if cut else [found]).get("measured", 0.0),
                **proven_ratio(each, reference),
            }
            if cut:
                sums = {"planned_ratio": cut.look.plan.cost_s, "believed_ratio": cut.believed_s}
                each.metrics |= {name: time_s(sum_s, engine_s) / reference_s for name, sum_s in sums.items() if sum_s is not None}
                each.metrics["planned_assembled"] = float(cut.assembled)

    def certificate(self, proof: Proof) -> Certificate | None:
        """Return what is known of how good the plan is; None where there is no plan, or nothing was expected of it."""
        if proof.plan is None:
            return None
        draft = proof.plan.draft
        found = self._prediction(draft)
        if found is None:
            return None
        cut = self._cut_plans.get(draft.name)
        looked = cut.look if cut else self._cutter.cuts.looked if self._cutter else None
        return certificate_of(self.work, draft, found, cut=cut, looked=looked, engine_s=self._engine_s(draft))

    def _scored_as(self, draft: Draft) -> list[tuple[Candidate, Score]]:
        """Return the candidate with a score that runs what a draft runs; a hint that resolves to the default was measured as that."""
        same = [candidate for candidate, _ in self.explorer.known.values() if runs_same(candidate, draft)]
        aliases = [candidate for _, candidate in self.explorer.aliases if runs_same(candidate, draft)]
        same += [self.explorer.stands_for[each.key] for each in aliases if each.key in self.explorer.stands_for]
        return [(each, score) for each in same if isinstance(score := self.explorer.outcome(each), Score)][:1]

    def verdict(self, proof: Proof) -> tuple[str, list[str]]:
        """Return the verdict in words, and what stands in the way of a plan (nothing, when there is one)."""
        plan = proof.plan
        if plan is not None:
            accuracy = self.accuracy(plan)
            note = "Accuracy could not be judged: the model's outputs differ each time it runs."
            if accuracy is not None:
                shown = {name: plan.metrics[name] for name in ("top1_agreement",) if self._classifies and name in plan.metrics}
                note = accuracy_text(accuracy, samples=judged_on(plan), kind=self.work.subject.kind_of_samples, beside=shown)
                lowered = plan.draft.lowered
                if lowered and not self.work.subject.real_data:
                    calibrated = "calibrated and " if self.work.subject.lowerer.recipe(lowered).needs_data else ""
                    made = lowered.partition(":")[0]
                    note += f" {made} was {calibrated}judged on synthetic inputs alone: bring --dataset before you rely on it."
            note = " ".join(filter(None, (self._mixture(plan.draft), note)))
            note += self._silent_precision(plan.draft)
            if not self.work.taken_whole:
                note = f"No target takes the model whole, so there is no baseline to compare with. {note}"
            return sentence(proof, objectives=self.work.options.objectives, accuracy_text=note, prefer=self.work.options.prefer), []
        nearest = self.nearest(proof)
        asked = ", ".join(self.work.options.constraints) or f"cosine>={DEFAULT_COSINE:g}"
        if nearest is None:
            reasons = [f"{each.draft.name}: {each.problem}" for each in proof.entrants if each.problem][:3]
            lowered = self._nearest_lowered()
            return f"No plan meets the constraints ({asked}). {lowered}{'; '.join(reasons)}", [*filter(None, [lowered.strip()]), *reasons]
        found = proof.violations[nearest.draft.name]
        reasons = [each.sentence for each in found]
        text = f"No plan meets the constraints ({asked})"
        text += f": {proof.misfit}. " if proof.misfit else ". "
        text += f"The nearest is {describe(nearest.draft)}: {'; '.join(reasons)}."
        would = relaxed(found)
        return text + (f' It would do with --constraint "{would}".' if would else ""), reasons

    def _nearest_lowered(self) -> str:
        """Say which of the lowered forms that scouting threw out came nearest to the limits, and what they would have to be; "" if none."""
        scout = self.explorer.scout
        if scout is None:
            return ""
        limits = [each for each in self.work.constraints if each.metric in ACCURACY]
        out = []
        for place, metrics in scout.judged.items():
            if place in scout.problems:
                broken = check(limits, metrics)
                out.append((distance(broken) if broken else (1 - metrics.get("cosine", -1.0), 0.0), *place, broken))
        if not out:
            return ""
        _, target, variant, broken = min(out, key=lambda each: each[:3])
        would = relaxed(broken) if broken else ""
        would = f' It would do with --constraint "{would}".' if would else ""
        return f"The nearest is {target}, {self._lowered_name(variant)}: {scout.problems[target, variant]}.{would} "

    def nearest(self, proof: Proof) -> Entrant | None:
        """Return the entrant that breaks its worst limit by the least; None where a plan was found, or nothing could be judged."""
        judged = [each for each in proof.entrants if each.draft.name in proof.violations and each.eligible]
        return None if proof.plan else min(judged, key=lambda each: distance(proof.violations[each.draft.name]), default=None)

    def alternatives(self, proof: Proof) -> list[Other]:
        """Return what the plan is traded for where another objective counts, each with the objective in which it is the best of them."""
        found = []
        for each in proof.alternatives:
            found.append(
                Other(
                    draft=replace(each.draft, name=f"{each.draft.name}: {describe(each.draft)}"),
                    objective=self.best_in(each, proof),
                    expected=expected(each),
                    emitter=self.work.emitter(each.draft.batch),
                )
            )
        return found

    def best_in(self, entrant: Entrant, proof: Proof) -> str:
        """Return the objectives in which nothing of the front is better, joined; "" for what is a compromise."""
        shown = {each.draft.name: Option(metrics=constraint_metrics(each), targets=()) for each in proof.alternatives}
        plan = ""
        if proof.plan is not None:
            plan = proof.plan.draft.name
            shown = {plan: Option(metrics=constraint_metrics(proof.plan), targets=())} | shown
        return ",".join(best_in(shown, plan, entrant.draft.name, self.work.options.objectives))

    def precision_sentence(self, proof: Proof) -> str:
        """Say in one sentence what lower precision gave: `int8 except 3 blocks: 2.9x faster than ..., top-1 agreement 99.6 % ...`."""
        plan = proof.plan
        lowered = plan.draft.lowered if plan else None
        if plan is None or lowered is None:
            return ""
        rival = proof.best_baseline
        found = proof.against(rival) if rival is not None and rival is not plan else None
        gain = f": {factor_text(found)} {rival.draft.name}" if found is not None and rival is not None else ""
        where = f"on {judged_on(plan)} {self.work.subject.kind_of_samples}"
        text = f"{self._lowered_name(lowered)}{gain}"
        if "metric" in plan.metrics:
            return f"{text}, your metric {plan.metrics['metric']:.4g} {where}."
        if self._classifies and "top1_agreement" in plan.metrics:
            return f"{text}, top-1 agreement {plan.metrics['top1_agreement']:.1%} {where}."
        if "cosine" in plan.metrics:
            return f"{text}, cosine {plan.metrics['cosine']:.4f} {where}."
        return f"{text}."

    @property
    def _classifies(self) -> bool:
        """True when an output is a classifier's, or the user says so by a limit on its agreement."""
        return self.work.subject.classifies or any(each.metric in AGREEMENT for each in self.work.constraints)

    def _lowered_name(self, lowered: str) -> str:
        """Name a lowered form in words: `int8 (nncf-mixed)`, `int8 except 3 blocks (nncf-mixed)`."""
        recipe, scout = self.work.subject.lowerer.recipe(lowered), self.explorer.scout
        kept = kept_plain(recipe, scout.parts.get(recipe.whole.variant) if recipe.whole and scout else None)
        return f"{recipe.precision}{f' except {kept}' if kept else ''} ({(recipe.whole or recipe).name})"

    def _mixture(self, draft: Draft) -> str:
        """Say which mixture a draft runs; "" where it lowers all that can be, or nothing, which its name says already."""
        lowered = draft.lowered
        if lowered is None or not self.work.subject.lowerer.recipe(lowered).plain:
            return ""
        return f"It is {self._lowered_name(lowered)}."

    def _silent_precision(self, draft: Draft) -> str:
        """Say what a plan that names no precision computes in, where that is not fp32: the runtime decided it without a word."""
        for each in (each for piece in draft.pieces for each in piece.everywhere()):
            default = self.explorer.default_precision(each.target)
            if each.config.precision is None and default not in (None, "fp32"):
                return f" {each.target} computes in {default} by default here."
        return ""

    def accuracy(self, plan: Entrant) -> Accuracy | None:
        """Return how close the plan's outputs are to the reference; None when that cannot be judged."""
        limits = {each.metric: each.limit for each in self.work.constraints if each.metric in ACCURACY}
        if self.work.cosine_limit is not None:
            limits["cosine"] = self.work.cosine_limit
        metric = next((each for each in ACCURACY if each in limits and each in plan.metrics), None)
        if not self.work.subject.deterministic or metric is None:
            return None
        return Accuracy(
            metric=metric,
            value=plan.metrics[metric],
            limit=limits[metric],
            data="real" if self.work.subject.real_data else "synthetic",
            reference=self.work.subject.reference_name,
        )

    def fallbacks(self, proof: Proof) -> list[Draft]:
        """Return uncut plans for the other runtimes and devices, best first: what to run where the plan's own target is missing."""
        assert proof.plan
        have = set(map(str, proof.plan.draft.all_targets))
        others: dict[str, Entrant] = {}
        for each in proof.entrants:
            piece = each.draft.pieces[0]
            name = str(piece.target)
            one = len(each.draft.pieces) == 1 and not piece.copies and each.draft.batch == proof.plan.draft.batch
            usable = each.eligible and each.confirmed and one
            if not usable or piece.target.name == "AUTO" or (name in have and len(have) == 1) or each.draft.name in proof.violations:
                continue
            assert each.confirmed
            held = others.get(name)
            if held is None or (held.confirmed and each.confirmed.median_s < held.confirmed.median_s):
                others[name] = each
        prefer = self.work.options.prefer
        ranked = sorted(
            others.values(), key=lambda each: (rank([each.draft.targets], prefer), each.confirmed.median_s if each.confirmed else 0.0)
        )
        return [replace(each.draft, name=f"{each.draft.targets} instead") for each in ranked]


def _as_checked(config: Config) -> Config:
    """Blocks were timed and checked in fp32: a cut plan does not run them in whatever a runtime's default computes in."""
    return config if config.precision is not None else replace(config, precision="fp32")
