"""The conductor: one tuning from the model file to the plan, in the order of DESIGN 3."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aivmm.db.database import Database
from aivmm.errors import ModelError, UsageError
from aivmm.planner.candidates import Candidate, Draft, Rejection, Score
from aivmm.planner.constraints import Constraint
from aivmm.planner.partition import cut_drafts
from aivmm.planner.records import RunRecord
from aivmm.planner.search import Search, Space
from aivmm.probes.lab import Lab
from aivmm.probes.race import RaceState
from aivmm.runtime.backend import Baseline
from aivmm.runtime.bundle import check_destination
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.plan import Accuracy, Number
from aivmm.runtime.registry import default_backends
from aivmm.runtime.target import Target, select
from aivmm.tuner.anatomy import Anatomist, medians
from aivmm.tuner.emit import Emitter, folder_bytes
from aivmm.tuner.measure import Measurer
from aivmm.tuner.options import DEFAULT_BATCHES, DEFAULT_COSINE, TuneOptions
from aivmm.tuner.progress import Progress
from aivmm.tuner.prove import Entrant, Proof, Prover, interval_s
from aivmm.tuner.reporting import write_report
from aivmm.tuner.subject import Prepared, Subject
from aivmm.tuner.verdict import describe, sentence, summary, time_text

# Shares of the budget by which each phase has to end, counted from the start.
_SEARCH_UNTIL, _BLOCKS_UNTIL, _OPERATORS_UNTIL = 0.62, 0.80, 1.0
_GROUP = 3  # candidates asked for at once: they share a race, and its reference
_GROUP_S = 4.0
_PATIENCE = 12  # trials without an improvement of 1 % after which a search without --trials ends
_LEAST_TRIALS = 10
_HOPELESS = {"latency": 2.0, "throughput": 3.0}  # a target this far behind with its defaults is not searched
_WORTH_PROVING = 1.02  # a finalist this far behind the best baseline would only cost time


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOutcome:
    """What a tuning gave. `plan_path` is None when no plan meets the constraints."""

    run: RunRecord
    plan_path: Path | None
    report_path: Path
    database: str
    summary: Mapping[str, Any]


class Session:
    """One tuning. Its parts talk through the database; what is in memory is only what this run needs."""

    def __init__(self, options: TuneOptions, progress: Progress, *, command: str = "") -> None:
        self.options = options
        self.progress = progress
        self.command = command
        self.started = time.perf_counter()
        self.constraints: tuple[Constraint, ...] = options.parsed_constraints()
        cosine = [each.limit for each in self.constraints if each.metric == "cosine"]
        self.cosine_limit = max(cosine, default=DEFAULT_COSINE)
        self.notes: list[str] = []
        self.proof: Proof | None = None
        self._emitters: dict[int, Emitter] = {}

    @property
    def output(self) -> Path:
        """Where the plan goes."""
        if self.options.output is not None:
            return self.options.output
        return Path(f"{_stem(self.options.model)}.aivmm")

    def elapsed(self) -> float:
        """Return seconds since the start."""
        return time.perf_counter() - self.started

    def run(self) -> TuneOutcome | dict[str, Any]:
        """Tune. With `dry_run` return what would be measured instead.

        Raises:
            AivmmError: what the user can fix.
        """
        if not self.options.dry_run:
            check_destination(self.output)
        with Database.open(self.options.db) as database, Lab() as lab, tempfile.TemporaryDirectory(prefix="aivmm-") as folder:
            self.database, self.lab, self.folder = database, lab, Path(folder)
            self.progress.phase("reading the model")
            self.subject = Subject(self.options, lab, self.folder)
            self.progress.phase("looking for devices")
            self._find_targets()
            self.subject.make_reference(self.all_targets)
            if self.options.dry_run:
                return self._dry_run()
            self._begin()
            try:
                return self._tune()
            except KeyboardInterrupt:
                self._end("interrupted")
                raise
            except BaseException:
                self._end("failed")
                raise
            finally:
                for emitter in self._emitters.values():
                    emitter.close()

    def _find_targets(self) -> None:
        names = list(self.options.backends) or list(default_backends())
        self.all_targets, self.unavailable = self.lab.discover(names)
        patterns = list(self.options.targets) or ["*"]
        self.targets: tuple[Target, ...] = select(self.all_targets, patterns, self.unavailable)
        allowed = [each for each in self.constraints if each.metric == "targets"]
        for constraint in allowed:
            keep = select(self.targets, constraint.names, self.unavailable)
            self.targets = tuple(target for target in self.targets if target in keep)
        if not self.targets:
            reasons = "; ".join(map(str, self.unavailable)) or "no runtime is installed"
            raise UsageError(f"there is no target to run on: {reasons}")
        for each in self.options.precisions:
            if not any(each in target.precisions for target in self.targets):
                known = sorted({precision for target in self.targets for precision in target.precisions})
                raise UsageError(f"no target here runs {each} natively", advice=f"--precisions can be: {', '.join(known)}")
        self.subject.remember_targets(self.all_targets)

    def _precisions(self, target: Target) -> list[str | None]:
        wanted = [each for each in target.precisions if not self.options.precisions or each in self.options.precisions]
        return list(wanted)

    def _begin(self) -> None:
        database, subject = self.database, self.subject
        for target in self.all_targets:
            database.remember_environment(environment_of(target))
            database.remember_target(target)
        model_id = database.remember_model(subject.facts, subject.structure)
        self.record = RunRecord(
            id=str(uuid.uuid4()),
            request=self._request(),
            started_at=datetime.now(UTC),
            model=subject.facts,
            objective=self.options.objective,
            constraints=tuple(self.options.constraints),
            options=self.options.as_json(),
            command=self.command,
            seed=self.options.seed,
            aivmm_version=version("aivmm"),
        )
        earlier = None if self.options.fresh else database.last_run(self.record.request, ("searched", "complete", "infeasible"))
        self.searched_before = earlier is not None
        database.start_run(self.record, unavailable=self.unavailable, model_id=model_id)
        database.link_environments(self.record.id, [environment_of(target).fingerprint for target in self.targets])

    def _request(self) -> str:
        """Return the digest of all that decides what is searched."""
        options = self.options
        what = {
            "content": self.subject.structure.content,
            "batch": self.subject.base_batch,
            "inputs": None if options.inputs is None else hashlib.sha256(options.inputs.read_bytes()).hexdigest(),
            "objective": options.objective,
            "constraints": sorted(options.constraints),
            "environments": sorted(environment_of(target).fingerprint for target in self.targets),
            "precisions": sorted(options.precisions),
            "batches": list(options.batches),
            "min_segments": options.min_segments,
            "budget_s": options.budget_s,
            "trials": options.trials,
            "seed": options.seed,
            "aivmm": version("aivmm"),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def _tune(self) -> TuneOutcome:
        baselines = self._baselines()
        search = self._search(baselines)
        self._anatomise()
        self._end("searched", finished=False)
        entrants = self._entrants(baselines, search)
        prover = Prover(
            entrants,
            constraints=self.constraints,
            cosine_limit=self.cosine_limit if self.subject.deterministic else None,
            seed=self.options.seed,
            tell=self._tell_proof,
            forced=self.options.min_segments > 1,
        )
        self.progress.phase("proving the best end to end")
        self.proof = prover.run()
        for each in self.proof.records():
            self.database.add_proof(self.record.id, each)
        return self._emit(search)

    # --- measuring -----------------------------------------------------------------------------------------------------------------

    def _baselines(self) -> list[tuple[Baseline, Candidate]]:
        """Measure the baselines; they are the first candidates and the yardstick. Those that no target takes are noted and left out."""
        self.progress.phase("measuring what you would run without us")
        known = self.lab.baselines(self.targets, self.options.objective)
        pairs = [(each, self._candidate(each)) for each in known]
        for each in known:  # AUTO exists only here
            self.database.remember_environment(environment_of(each.target))
            self.database.remember_target(each.target)
        pairs.sort(key=lambda pair: str(pair[0].target) != "onnxruntime:CPU")  # the reference comes first: the same one in every run
        self.measurer = Measurer(
            lab=self.lab,
            subject=self.subject,
            database=self.database,
            run_id=self.record.id,
            reference=pairs[0][1],
            cosine_limit=self.cosine_limit,
            fresh=self.options.fresh,
            retry_failed=self.options.retry_failed,
            seed=self.options.seed,
        )
        usable = self._first_that_runs(pairs)
        self.known = {candidate.key: (candidate, outcome) for candidate, outcome in self.measurer.recall(self._all_measured_targets(pairs))}
        missing = [candidate for _, candidate in usable if candidate.key not in self.known]
        if missing:
            found = self.measurer.measure(missing, budget_s=max(4.0, 0.2 * self.options.budget_s), tell=self._tell_race, keep=missing)
            for _, candidate in usable:
                if candidate.key in found:
                    self.known[candidate.key] = (candidate, found[candidate.key])
        usable += self._twins(usable)
        for baseline, candidate in usable:
            outcome = self.known.get(candidate.key, (candidate, None))[1]
            if isinstance(outcome, Rejection) and outcome.state != "pruned":
                self._note(f"{baseline.name} cannot run this model: {outcome.reason}")
        return [(each, candidate) for each, candidate in usable if _ran(self.known.get(candidate.key))]

    def _candidate(self, baseline: Baseline) -> Candidate:
        return Candidate(target=baseline.target, config=baseline.config, batch=self.subject.base_batch, callers=baseline.callers)

    def _all_measured_targets(self, pairs: Sequence[tuple[Baseline, Candidate]]) -> list[Target]:
        return list(dict.fromkeys((*self.targets, *(candidate.target for _, candidate in pairs))))

    def _first_that_runs(self, pairs: list[tuple[Baseline, Candidate]]) -> list[tuple[Baseline, Candidate]]:
        """Make sure that the reference runs: try the baselines in order, and leave the refused ones out.

        Raises:
            ModelError: none runs.
        """
        reasons = []
        for index, (baseline, candidate) in enumerate(pairs):
            outcome = self.measurer.try_load(candidate)
            if outcome is None:
                self.measurer.reference = candidate
                return pairs[index:]
            reasons.append(f"{baseline.name}: {outcome.reason}")
            self._note(f"{baseline.name} cannot run this model: {outcome.reason}")
        raise ModelError(f"no target takes {self.subject.facts.name}: {'; '.join(reasons)}")

    def _twins(self, usable: Sequence[tuple[Baseline, Candidate]]) -> list[tuple[Baseline, Candidate]]:
        """Where a runtime's default is not fp32 (bf16 on AMX), its fp32 twin is the yardstick for accuracy's sake: measure it too."""
        twins = []
        for _, candidate in usable:
            loaded = self.measurer.loaded(candidate)
            hint = str(loaded.effective_config.get("INFERENCE_PRECISION_HINT", "float32")) if loaded else "float32"
            lower = hint not in ("float32", "f32", "dynamic") or (len(candidate.target.precisions) > 1 and not loaded)
            if lower and candidate.config.precision is None and not candidate.config.settings and candidate.target.name != "AUTO":
                config = replace(candidate.config, precision="fp32")
                twin = Baseline(name=f"{candidate.target} fp32", target=candidate.target, config=config, callers=candidate.callers)
                twins.append((twin, self._candidate(twin)))
        missing = [candidate for _, candidate in twins if candidate.key not in self.known]
        if missing:
            for key, outcome in self.measurer.measure(missing, budget_s=4.0, tell=self._tell_race, keep=missing).items():
                for candidate in missing:
                    if candidate.key == key:
                        self.known[key] = (candidate, outcome)
        return twins

    def _search(self, baselines: Sequence[tuple[Baseline, Candidate]]) -> Search:
        """Search the knobs of the targets that are worth it, until the budget's share is spent or nothing improves."""
        self.progress.phase("searching settings")
        targets = self._worth_searching(baselines)
        batches, callers = self._batches(), 1
        if self.options.objective == "throughput":
            callers = max(2, *(2 * (target.device.cores or 2) for target in targets))
        space = Space(
            targets=targets,
            knobs={str(target): self.lab.knobs(target) for target in targets},
            objective=self.options.objective,
            precisions={str(target): self._precisions(target) for target in targets},
            batches=batches,
            most_callers=min(callers, 32),
        )
        search = Search(space=space, seed=self.options.seed)
        for candidate, outcome in self.known.values():
            if _within(candidate, space):
                search.tell(candidate, outcome)
                self._record(search)
        search.enqueue(
            Candidate(target=target, config=Config(precision=self._precisions(target)[0]), batch=batches[0]) for target in targets
        )
        if not self.searched_before and self.options.min_segments == 1:
            self._search_on(search)
        self.measurer.release()
        self.importance = search.importance()
        return search

    def _worth_searching(self, baselines: Sequence[tuple[Baseline, Candidate]]) -> list[Target]:
        best: dict[Target, float] = {}
        for _, candidate in baselines:
            outcome = self.known[candidate.key][1]
            if isinstance(outcome, Score | Rejection) and outcome.ratio is not None and candidate.target in self.targets:
                best[candidate.target] = min(best.get(candidate.target, outcome.ratio), outcome.ratio)
        least = min(best.values())
        worth = [target for target in best if best[target] <= _HOPELESS[self.options.objective] * least]
        for target in best:
            if target not in worth:
                self._note(f"{target} was not searched: its defaults take {best[target] / least:.1f} times as long as the best ones")
        return worth

    def _batches(self) -> tuple[int, ...]:
        if self.options.objective != "throughput":
            if len(self.options.batches) > 1:
                self._note(f"latency is tuned for batch {self.subject.base_batch}; use --objective throughput to search several")
            return (self.subject.base_batch,)
        if not self.subject.facts.batchable:
            return (self.subject.base_batch,)
        return self.options.batches or DEFAULT_BATCHES

    def _search_on(self, search: Search) -> None:
        deadline = _SEARCH_UNTIL * self.options.budget_s
        trials = stale = 0
        best = min((score.ratio for _, score in search.best(1)), default=float("inf"))
        while not search.exhausted and self.elapsed() < deadline:
            if self.options.trials is not None and trials >= self.options.trials:
                break
            if self.options.trials is None and trials >= _LEAST_TRIALS and stale >= _PATIENCE:
                break
            count = _GROUP if self.options.trials is None else min(_GROUP, self.options.trials - trials)
            asked = search.ask(count)
            if not asked:
                break
            left = max(1.5, min(_GROUP_S, deadline - self.elapsed()))
            incumbent = [candidate for candidate, _ in search.best(1)]
            found = self.measurer.measure(asked, budget_s=left, tell=self._tell_race, beside=incumbent)
            for candidate in asked:
                search.tell(candidate, found[candidate.key])
                self._record(search)
            trials += len(asked)
            now = min((score.ratio for _, score in search.best(1)), default=best)
            stale = 0 if now < 0.99 * best else stale + len(asked)
            best = min(best, now)

    def _record(self, search: Search) -> None:
        self.database.add_trial(self.record.id, search.records[-1])

    def _anatomise(self) -> None:
        """Probe blocks, then operators, with what is left of the budget."""
        self.progress.phase("measuring blocks and operators")
        folder = self.folder / "parts"
        folder.mkdir()
        self.anatomist = Anatomist(
            lab=self.lab,
            subject=self.subject,
            database=self.database,
            run_id=self.record.id,
            targets=self.targets,
            emitter=self._emitter(self.subject.base_batch),
            folder=folder,
            counts=self.measurer.counts,
            fresh=self.options.fresh,
            retry_failed=self.options.retry_failed,
            measure_new=not self.searched_before,
        )
        budget = self.options.budget_s

        def tell(what: str, number: int, total: int) -> None:
            self.progress.detail(f"{what}: {number} of {total}", left_s=budget - self.elapsed())

        # A forced cut needs its evidence, whatever is left.
        least = 20.0 if self.options.min_segments > 1 else 0.0
        self.block_outcomes = self.anatomist.blocks(budget_s=max(least, _BLOCKS_UNTIL * budget - self.elapsed()), tell=tell)
        self.anatomist.operators(budget_s=max(0.0, _OPERATORS_UNTIL * budget - self.elapsed()), tell=tell)
        if self.anatomist.skipped and not self.searched_before:
            self._note(f"{self.anatomist.skipped} block and operator probes did not fit the budget; raise --budget to have them all")

    # --- deciding ------------------------------------------------------------------------------------------------------------------

    def _entrants(self, baselines: Sequence[tuple[Baseline, Candidate]], search: Search) -> list[Entrant]:
        """Choose who is proven: every baseline, the best few of the search, and cut plans that are forced or promise to win."""
        blocks = len(self.subject.structure.blocks)
        drafts = [(Draft.whole(each.name, candidate, blocks), "baseline") for each, candidate in baselines]
        known = {candidate.key for _, candidate in baselines}
        yardstick = min(
            (score.ratio for _, candidate in baselines if isinstance(score := self.known[candidate.key][1], Score)), default=None
        )
        self.predicted: dict[str, float] = {}
        finalists: list[Draft] = []
        for candidate, score in search.best(self.options.top + len(known)):
            worth = yardstick is None or score.ratio <= _WORTH_PROVING * yardstick
            if candidate.key in known or not worth or len(finalists) >= self.options.top or self.options.min_segments > 1:
                continue
            draft = Draft.whole(f"candidate {len(finalists) + 1}", candidate, blocks)
            self.predicted[draft.name] = score.median_s
            finalists.append(draft)
        finalists += self._cuts(search, baselines)
        # Batching alone is no merit of ours: whoever may batch gets the defaults at the same batch as a yardstick.
        for batch in sorted({draft.batch for draft in finalists} - {self.subject.base_batch}):
            for each, candidate in baselines:
                if each.callers == 1 and not each.config.settings:
                    drafts.append((Draft.whole(f"{each.name}, batch {batch}", replace(candidate, batch=batch), blocks), "baseline"))
        drafts += [(draft, "candidate") for draft in finalists]
        return [self._entrant(number, draft, role) for number, (draft, role) in enumerate(drafts)]

    def _cuts(self, search: Search, baselines: Sequence[tuple[Baseline, Candidate]]) -> list[Draft]:
        best_config = {str(candidate.target): candidate.config for _, candidate in reversed(baselines)}
        best_config |= {str(candidate.target): candidate.config for candidate, _ in reversed(search.best(1000)) if candidate.callers == 1}
        uncut = min((outcome.median_s for _, outcome in self.known.values() if isinstance(outcome, Score)), default=None)
        wholes: dict[str, float] = {}
        for candidate, outcome in self.known.values():
            if isinstance(outcome, Score) and candidate.callers == 1 and candidate.batch == self.subject.base_batch:
                name = str(candidate.target)
                wholes[name] = min(wholes.get(name, outcome.median_s), outcome.median_s)
        drafts, why = cut_drafts(
            self.subject.structure,
            self.targets,
            medians(self.block_outcomes, self.anatomist.wrong),
            configs=best_config,
            wholes=wholes,
            min_segments=self.options.min_segments,
            uncut_s=uncut,
            batch=self.subject.base_batch,
        )
        for note in why:
            self._note(note)
        for draft, predicted in drafts:
            self.predicted[draft.name] = predicted
        return [draft for draft, _ in drafts]

    def _emitter(self, batch: int) -> Emitter:
        if batch not in self._emitters:
            prepared = self.subject.at(batch)
            structure = self.subject.structure_at(batch)
            self._emitters[batch] = Emitter(
                prepared.path, prepared.facts, structure, self.folder / f"segments-{batch}", version=version("aivmm")
            )
        return self._emitters[batch]

    def _entrant(self, number: int, draft: Draft, role: str) -> Entrant:
        prepared: Prepared = self.subject.at(draft.batch)
        bundle = self.folder / f"entrant-{number}.aivmm"
        if len(draft.pieces) == 1:  # blocks of another batch may be numbered differently; the whole is the whole
            last = len(self.subject.structure_at(draft.batch).blocks) - 1
            draft = replace(draft, pieces=(replace(draft.pieces[0], first=0, last=last),))
        self._emitter(draft.batch).write(draft, bundle, objective=self.options.objective)
        return Entrant(
            draft=draft,
            role=role,
            bundle=bundle,
            size_bytes=folder_bytes(bundle),
            sample=prepared.samples[-1],
            reference=prepared.references[-1],
            samples=prepared.samples[:-1],
            references=prepared.references[:-1],
        )

    def _emit(self, search: Search) -> TuneOutcome:
        proof = self.proof
        assert proof is not None
        if proof.plan is None:
            return self._emit_nothing(proof)
        accuracy = self._accuracy(proof.plan)
        note = (
            f"Outputs match {accuracy.reference}: cosine {accuracy.value:.6f} on {accuracy.data} inputs."
            if accuracy
            else "Accuracy could not be judged: the model's outputs are random."
        )
        verdict = sentence(proof, objective=self.options.objective, accuracy_text=note)
        fallbacks = self._fallbacks(proof)
        plan = self._emitter(proof.plan.draft.batch).write(
            proof.plan.draft,
            self.output,
            objective=self.options.objective,
            constraints=self.options.constraints,
            expected=_expected(proof.plan),
            accuracy=accuracy,
            fallbacks=fallbacks,
            verdict=verdict,
        )
        self.database.save_plan(self.record.id, plan.model_dump(mode="json", by_alias=True), str(self.output))
        return self._finish("complete", self.output, self.output / "report.html", verdict, accuracy, search)

    def _emit_nothing(self, proof: Proof) -> TuneOutcome:
        """Say which constraint binds and what came nearest. The report is written all the same."""
        nearest = _nearest(proof)
        reasons = [each.sentence for each in proof.violations.get(nearest.draft.name, ())] if nearest else []
        if nearest is None:
            reasons = [f"{each.draft.name}: {each.problem}" for each in proof.entrants if each.problem][:3]
        verdict = f"No plan meets the constraints ({', '.join(self.options.constraints) or f'cosine>={self.cosine_limit:g}'}). "
        verdict += f"The nearest is {describe(nearest.draft)}: {'; '.join(reasons)}." if nearest else "; ".join(reasons)
        report = self.output.with_name(f"{self.output.name.removesuffix('.aivmm')}.report.html")
        return self._finish("infeasible", None, report, verdict, None, None, trouble=reasons)

    def _finish(
        self,
        status: str,
        plan_path: Path | None,
        report: Path,
        verdict: str,
        accuracy: Accuracy | None,
        search: Search | None,
        *,
        trouble: Sequence[str] = (),
    ) -> TuneOutcome:
        proof = self.proof
        assert proof is not None
        predicted = self.predicted.get(proof.plan.draft.name) if proof.plan else None
        if proof.plan and predicted is None:
            predicted = next(
                (
                    outcome.median_s
                    for candidate, outcome in self.known.values()
                    if _same(candidate, proof.plan.draft) and isinstance(outcome, Score)
                ),
                None,
            )
        result = summary(
            facts=self.subject.facts,
            given=self.options.model,
            proof=proof,
            objective=self.options.objective,
            plan_path=str(plan_path),
            report=str(report),
            predicted_s=predicted,
            accuracy={
                "metric": "cosine",
                "value": accuracy.value if accuracy else None,
                "limit": self.cosine_limit,
                "data": "real" if self.subject.real_data else "synthetic",
            },
            counts=self.measurer.counts,
            wall_s=self.elapsed(),
            verdict=verdict,
            trouble=trouble,
        )
        result["importance"] = self.importance
        self._end(status, summary_=result)
        self.progress.phase("writing the report")
        write_report(self.database, self.record.id, report)
        return TuneOutcome(run=self.record, plan_path=plan_path, report_path=report, database=self.database.location, summary=result)

    def _accuracy(self, plan: Entrant) -> Accuracy | None:
        if not self.subject.deterministic or "cosine" not in plan.metrics:
            return None
        return Accuracy(
            metric="cosine",
            value=plan.metrics["cosine"],
            limit=self.cosine_limit,
            data="real" if self.subject.real_data else "synthetic",
            reference=self.subject.reference_name,
        )

    def _fallbacks(self, proof: Proof) -> list[Draft]:
        """Return uncut plans for the other runtimes and devices, best first: what to run where the plan's own target is missing."""
        assert proof.plan
        have = {str(piece.target) for piece in proof.plan.draft.pieces}
        others: dict[str, Entrant] = {}
        for each in proof.entrants:
            piece = each.draft.pieces[0]
            name = str(piece.target)
            usable = each.eligible and each.confirmed and len(each.draft.pieces) == 1 and each.draft.batch == proof.plan.draft.batch
            if not usable or piece.target.name == "AUTO" or (name in have and len(have) == 1) or each.draft.name in proof.violations:
                continue
            assert each.confirmed
            held = others.get(name)
            if held is None or (held.confirmed and each.confirmed.median_s < held.confirmed.median_s):
                others[name] = each
        ranked = sorted(others.values(), key=lambda each: each.confirmed.median_s if each.confirmed else 0.0)
        return [replace(each.draft, name=f"{each.draft.targets} instead") for each in ranked]

    # --- telling -------------------------------------------------------------------------------------------------------------------

    def _tell_race(self, state: RaceState) -> None:
        best = f"best so far {time_text(min(state.leader.durations))}" if state.leader else ""
        self.progress.detail(f"round {state.round}, {state.racing} candidates", best=best, left_s=self.options.budget_s - self.elapsed())

    def _tell_proof(self, what: str, state: RaceState | None) -> None:
        self.progress.detail(what + (f": round {state.round}" if state else ""))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.progress.note(text)

    def _end(self, status: str, *, summary_: Mapping[str, Any] | None = None, finished: bool = True) -> None:
        self.record = replace(
            self.record,
            status=status,  # type: ignore[arg-type]
            finished_at=datetime.now(UTC) if finished else None,
            summary=summary_ or {},
            notes=(*self.subject.facts.notes, *self.subject.notes, *self.notes),
        )
        self.database.update_run(self.record)

    def _dry_run(self) -> dict[str, Any]:
        """Return what would be measured."""
        baselines = self.lab.baselines(self.targets, self.options.objective)
        structure = self.subject.structure
        return {
            "schema": 1,
            "dry_run": True,
            "model": {"path": self.options.model, "sha256": self.subject.facts.sha256, "category": asdict(self.subject.facts.category)},
            "inputs": [str(each) for each in self.subject.facts.inputs],
            "notes": [*self.subject.facts.notes, *self.subject.notes],
            "targets": [str(each) for each in self.targets],
            "unavailable": [str(each) for each in self.unavailable],
            "baselines": [each.name for each in baselines],
            "knobs": {str(target): [knob.name for knob in self.lab.knobs(target)] for target in self.targets},
            "batches": list(self._batches()),
            "blocks": len(structure.blocks),
            "operators": len(structure.operators),
            "budget_s": self.options.budget_s,
        }


