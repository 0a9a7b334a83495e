"""Exploring: the baselines first, then the search around them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from aivmm.errors import ModelError
from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.objectives import counts_rate, searched
from aivmm.planner.records import RunRecord, StudyRecord
from aivmm.planner.room import Room, possible
from aivmm.planner.search import Search, record_of
from aivmm.planner.space import Space
from aivmm.runtime.backend import Baseline
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.target import Target
from aivmm.tuner.joules import asks_for_energy, counts_cards_only
from aivmm.tuner.knobs import that_can_matter
from aivmm.tuner.measure import Measurer
from aivmm.tuner.precision import Scout
from aivmm.tuner.room import most_replicas
from aivmm.tuner.starts import can_be_replicated, most_callers, of_similar_models, promising, side_by_side
from aivmm.tuner.told import as_told, point_in, point_of
from aivmm.tuner.work import Work
from aivmm.tuner.worth import JUDGED_IN_SEARCH, Standing, keeps, speed_decides, try_cards

SEARCH_UNTIL = 0.62  # the share of the budget by which the search has to end, counted from the start
_MOST_CALLERS = 32
_BASELINES_STUDY = "baselines"
_BASELINES = 0.15  # the share for racing the baselines
_LEAST_SEARCH = 0.35  # the share that the search has in any case
_GROUP = 3  # candidates asked for at once: they share a race, and its reference
_GROUP_S = 4.0
_PATIENCE = 12  # trials without an improvement of 1 % after which a search without --trials ends
_LEAST_TRIALS = 10
_HINTED = {"float32": "fp32", "f32": "fp32", "dynamic": "fp32", "bfloat16": "bf16", "float16": "fp16", "f16": "fp16"}


class Explorer:
    """Measures the baselines and searches. What it knows afterwards is in `known`, `baselines`, `search` and `measurer`."""

    known: dict[str, tuple[Candidate, Score | Rejection]]
    baselines: list[tuple[Baseline, Candidate]]
    aliases: list[tuple[Baseline, Candidate]]
    stands_for: dict[str, Candidate]  # key of an alias -> the measured candidate that it resolves to
    search: Search
    measurer: Measurer
    scout: Scout | None = None  # of the search, where there is one

    def __init__(self, work: Work, *, searched_before: bool, earlier: RunRecord | None = None) -> None:
        """Explore for a run; `earlier` is one of the same request: `searched_before` or, if not, cut short before its search ended."""
        self.work = work
        self.searched_before = searched_before
        self.earlier = earlier
        self._trials = work.database.trials(earlier.id, study_name="search") if earlier is not None else []
        baselines = work.database.trials(earlier.id, study_name=_BASELINES_STUDY) if earlier is not None else []
        self._told = [*baselines, *self._trials]
        self.study = StudyRecord()
        self.room = Room()
        self._again: dict[str, Score | Rejection] = {}  # what the earlier run asked for, by candidate key
        self._default_precisions: dict[str, str] = {}  # target -> what its default was seen to compute in
        self._inaccurate: dict[tuple[Target, str | None], Rejection] = {}  # lowered precisions that are over the limit, or refused

    def run(self) -> None:
        """Explore."""
        if self.work.subject.lowered_precisions:
            self.work.subject.lowerer.restore(self.work.database.lowerings(self.work.subject.structure.content))
        self.baselines = self._baselines()
        self.work.taken_whole = bool(self.baselines)
        self.search = self._search(self.baselines) if self.baselines else self._nothing_to_search()
        for each in self.work.lab.trouble:
            self.work.note(each)

    def _baselines(self) -> list[tuple[Baseline, Candidate]]:
        """Measure the baselines; they are the first candidates and the yardstick. Those that no target takes are noted and left out."""
        self.work.progress.phase("measuring what you would run without us")
        known = self._known_baselines()
        pairs = [(each, self._candidate(each)) for each in known]
        if not pairs:
            raise ModelError(f"there is nothing to compare with: {'; '.join(self.work.lab.trouble) or 'no runtime has a baseline'}")
        for each in known:  # AUTO exists only here
            self.work.database.remember_environment(environment_of(each.target))
            self.work.database.remember_target(each.target)
        pairs.sort(key=lambda pair: str(pair[0].target) != "onnxruntime:CPU")  # the reference comes first: the same one in every run
        self.measurer = Measurer(
            lab=self.work.lab,
            subject=self.work.subject,
            database=self.work.database,
            run_id=self.work.run_id,
            reference=pairs[0][1],
            cosine_limit=self.work.cosine_limit,
            fresh=self.work.options.fresh,
            retry_failed=self.work.options.retry_failed,
            seed=self.work.options.seed,
            counts_energy=asks_for_energy(self.work.options.objectives, self.work.constraints),
            needs=frozenset(each.metric for each in searched(self.work.options.objectives)),
            rate=counts_rate(self.work.options.objectives, self.work.constraints),
            cards_only=counts_cards_only(self.work.targets),
            stop=self.work.asked,
            say=self.work.progress.detail,
        )
        first = self.measurer.reference
        recalled = self.measurer.recall(self._all_measured_targets(pairs))
        usable = self._first_that_runs(pairs)
        if self.measurer.reference != first:  # scores are ratios to the reference: ask again for those to the new one
            recalled = self.measurer.recall(self._all_measured_targets(pairs))
        self.known = as_told({candidate.key: (candidate, outcome) for candidate, outcome in recalled}, self._told)
        usable = self._leave_aliases(usable)
        missing = [candidate for _, candidate in usable if candidate.key not in self.known]
        if missing:
            limit_s = max(4.0, _BASELINES * self.work.options.budget_s)
            found = self.measurer.measure(missing, budget_s=limit_s, tell=self.work.tell_race, keep=missing, precise=True)
            for _, candidate in usable:
                if candidate.key in found:
                    self.known[candidate.key] = (candidate, found[candidate.key])
        usable += self._twins(usable)
        self._remember_baselines(candidate for _, candidate in usable)
        for baseline, candidate in usable:
            outcome = self.known.get(candidate.key, (candidate, None))[1]
            if isinstance(outcome, Rejection) and outcome.state != "pruned":
                self.work.note(f"{baseline.name} cannot run this model: {outcome.reason}")
        ran = [(each, candidate) for each, candidate in usable if _ran(self.known.get(candidate.key))]
        return ran + [pair for pair in self.aliases if any(pair[1].target.runtime == candidate.target.runtime for _, candidate in ran)]

    def _remember_baselines(self, candidates: Iterable[Candidate]) -> None:
        """Store how the baselines came out, for runs that repeat this one: not all are points of the search, and the reference is in each
        of its races."""
        known = (self.known[each.key] for each in candidates if each.key in self.known)
        for number, (candidate, outcome) in enumerate(known):
            self.work.database.add_trial(self.work.run_id, record_of(number, candidate, outcome), study_name=_BASELINES_STUDY)

    def _known_baselines(self) -> list[Baseline]:
        """Return what a user would run without us for each of the objectives, each once."""
        drives = dict.fromkeys(each.drive for each in self.work.options.objectives)
        found = [each for drive in drives for each in self.work.lab.baselines(self.work.targets, drive)]
        return list({self._candidate(each).key: each for each in reversed(found)}.values())[::-1]

    def _candidate(self, baseline: Baseline) -> Candidate:
        return Candidate(target=baseline.target, config=baseline.config, batch=self.work.subject.base_batch, callers=baseline.callers)

    def outcome(self, candidate: Candidate) -> Score | Rejection | None:
        """Return how a candidate came out, or None when it was not measured (an alias)."""
        known = self.known.get(candidate.key)
        return None if known is None else known[1]

    def rejection(self, target: Target) -> Rejection | None:
        """Return why a target does not run the whole model with its default settings, or None when it does."""
        return self.measurer.rejection(Candidate(target=target, config=Config(), batch=self.work.subject.base_batch))

    def default_precision(self, target: Target) -> str | None:
        """Return the precision that a target's default settings compute in, or None when that was not seen."""
        if target.name == "AUTO":  # which is one of its runtime's targets, with that one's default
            seen = {self.default_precision(each) for each in self.work.all_targets if each.runtime == target.runtime}
            return seen.pop() if len(seen) == 1 else None
        only = target.precisions[0] if len(target.precisions) == 1 else None
        return self._default_precisions.get(str(target), only)

    def barred(self, target: Target, config: Config) -> str:
        """Say how a config breaks --precisions; "" when it does not. A config that names none computes in its target's default."""
        wanted = self.work.options.precisions
        if not wanted or config.family in wanted:
            return ""
        if config.precision is not None:
            return f"it computes in {config.family}, which is not among --precisions"
        default = self.default_precision(target)
        if default:
            return "" if default in wanted else f"its default computes in {default}, which is not among --precisions"
        known = target.name != "AUTO" and set(target.precisions) <= set(wanted)
        return "" if known else "its default may not be in --precisions"

    def _all_measured_targets(self, pairs: Sequence[tuple[Baseline, Candidate]]) -> list[Target]:
        return list(dict.fromkeys((*self.work.targets, *(candidate.target for _, candidate in pairs))))

    def _first_that_runs(self, pairs: list[tuple[Baseline, Candidate]]) -> list[tuple[Baseline, Candidate]]:
        """Make sure that the reference runs: try the baselines in order, and leave the refused ones out. Where none runs, there is none.

        Raises:
            ModelError: none runs, and there is one target only, so that the model cannot be shared out either.
        """
        reasons = []
        for index, (baseline, candidate) in enumerate(pairs):
            outcome = self.measurer.try_load(candidate)
            if outcome is None:
                self.measurer.reference = candidate
                return pairs[index:]
            reasons.append(f"{baseline.name}: {outcome.reason}")
            self.work.note(f"{baseline.name} cannot run this model: {outcome.reason}")
        if len(self.work.targets) < 2:
            raise ModelError(f"no target takes {self.work.subject.facts.name}: {'; '.join(reasons)}")
        return []

    def _leave_aliases(self, pairs: list[tuple[Baseline, Candidate]]) -> list[tuple[Baseline, Candidate]]:
        """Set aside AUTO, and hints that resolve to the default: they teach the search nothing. They are proven all the same."""
        self.aliases, self.stands_for = [], {}
        seen: dict[tuple[str, int, str], Candidate] = {}
        kept = []
        for baseline, candidate in pairs:
            if candidate.target.name == "AUTO":
                self.aliases.append((baseline, candidate))
                continue
            if self.measurer.try_load(candidate) is not None:
                kept.append((baseline, candidate))  # refused: noted with its reason later
                continue
            settings = self.measurer.effective_config(candidate)
            if settings and candidate.config.precision is None:
                hint = str(settings.get("INFERENCE_PRECISION_HINT", "float32"))
                self._default_precisions[str(candidate.target)] = _HINTED.get(hint, hint)
            effective = json.dumps(dict(settings), sort_keys=True, default=str) if settings else ""
            same = seen.setdefault((str(candidate.target), candidate.callers, effective), candidate)
            if same is candidate:
                kept.append((baseline, candidate))
            else:
                self.aliases.append((baseline, candidate))
                self.stands_for[candidate.key] = same
        self._resolve_auto(kept)
        return kept

    def _resolve_auto(self, kept: Sequence[tuple[Baseline, Candidate]]) -> None:
        """Note that AUTO is expected to do what the default does where its runtime has one device only."""
        for _, alias in self.aliases:
            defaults = [each for _, each in kept if each.target.runtime == alias.target.runtime and not each.config.settings]
            if alias.target.name == "AUTO" and len(defaults) == 1:
                self.stands_for[alias.key] = defaults[0]

    def _twins(self, usable: Sequence[tuple[Baseline, Candidate]]) -> list[tuple[Baseline, Candidate]]:
        """Where a runtime's default is not fp32 (bf16 on AMX), its fp32 twin is the yardstick for accuracy's sake: measure it too.

        The same for what serves several callers (a hint of throughput): one caller in fp32 says little of what the target can do for many,
        and who may not leave fp32 would run that.
        """
        twins = []
        for baseline, candidate in usable:
            seen = self.measurer.effective_config(candidate) is not None
            lower = self.default_precision(candidate.target) != "fp32" and (seen or len(candidate.target.precisions) > 1)
            wanted = candidate.callers > 1 or not candidate.config.settings
            if lower and candidate.config.precision is None and wanted and candidate.target.name != "AUTO":
                name = f"{baseline.name}, fp32" if candidate.config.settings else f"{candidate.target} fp32"
                twin = replace(baseline, name=name, config=replace(candidate.config, precision="fp32"))
                twins.append((twin, self._candidate(twin)))
        missing = [candidate for _, candidate in twins if candidate.key not in self.known]
        if missing:
            raced = self.measurer.measure(missing, budget_s=4.0, tell=self.work.tell_race, keep=missing, precise=True)
            self.known |= {each.key: (each, raced[each.key]) for each in missing if each.key in raced}
        return twins

    def _nothing_to_search(self) -> Search:
        """Say that no target takes the model whole, and return a search that has found nothing: there is only the placing of its parts."""
        self.work.note("no target takes the model whole, so there is no baseline to compare with: its parts are shared out")
        return Search(space=Space(targets=(), knobs={}, objective=self.work.options.drive, precisions={}), seed=self.work.options.seed)

    def _search(self, baselines: Sequence[tuple[Baseline, Candidate]]) -> Search:
        """Search the knobs of the targets that are worth it, until the budget's share is spent or nothing improves."""
        self.work.progress.phase("searching settings")
        precisions = self._worth_searching(baselines)
        targets = list(precisions)
        batches = self._batches(targets)
        space = self._space(precisions, batches)
        search = Search(
            space=space,
            seed=self.work.options.seed,
            objectives=searched(self.work.options.objectives),
            limits=[each for each in self.work.constraints if each.metric in JUDGED_IN_SEARCH],
        )
        for candidate, outcome in self._told_before(space):
            search.tell(candidate, outcome)
            self._record(search)
            self.room.learn(candidate, outcome)
        # From here on what is measured is asked for: who goes on with this run has to know.
        self.work.database.end_study(self.work.run_id, StudyRecord(objectives=tuple(each.name for each in search.objectives)))
        search.enqueue(promising(space, precisions, self.work.variants))
        search.enqueue(
            Candidate(target=target, config=Config(precision=precision), batch=batches[0])
            for target in targets
            for precision in dict.fromkeys((precisions[target][0], *self.work.variants.get(str(target), ())))
        )
        ratios, _ = self._best_ratios(baselines)
        quickest = sorted(precisions, key=ratios.__getitem__)[:1]  # one is a hint; the search asks for more where they pay
        search.enqueue(side_by_side(space, {target: precisions[target] for target in quickest}))
        search.enqueue(of_similar_models(self.work, targets, batches, most_callers=_MOST_CALLERS))
        if targets and not self.searched_before and self.work.min_segments == 1:
            self._search_on(search)
        self._end_study(search)
        self.measurer.release()
        return search

    def _space(self, precisions: Mapping[Target, Sequence[str | None]], batches: Sequence[int]) -> Space:
        """Return the space of a search on the targets that have `precisions`."""
        targets, throughput = list(precisions), self.work.options.drive == "throughput"
        callers = max(2, *map(most_callers, targets), 2) if throughput else 1
        replicated = [target for target in targets if throughput and can_be_replicated(target)]
        return Space(
            targets=targets,
            knobs={str(target): that_can_matter(self.work.lab.knobs(target), target, self.work.subject.structure) for target in targets},
            objective=self.work.options.drive,
            precisions={str(target): found for target, found in precisions.items()},
            batches=batches,
            most_callers=min(callers, _MOST_CALLERS),
            most_replicas=max(map(most_replicas, replicated), default=1),
            replicated=frozenset(map(str, replicated)),
            defaults={str(target): found for target in targets if (found := self.default_precision(target)) is not None},
        )

    def _batches(self, targets: Sequence[Target]) -> tuple[int, ...]:
        """Return the batches to search: those that can fit the memory of some target at all."""
        batches, facts = self.work.batches(targets), self.work.subject.facts
        base = self.work.subject.base_batch
        sample_bytes = sum(each.nbytes or 0 for each in (*facts.inputs, *facts.outputs)) // max(1, base)
        kept = possible(batches, targets, weight_bytes=self.work.subject.structure.weight_bytes // 8, sample_bytes=sample_bytes // 4)
        if len(kept) < len(batches):
            left = ", ".join(str(each) for each in batches if each not in kept)
            self.work.note(f"batch {left} was not searched: weights, inputs and outputs alone do not fit the memory of any target")
        return kept

    def _told_before(self, space: Space) -> list[tuple[Candidate, Score | Rejection]]:
        """Return what the search is told before it asks, in order.

        A search that was killed goes on where it was: what it had been told first is told first again, and what it asked for and measured
        then is answered from memory when it asks for it again (`_again`), so that it comes to the same points as if nothing had happened.
        A race is stored before its trials are: once the search had begun to ask, what is known and is no trial was raced by the group that
        was being told.
        """
        within = {candidate.key: (candidate, outcome) for candidate, outcome in self.known.values() if _within(candidate, space)}
        by_point = {point_of(each): key for key, (each, _) in within.items()}
        keys = [(by_point.get(point_in(each)), each.asked and not self.searched_before) for each in self._trials]
        asked = {key for key, goes_on in keys if key is not None and goes_on}
        studies = self.work.database.studies(self.earlier.id) if self.earlier is not None and not self.searched_before else []
        begun = any(each.name == "search" and each.objectives for each in studies)
        told = {key for key, _ in keys if key is not None}
        self._again = {key: within[key][1] for key in within if key in asked or (begun and key not in told)}
        if asked and self.earlier is not None:
            count = f"{len(asked)} {'trial' if len(asked) == 1 else 'trials'}"
            self.work.note(f"the search goes on where run {self.earlier.id[:8]} stopped: {count} of it are known")
        first = [key for key, goes_on in keys if key is not None and not goes_on]
        # A run that is done was told no more than its trials: parts of a processor, which it measured later, were for its copies alone.
        rest = [] if self.searched_before and first else [key for key in within if key not in self._again]
        return [within[key] for key in dict.fromkeys((*first, *rest))]

    def _end_study(self, search: Search) -> None:
        """Store what the search came to."""
        from aivmm.planner.importance import importances  # here: Optuna's importances load more of it, and this may be the last use

        points = {point_of(candidate) for candidate, _ in (search.front() if search.records else ())}
        self.study = StudyRecord(
            objectives=tuple(each.name for each in search.objectives),
            front=tuple(each.number for each in search.records if point_in(each) in points),
            importance=tuple(importances(search)),
        )
        self.work.database.end_study(self.work.run_id, self.study)

    def _worth_searching(self, baselines: Sequence[tuple[Baseline, Candidate]]) -> dict[Target, list[str | None]]:
        """Return the targets that may yet win, each with the precisions in which it may."""
        best, allowed = self._best_ratios(baselines)
        lowerable = bool(self.work.subject.lowered_precisions)
        best = {target: ratio for target, ratio in best.items() if lowerable or self.work.precisions(target)}
        if not best:
            reasons = "; ".join(f"{each.name}: {_reason(self.outcome(candidate))}" for each, candidate in baselines)
            raise ModelError(f"no baseline of {self.work.subject.facts.name} could be measured ({reasons})", advice="try --retry-failed")
        options = self.work.options
        decisive = speed_decides(options.objectives, options.drive, self.work.constraints)
        standing = Standing(best=best, allowed=allowed, drive=options.drive, prefer=options.prefer, decisive=decisive)
        tried = self._try_cards(standing)
        self._scout(standing.worth_lowering())
        worth: dict[Target, list[str | None]] = {}
        for target in best:
            behind = standing.behind(target)
            lowered: list[str | None] = list(self.work.variants.get(str(target), ()))
            seen = "its defaults and promising settings" if target in tried else "its defaults"
            if behind <= standing.hopeless:
                worth[target] = self.work.precisions(target)
            elif lowered:
                worth[target] = lowered
                self.work.note(f"{target} was searched in {', '.join(map(str, lowered))} only: {seen} take {behind:.1f} times as long")
            else:
                self.work.note(f"{target} was not searched: {seen} take {behind:.1f} times as long as the best ones")
        return {target: found for target, found in worth.items() if found}

    def _try_cards(self, standing: Standing) -> set[Target]:
        """Measure cards in their promising settings before anybody is judged, and return those that were: decision 0060."""
        batches = self._batches(list(standing.best))
        precisions = {target: self.work.precisions(target) for target in standing.to_try(batches)}
        points = promising(self._space(precisions, batches), precisions, {})
        searches = not self.searched_before and self.work.options.trials != 0 and self.work.min_segments == 1

        def measure(wanted: Sequence[Candidate]) -> None:
            if searches:
                left = max(1.5, min(_GROUP_S, _BASELINES * self.work.options.budget_s))
                found = self.measurer.measure(wanted, budget_s=left, tell=self.work.tell_race)
                self.known |= {each.key: (each, found[each.key]) for each in wanted}

        def may_be(each: Candidate, score: Score) -> bool:
            return not self.barred(each.target, each.config) and keeps(self.work.constraints, each, score)

        return try_cards(standing, points, known=self.known, measure=measure, room=self.room, may_be=may_be)

    def _best_ratios(self, baselines: Sequence[tuple[Baseline, Candidate]]) -> tuple[dict[Target, float], set[Target]]:
        """Return the best baseline's time of each target over the reference's, and the targets where that one may be the plan.

        What --precisions leaves out counts only where a target has nothing else: a bf16 default makes no fp32 hopeless.
        """
        best: dict[Target, float] = {}
        allowed: set[Target] = set()
        by_leave = [(bool(self.barred(each.target, each.config)), each) for _, each in baselines]
        for barred, candidate in sorted(by_leave, key=lambda pair: pair[0]):
            outcome, target = self.outcome(candidate), candidate.target
            if not isinstance(outcome, Score | Rejection) or outcome.ratio is None or target not in self.work.targets:
                continue
            if barred and target in allowed:
                continue
            best[target] = min(best.get(target, outcome.ratio), outcome.ratio)
            if not barred:
                allowed.add(target)
        return best, allowed

    def _scout(self, targets: Sequence[Target]) -> None:
        """Find the lowered models that are worth searching with; an earlier run's findings are taken from what was recalled."""
        self.scout = scout = Scout(self.work, self.measurer, self.known, self.barred)
        if self.searched_before:
            found = {target: scout.survivors(target) for target in targets} if self.work.subject.lowered_precisions else {}
        else:
            found = scout.run(targets)
        self.work.variants = {str(target): variants for target, variants in found.items()}

    def _search_on(self, search: Search) -> None:
        # The time that reading the model and looking for devices took is no part of a short budget.
        deadline = max(SEARCH_UNTIL * self.work.options.budget_s, self.work.elapsed() + _LEAST_SEARCH * self.work.options.budget_s)
        trials = stale = 0
        best = _best_loss(search)
        while not search.exhausted and not self.work.asked() and self.work.elapsed() < deadline:
            if self.work.options.trials is not None and trials >= self.work.options.trials:
                break
            if self.work.options.trials is None and trials >= _LEAST_TRIALS and stale >= _PATIENCE:
                break
            count = _GROUP if self.work.options.trials is None else min(_GROUP, self.work.options.trials - trials)
            asked = search.ask(count)
            if not asked:
                break
            left = max(1.5, min(_GROUP_S, deadline - self.work.elapsed()))
            incumbent = [candidate for candidate, _ in search.best(1)]
            # How close a lowered model comes does not hang on threads: once it is out on a target, its other settings are too.
            found: dict[str, Score | Rejection] = {
                each.key: self._inaccurate[each.target, each.config.precision] for each in asked if self._is_out(each)
            }
            found |= {each.key: why for each in asked if (why := self.room.why_not(each)) is not None}
            found |= {each.key: self._again[each.key] for each in asked if each.key in self._again}
            wanted = [each for each in asked if each.key not in found]
            if wanted:
                found |= self.measurer.measure(wanted, budget_s=left, tell=self.work.tell_race, beside=incumbent)
            for candidate in asked:
                outcome = found[candidate.key]
                search.tell(candidate, outcome)
                self._record(search)
                self.room.learn(candidate, outcome)
                if candidate.config.lowered and isinstance(outcome, Rejection) and outcome.state in ("pruned", "refused"):
                    self._leave_out(candidate, outcome)
            trials += len(asked)
            now = _best_loss(search)
            stale = 0 if any(after < before - 0.01 for after, before in zip(now, best, strict=True)) else stale + len(asked)
            best = [min(pair) for pair in zip(now, best, strict=True)]

    def _is_out(self, candidate: Candidate) -> bool:
        return (candidate.target, candidate.config.precision) in self._inaccurate

    def _leave_out(self, candidate: Candidate, outcome: Rejection) -> None:
        """Do not try the precision of a lowered candidate again on its target, unless it is only one setting that was refused."""
        default = not candidate.config.settings
        if self._is_out(candidate) or not (default or outcome.ratio is not None):
            return
        reason = f"{candidate.config.precision} is out on {candidate.target}: {outcome.reason}"
        self._inaccurate[candidate.target, candidate.config.precision] = Rejection(state="pruned", reason=reason)
        self.work.note(reason)

    def _record(self, search: Search) -> None:
        self.work.database.add_trial(self.work.run_id, search.records[-1])


def _best_loss(search: Search) -> list[float]:
    """Return the least loss so far of each objective."""
    best = [search.best(1, objective) for objective in search.objectives]
    return [math.inf if not found else objective.loss(*found[0]) for objective, found in zip(search.objectives, best, strict=True)]


def _ran(known: tuple[Candidate, Score | Rejection] | None) -> bool:
    """True when the baseline gave a time, even one whose accuracy makes it ineligible."""
    return known is not None and (isinstance(known[1], Score) or known[1].ratio is not None)


def _within(candidate: Candidate, space: Space) -> bool:
    if candidate.target not in space.targets or candidate.batch not in space.batches or candidate.callers > space.most_callers:
        return False
    if candidate.replicas > space.replicas_of(candidate.target):
        return False
    return candidate.config.precision in (None, *space.precisions[str(candidate.target)])


def _reason(outcome: Score | Rejection | None) -> str:
    return outcome.reason if isinstance(outcome, Rejection) else "not measured"
