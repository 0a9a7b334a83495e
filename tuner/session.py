"""The conductor: one tuning from the model file to the plan, in the order of DESIGN 3."""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aivmm.db.database import Database
from aivmm.planner.constraints import ACCURACY, Constraint
from aivmm.planner.levels import told
from aivmm.planner.records import RunRecord
from aivmm.probes.lab import Data, Lab
from aivmm.probes.race import RaceState
from aivmm.probes.records import Outcome, ProbeKey
from aivmm.probes.transfers import TransferFit
from aivmm.runtime.bundle import check_destination
from aivmm.runtime.environment import environment_of
from aivmm.runtime.registry import default_backends
from aivmm.runtime.target import matches
from aivmm.tuner.anatomy import Anatomist
from aivmm.tuner.asked import allowed, assumed, request, require_counters
from aivmm.tuner.decide import Decider
from aivmm.tuner.disturbed import disturbed, told_of_proof
from aivmm.tuner.expected import as_planned, expected
from aivmm.tuner.explore import Explorer
from aivmm.tuner.handover import HandoverProber
from aivmm.tuner.interrupt import Interrupts
from aivmm.tuner.layout import cut_around_refused, cut_around_wrong, cut_as_asked
from aivmm.tuner.memory_copies import CopyProber
from aivmm.tuner.options import DEFAULT_COSINE, TuneOptions, on_top
from aivmm.tuner.piecewise import refer_in_pieces
from aivmm.tuner.precision_record import precision_record
from aivmm.tuner.progress import Progress
from aivmm.tuner.proof import Proof
from aivmm.tuner.prove import Prover
from aivmm.tuner.refusals import as_laid_out_before
from aivmm.tuner.reporting import write_report
from aivmm.tuner.subject import Subject
from aivmm.tuner.tradeoffs import importance_text
from aivmm.tuner.transfers import Probing
from aivmm.tuner.verdict import summary
from aivmm.tuner.work import Work, remove_orphans

# A second to import each, and needed only later: loaded in the background while workers read the model and look for devices.
_AHEAD = ("aivmm.models.graph", "aivmm.models.slice", "aivmm.probes.wilcoxon", "aivmm.reports.render")
# Shares of the budget by which blocks, hand-overs and operators have to end, counted from the start.
_BLOCKS_UNTIL, _HANDOVERS_UNTIL, _OPERATORS_UNTIL = 0.80, 0.85, 1.0
_HELD_OUT_S, _HELD_OUT_SHARE = 10.0, 0.5  # to make references for all held-out samples; at least so long, or this share of the budget
_FORCED_S = 20.0  # a forced cut needs its evidence, whatever is left