def _stem(model: str) -> str:
    return model.removeprefix("demo:") if model.startswith("demo:") else Path(model).stem


def _ran(known: tuple[Candidate, Score | Rejection] | None) -> bool:
    """True when the baseline gave a time, even one whose accuracy makes it ineligible."""
    return known is not None and (isinstance(known[1], Score) or known[1].ratio is not None)


def _within(candidate: Candidate, space: Space) -> bool:
    return candidate.target in space.targets and candidate.batch in space.batches and candidate.callers <= space.most_callers


def _same(candidate: Candidate, draft: Draft) -> bool:
    piece = draft.pieces[0]
    return (candidate.target, candidate.config, candidate.batch, candidate.callers) == (
        piece.target,
        piece.config,
        draft.batch,
        draft.callers,
    )


def _nearest(proof: Proof) -> Entrant | None:
    """Return the entrant whose worst violation is the smallest."""
    judged = [each for each in proof.entrants if each.draft.name in proof.violations]
    return min(judged, key=lambda each: max(violation.percent for violation in proof.violations[each.draft.name]), default=None)


def _expected(plan: Entrant) -> dict[str, Number]:
    assert plan.confirmed
    low, high = interval_s(plan)
    count = len(plan.confirmed.timed_s)
    found = {"median_s": Number(value=plan.confirmed.median_s, low=low, high=high, source="measured", samples=count)}
    for name in ("p99_s", "throughput_per_s", "peak_memory_bytes", "compile_s", "first_inference_s"):
        if name in plan.metrics:
            found[name] = Number(value=plan.metrics[name], source="measured", samples=count if name == "throughput_per_s" else 0)
    return found