Look = Callable[[Work, Explorer], None]


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

    def __init__(
        self,
        options: TuneOptions,
        progress: Progress,
        *,
        command: str = "",
        shown: tuple[Path, Path] | None = None,
        look: Look | None = None,
        data: Data | None = None,
        interrupts: Interrupts | None = None,
    ) -> None:
        """Tune as `options` say.

        `shown` is where plan and report end up, when what is written now is only a part of a bundle to come. `look` is called once settings
        were searched, for those who want to measure more of the same model. `data` are the user's samples where they were read already.
        `interrupts` are those of a larger tuning that this one is a part of, which has entered them.
        """
        self._look = look
        self._data = data
        self.options = options
        self._shown = shown
        self._ended = False  # the outcome is stored
        self.progress = progress
        self.command = command
        self.started = time.perf_counter()
        self.interrupts = interrupts or Interrupts(progress.note)
        self._whole = interrupts is None
        self.constraints: tuple[Constraint, ...] = options.parsed_constraints()
        cosine = [each.limit for each in self.constraints if each.metric == "cosine"]
        # Who limits accuracy in another way has said what matters.
        judged_otherwise = any(each.metric in ACCURACY for each in self.constraints)
        self.cosine_limit = max(cosine) if cosine else None if judged_otherwise else DEFAULT_COSINE

    @property
    def output(self) -> Path:
        """Where the plan goes."""
        if self.options.output is not None:
            return self.options.output
        return Path(f"{_stem(self.options.model)}.aivmm")

    def run(self) -> TuneOutcome | dict[str, Any]:
        """Tune. With `dry_run` return what would be measured instead.

        Raises:
            AivmmError: what the user can fix.
        """
        if not self.options.dry_run:
            check_destination(self.output)
        with (
            self.interrupts if self._whole and not self.options.dry_run else nullcontext(),
            Database.open(self.options.db) as database,
            # Outlives the workers, which map files in it. A folder that cannot be removed is no reason to lose a finished tuning.
            tempfile.TemporaryDirectory(prefix=f"aivmm-{os.getpid()}-", ignore_cleanup_errors=True) as folder,
            Lab() as lab,
        ):
            remove_orphans(Path(folder).parent)
            work = self._prepare(database, lab, Path(folder))
            try:
                if self.options.service_level is not None:
                    work.note(told(self.options.service_level, self.options.objective))
                self._say_what_is_assumed(work)
                if self.options.dry_run:
                    return _dry_run(work)
                record = self._begin(work)
                try:
                    return self._tune(work, record)
                except KeyboardInterrupt:
                    _end(work, record, "interrupted")
                    raise
                except BaseException:  # not handled, only recorded: the run's row must not say that it still runs
                    if not self._ended:  # a report that cannot be written takes nothing back
                        _end(work, record, "failed")
                    raise
            finally:
                work.close()

    def _prepare(self, database: Database, lab: Lab, folder: Path) -> Work:
        """Read the model, look for devices at the same time, and make the reference."""
        looking = ThreadPoolExecutor(max_workers=1)
        try:
            discovery = looking.submit(lab.discover, list(self.options.backends) or list(default_backends()))
            threading.Thread(target=lambda: [import_module(name) for name in _AHEAD], daemon=True).start()
            self.progress.phase("reading the model")
            if self.options.metric is not None:
                lab.check_metric(self.options.metric)
            subject = Subject(self.options, lab, folder, data=self._data)
            self.progress.phase("looking for devices")
            found, unavailable = discovery.result()
        finally:
            looking.shutdown(wait=False)  # a model that cannot be read is no reason to wait: the workers end with the laboratory
        targets = allowed(self.options, found, unavailable)
        require_counters(self.options, targets)
        subject.remember_targets(found)
        subject.make_reference(found)
        if self.options.metric is not None:
            subject.try_metric(self.options.metric)
        return Work(
            options=self.options,
            progress=self.progress,
            started=self.started,
            database=database,
            lab=lab,
            folder=folder,
            subject=subject,
            targets=targets,
            all_targets=found,
            unavailable=unavailable,
            constraints=self.constraints,
            cosine_limit=self.cosine_limit,
            run_id=str(uuid.uuid4()),
            asked=lambda: self.interrupts.asked,
        )

    def _say_what_is_assumed(self, work: Work) -> None:
        unsaid = assumed(work)
        if unsaid:
            work.note(f"not asked for, and so assumed: {', '.join(unsaid)}")
        for pattern in self.options.prefer:
            if not any(matches(pattern, str(target)) for target in work.targets):
                absent = next((each for each in work.unavailable if matches(pattern, each.target)), None)
                why = absent.reason if absent else "there is no such target"
                work.note(f"{pattern} is preferred, and not to be had here ({why}): the next in order is taken")

    def _begin(self, work: Work) -> RunRecord:
        """Store what the run is about."""
        database, subject = work.database, work.subject
        stored = database.structure(subject.structure.content, subject.base_batch)
        subject.structure = as_laid_out_before(subject.structure, subject.path, stored)
        subject.structure = cut_as_asked(subject.structure, subject.path, self.options.cut_around)
        for target in work.all_targets:
            database.remember_environment(environment_of(target))
            database.remember_target(target)
        model_id = database.remember_model(subject.facts, subject.structure)
        record = RunRecord(
            id=work.run_id,
            request=request(work),
            started_at=datetime.now(UTC),
            model=subject.facts,
            objective=self.options.objective,
            constraints=tuple(self.options.constraints),
            options=self.options.as_json(),
            command=self.command,
            seed=self.options.seed,
            aivmm_version=version("aivmm"),
        )
        anew = self.options.fresh or self.options.retry_failed
        earlier = None if anew else database.last_run(record.request, ("searched", "complete", "infeasible"))
        self._searched_before = earlier is not None
        cut_short = None
        if not anew and earlier is None:  # one that was stopped before it asked for anything knows less than the one before it
            stopped = ("running", "interrupted", "failed")
            cut_short = database.last_run(record.request, stopped, begun="search") or database.last_run(record.request, stopped)
        self._earlier = earlier or cut_short
        self._earlier_summary = earlier.summary if earlier is not None else {}
        database.start_run(record, unavailable=work.unavailable, model_id=model_id)
        database.link_environments(record.id, [environment_of(target).fingerprint for target in work.targets])
        return record

    def _tune(self, work: Work, record: RunRecord) -> TuneOutcome:
        if work.subject.refusals:
            refer_in_pieces(work, laid_out=self._searched_before)
        explorer = Explorer(work, searched_before=self._searched_before, earlier=self._earlier)
        explorer.run()
        told = disturbed(work.database.run_outcomes(record.id), searched_before=self._searched_before)
        if told:
            work.note(told)
        if self._look is not None:
            self._look(work, explorer)
        if not self._searched_before and not work.subject.refusals:
            self._cut_around_refused(work, explorer)
        anatomist, handovers = self._anatomise(work, explorer)
        decider = Decider(work, explorer, anatomist, handovers)
        entrants = decider.entrants()
        # Only now: a run that repeats one that was searched measures no cuts, copies, pipelines or depths, so all of them have to be known.
        cut_short = work.asked()
        if cut_short:
            work.note("stopped by Ctrl-C: this is the best plan so far; run the same command again to go on with the search")
        else:
            record = _end(work, record, "searched", finished=False)
        self.progress.phase("proving the best end to end")
        proof = Prover(
            entrants,
            constraints=self.constraints,
            cosine_limit=self.cosine_limit if work.subject.deterministic else None,
            seed=self.options.seed,
            tell=self._tell_proof,
            metric=None if self.options.metric is None else partial(work.lab.metric, self.options.metric),
            further=partial(work.subject.held_out, limit_s=max(_HELD_OUT_S, _HELD_OUT_SHARE * self.options.budget_s)),
            forced=work.min_segments > 1,
            objectives=self.options.objectives,
            prefer=self.options.prefer,
            reference=decider.reference_name(),
        ).run()
        decider.note_predictions(proof)
        for tried in decider.tried:
            work.note(f"tried at once: {tried.sentence(proof)}")
        cautions = told_of_proof(proof, search_disturbed=bool(told))
        for each in proof.records():
            work.database.add_proof(record.id, each)
        work.notes.extend(f"{what} was not measured: {why}" for what, why in proof.absent.items())
        for said in cautions:  # the verdict does not say so; the report has them beside each proof
            self.progress.note(said)
        return self._finish(work, record, decider, proof, cut_short=cut_short)

    def _cut_around_refused(self, work: Work, explorer: Explorer) -> None:
        """Where a target refuses the whole model, cut the blocks around what it refuses: the rest can still be placed there."""
        for target in work.targets:
            rejection = explorer.rejection(target)
            if rejection is not None and rejection.state == "refused" and len(work.targets) > 1:
                cut_around_refused(work, target, rejection.reason, self._out_of_time(work))

    def _out_of_time(self, work: Work) -> Callable[[], bool]:
        """Return what says whether the share of the budget that blocks have is spent, counted from now where a cut is forced."""
        ends = max(_BLOCKS_UNTIL * self.options.budget_s, work.elapsed() + (_FORCED_S if work.min_segments > 1 else 0.0))
        return lambda: work.asked() or work.elapsed() > ends

    def _anatomise(self, work: Work, explorer: Explorer) -> tuple[Anatomist, Mapping[tuple[str, str], TransferFit]]:
        """Probe blocks, then hand-overs between targets, then operators, with what is left of the budget."""
        self.progress.phase("measuring blocks and operators")
        folder = work.folder / "parts"
        folder.mkdir()

        def of_this_layout(seen: Mapping[ProbeKey, Outcome]) -> Anatomist:
            return Anatomist(
                lab=work.lab,
                subject=work.subject,
                database=work.database,
                run_id=work.run_id,
                targets=work.targets,
                emitter=work.emitter(work.subject.base_batch),
                folder=folder,
                counts=explorer.measurer.counts,
                fresh=self.options.fresh,
                retry_failed=self.options.retry_failed,
                measure_new=not self._searched_before,
                stop=work.asked,
                seen=dict(seen),
            )

        anatomist = of_this_layout({})
        budget = self.options.budget_s

        def tell(what: str, number: int, total: int) -> None:
            self.progress.detail(f"{what}: {number} of {total}", left_s=budget - work.elapsed())

        least = _FORCED_S if work.min_segments > 1 else 0.0
        anatomist.blocks(budget_s=max(least, _BLOCKS_UNTIL * budget - work.elapsed()), tell=tell)
        if not self._searched_before and cut_around_wrong(work, anatomist, self._out_of_time(work)):
            self.progress.phase("measuring blocks and operators")
            anatomist = of_this_layout(anatomist.seen)
            anatomist.blocks(budget_s=max(least, _BLOCKS_UNTIL * budget - work.elapsed()), tell=tell)
        for each in anatomist.not_placed():
            work.note(each)
        probing = Probing(
            lab=work.lab,
            database=work.database,
            run_id=work.run_id,
            targets=work.targets,
            counts=explorer.measurer.counts,
            fresh=self.options.fresh,
            retry_failed=self.options.retry_failed,
            measure_new=not self._searched_before,
            stop=work.asked,
        )
        handovers, copies = HandoverProber(probing), CopyProber(probing)
        handovers.run(budget_s=max(least, _HANDOVERS_UNTIL * budget - work.elapsed()), tell=tell)
        # After what plans are made of: copies are only shown.
        copies.run(budget_s=max(0.0, _HANDOVERS_UNTIL * budget - work.elapsed()), tell=tell)
        anatomist.operators(budget_s=max(0.0, _OPERATORS_UNTIL * budget - work.elapsed()), tell=tell)
        skipped = anatomist.skipped + handovers.skipped + copies.skipped
        if skipped and not self._searched_before:
            work.note(f"{skipped} probes of blocks, operators and transfers did not fit the budget; raise --budget to have them all")
        return anatomist, handovers.fits()

    def _finish(self, work: Work, record: RunRecord, decider: Decider, proof: Proof, *, cut_short: bool) -> TuneOutcome:
        """Write the plan, if there is one, and the report in any case."""
        mattered = importance_text(decider.explorer.study)
        if mattered:
            work.note(mattered)
        verdict, trouble = decider.verdict(proof)
        if self.options.input_contract != "model":
            taken = "; ".join(map(str, work.subject.facts.taken)) or "no input in fewer bits"
            verdict += f" It takes {taken} (--input-contract {self.options.input_contract})."
        accuracy = decider.accuracy(proof.plan) if proof.plan else None
        certificate = decider.certificate(proof)
        plan_path = self.output if proof.plan else None
        report = (
            self.output / "report.html"
            if proof.plan
            else self.output.absolute().with_name(f"{self.output.absolute().name.removesuffix('.aivmm')}.report.html")
        )
        if proof.plan is not None:
            plan = work.emitter(proof.plan.draft.batch).write(
                proof.plan.draft,
                self.output,
                objective=self.options.objective,
                constraints=self.options.constraints,
                expected=expected(proof.plan),
                accuracy=accuracy,
                certificate=as_planned(certificate),
                fallbacks=decider.fallbacks(proof),
                alternatives=decider.alternatives(proof),
                verdict=verdict,
            )
            shown_plan = self.output if self._shown is None else self._shown[0]
            work.database.save_plan(record.id, plan.as_json(), str(shown_plan))
        result = summary(
            facts=work.subject.facts,
            given=self.options.model,
            proof=proof,
            objective=self.options.objective,
            plan_path=str(plan_path if self._shown is None else self._shown[0]),
            report=str(report if self._shown is None else self._shown[1]),
            predicted=decider.predicted(proof),
            certificate=certificate.as_json() if certificate else None,
            accuracy={
                "metric": accuracy.metric if accuracy else "cosine",
                "value": accuracy.value if accuracy else None,
                "limit": accuracy.limit if accuracy else self.cosine_limit,
                "data": "real" if work.subject.real_data else "synthetic",
            },
            counts=decider.explorer.measurer.counts,
            wall_s=work.elapsed(),
            verdict=verdict,
            trouble=trouble,
            objectives=self.options.objectives,
            nearest=decider.nearest(proof),
            study=decider.explorer.study,
            best={each.draft.name: decider.best_in(each, proof) for each in proof.alternatives},
            assumed=assumed(work),
        )
        result["at_once"] = [each.as_json(proof) for each in decider.tried]
        result["precision"] = self._precision(decider, proof)
        # The same request again continues a search that was cut short, and only proves one that was not.
        status = "interrupted" if cut_short else "complete" if proof.plan else "infeasible"
        record = _end(work, record, status, result=result)
        self._ended = True
        self.progress.phase("writing the report")
        write_report(work.database, record.id, report)
        return TuneOutcome(run=record, plan_path=plan_path, report_path=report, database=work.database.location, summary=result)

    def _precision(self, decider: Decider, proof: Proof) -> dict[str, Any] | None:
        """Return what lower precision gave, for `--json` and the report: of this run, or of the earlier one that searched."""
        scout = decider.explorer.scout
        if scout is None:  # no target takes the model whole, or the search was cut short before it
            return None
        if self._searched_before:
            found: Mapping[str, Any] = self._earlier_summary.get("precision") or {}
        else:
            found = precision_record(decider.work, decider.explorer, scout, proof, barred=decider.explorer.barred)
        tried = any(":" in each["precision"] for each in found.get("tried", ()))
        return {**found, "sentence": decider.precision_sentence(proof)} if tried else None

    def _tell_proof(self, what: str, state: RaceState | None) -> None:
        self.progress.detail(what + (f": round {state.round}" if state else ""))


def _end(work: Work, record: RunRecord, status: str, *, result: Mapping[str, Any] | None = None, finished: bool = True) -> RunRecord:
    """Store how far a run came, and return its record."""
    record = replace(
        record,
        status=status,  # type: ignore[arg-type]
        finished_at=datetime.now(UTC) if finished else None,
        summary=result or {},
        notes=(*work.subject.facts.notes, *work.subject.notes, *work.notes),
    )
    work.database.update_run(record)
    return record


def _dry_run(work: Work) -> dict[str, Any]:
    """Return what would be measured."""
    baselines = work.lab.baselines(work.targets, work.options.drive)
    structure = work.subject.structure
    return {
        "schema": 1,
        "dry_run": True,
        "model": {"path": work.options.model, "sha256": work.subject.facts.sha256, "category": asdict(work.subject.facts.category)},
        "inputs": [str(each) for each in work.subject.facts.inputs],
        "objective": work.options.objective,
        "constraints": [str(each) for each in work.constraints],
        "notes": [*work.subject.facts.notes, *work.subject.notes],
        "targets": [str(each) for each in work.targets],
        "unavailable": [str(each) for each in work.unavailable],
        "baselines": [each.name for each in baselines],
        "knobs": {
            str(target): [knob.name for knob in work.lab.knobs(target) if work.options.drive in knob.objectives] for target in work.targets
        },
        "batches": list(work.batches(work.targets)),
        "blocks": len(structure.blocks),
        "operators": len(structure.operators),
        "budget_s": work.options.budget_s,
        "on_top": on_top(work.options.budget_s, work.options.drive, cards=any(each.device.memory_bytes for each in work.targets)),
    }


def _stem(model: str) -> str:
    return model.removeprefix("demo:") if model.startswith("demo:") else Path(model).stem
