"""Tunes several models that one machine serves at once: each alone, then divisions of the machine, proven with all models running."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aivmm.errors import AivmmError, ModelError, UsageError
from aivmm.planner.workload import Demand, Division, Option, divide, rank
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.machine import BackgroundLoad, machine_cautions, measuring
from aivmm.reports.family import render_family
from aivmm.runtime.bundle import check_destination
from aivmm.runtime.cpu import usable_cores
from aivmm.runtime.family import Bucket, Family, Served
from aivmm.runtime.plan import Plan
from aivmm.tuner.families import combine
from aivmm.tuner.interrupt import Interrupts
from aivmm.tuner.ladder import Ladder
from aivmm.tuner.many import ManyOutcome, Prefixed, report_beside, summed
from aivmm.tuner.options import DEFAULT_COSINE, TuneOptions
from aivmm.tuner.progress import Progress
from aivmm.tuner.prove import TAIL_SAMPLES
from aivmm.tuner.serving import Seen, Trial, promise_of, seen_of
from aivmm.tuner.serving_words import Words
from aivmm.tuner.session import Session, TuneOutcome
from aivmm.tuner.shapes import Wanted
from aivmm.tuner.workload_file import Wish

_MOST_S = 40.0  # of a proof that needs many requests for a 99th percentile
_REPLICAS = (1, 2, 4, 8)
_MOST_TRIED, _MOST_PROVEN = 6, 3  # divisions
_SOME = 5.0, 10.0  # arrivals of a rate that a trial, and the proof, last for
_MOST_TRY_S = 10.0


@dataclass(slots=True)
class WorkloadTuner:
    """Several models on one machine. `options` holds what all tunings share."""

    options: TuneOptions
    wishes: Sequence[Wish]
    progress: Progress
    command: str = ""
    notes: list[str] = field(default_factory=list)
    ladders: dict[str, Ladder] = field(default_factory=dict)  # by model; filled by the tuning of each
    try_s: float = 2.5  # of serving, to choose
    prove_s: float = 5.0  # ... and to prove
    alone_s: float = 1.0  # ... and of each model alone, for comparison
    _cosine: float = DEFAULT_COSINE

    @property
    def output(self) -> Path:
        """Where the bundle goes."""
        return self.options.output or Path("workload.aivmm")

    @property
    def demands(self) -> list[Demand]:
        """What is asked for each model, what is served first in front."""
        return sorted((each.demand for each in self.wishes), key=lambda each: each.priority)

    def run(self) -> ManyOutcome:
        """Tune.

        Raises:
            AivmmError: what the user can fix.
        """
        started = time.perf_counter()
        if self.options.dry_run:
            raise UsageError("--dry-run says what is measured for one model", advice="ask for each model alone")
        check_destination(self.output)
        with tempfile.TemporaryDirectory(prefix=f"aivmm-{os.getpid()}-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            with Interrupts(self.progress.note) as interrupts:  # once is for all models, twice is twice
                outcomes = self._tune(folder, interrupts)
            missing = next(((wish, found) for wish, found in zip(self.wishes, outcomes, strict=False) if found.plan_path is None), None)
            if missing is not None:
                name = missing[0].demand.name
                why = f"{name} has no plan even alone. {missing[1].summary['verdict']}"
                return self._infeasible((why,), outcomes, None, (), started)
            reasons = tuple(filter(None, (self._words.impossible(each.demand) for each in self.wishes[: len(outcomes)])))
            if reasons:
                left = [each.demand.name for each in self.wishes[len(outcomes) :]]
                told = (f"{' and '.join(left)} {'were' if len(left) > 1 else 'was'} not tuned: the mix cannot be served.",) if left else ()
                return self._infeasible((*reasons, *told), outcomes, None, (), started)
            chosen, trials = self.divided(folder)
            if chosen.failed:
                return self._infeasible(self._words.why_not(chosen), outcomes, chosen, trials, started)
            return self._write(folder, outcomes, chosen, trials, started)

    @property
    def _words(self) -> Words:
        return Words(demands=self.demands, ladders=self.ladders)

    # --- each model alone

    def _tune(self, folder: Path, interrupts: Interrupts) -> list[TuneOutcome]:
        outcomes: list[TuneOutcome] = []
        share = self.options.budget_s / len(self.wishes)
        for index, wish in enumerate(self.wishes):
            name = wish.demand.name
            (folder / f"options-{index}").mkdir()
            replicas = _REPLICAS if wish.demand.rate_per_s is not None else (1,)
            ladder = self.ladders[name] = Ladder(name, folder / f"options-{index}", replicas)
            options = replace(
                self.options,
                model=wish.model,
                shapes=wish.shapes,
                dims=wish.dims,
                output=folder / f"alone-{index}.aivmm",
                budget_s=1.0 if interrupts.asked else share,
            )
            shown = (self.output, self.output / f"report-{index}.html")
            progress = Prefixed(self.progress, name)
            session = Session(options, progress, command=self.command, shown=shown, look=ladder.look, interrupts=interrupts)
            self._cosine = session.cosine_limit or DEFAULT_COSINE
            found = _run_of(name, session)
            outcomes.append(found)
            ladder.proven_s = _proven_s(found.summary)
            if found.plan_path is None or self._words.impossible(wish.demand):
                break
        return outcomes

    # --- all at once

    def divided(self, folder: Path) -> tuple[Trial, list[Trial]]:
        """Divide the machine, serve, and prove: return the best proof, and all that was tried before it, best first.

        Raises:
            UsageError: no division gives each model a place.
        """
        trials = self._try_divisions(folder)
        return self._confirm(folder, trials), trials

    def _units(self) -> dict[str, int]:
        return {device: units for ladder in self.ladders.values() for device, units in ladder.units.items()}

    def _options(self) -> list[Option]:
        return [option for ladder in self.ladders.values() for option in ladder.options]

    def _divisions(self, slowdown: Mapping[str, float] | None = None) -> list[Division]:
        """Return the divisions worth serving: the best two in which nothing shares a core, and the best in which two share one."""
        units, options = self._units(), self._options()
        found = list(divide(self.demands, options, units, slowdown=slowdown, count=2))
        level = 2
        while True:
            shared = divide(self.demands, options, units, level=level, slowdown=slowdown, count=1)
            found += shared
            if found or level > len(self.demands):
                return found
            level += 1

    def _try_divisions(self, folder: Path) -> list[Trial]:
        """Serve the divisions that are expected to be best; again with the slowdown that was seen, while a limit does not hold."""
        trials: list[Trial] = []
        waiting = self._divisions()
        if not waiting:
            raise UsageError("no division of this machine gives each model a place", advice="drop a model, or allow more targets")
        while waiting and len(trials) < _MOST_TRIED:
            division = waiting.pop(0)
            if any(_same(division, each.division) for each in trials):
                continue
            self.progress.phase(f"serving all models at once: {self._words.division(division)}")
            trials.append(self._serve(folder, division, min(_MOST_TRY_S, self._lasting_s(self.try_s, _SOME[0])), seed=self.options.seed))
            if not waiting and all(each.failed for each in trials):
                waiting = [each for each in self._divisions(_worst(trials)) if not any(_same(each, tried.division) for tried in trials)]
        return sorted(trials, key=self._merit)

    def _confirm(self, folder: Path, trials: Sequence[Trial]) -> Trial:
        """Prove on arrivals that chose nothing: the best division first, the next when its limits do not hold. Return the best proof."""
        proofs: list[Trial] = []
        for trial in trials:
            if proofs and (trial.error or len(proofs) == _MOST_PROVEN):
                continue
            self.progress.phase(f"proving with all models running: {self._words.division(trial.division)}")
            tails = [_tail_s(each, trial.division.options[each.name]) for each in self.demands]
            seconds = max(self._lasting_s(self.prove_s, _SOME[1]), *tails)
            proofs.append(self._serve(folder, trial.division, min(_MOST_S, seconds), seed=self.options.seed + 1000))
            if not proofs[-1].failed:
                break
        return min(proofs, key=self._merit)

    def _lasting_s(self, least_s: float, arrivals: float) -> float:
        """Return how long to serve, so that some requests of the lowest rate arrive."""
        return max(least_s, *(arrivals / each.rate_per_s for each in self.demands if each.rate_per_s is not None), 0.0)

    def _merit(self, trial: Trial) -> tuple[Any, ...]:
        """Return what makes a trial better than another one: smaller is better."""
        fastest = {demand.name: min(each.service_s for each in self.ladders[demand.name].options) for demand in self.demands}
        waits = sum(math.log(each.latency_s / fastest[name]) for name, each in trial.seen.items())
        return (bool(trial.error), rank(self.demands, trial.broken), waits)

    def _serve(self, folder: Path, division: Division, seconds: float, *, seed: int) -> Trial:
        bundle = folder / "serving.aivmm"
        shutil.rmtree(bundle, ignore_errors=True)
        self._combine(bundle, folder, division, {}, "")
        models = {}
        for demand in self.demands:
            ladder = self.ladders[demand.name]
            models[demand.name] = {
                "inputs": str(ladder.sample),
                "reference": str(ladder.reference),
                "rate_per_s": demand.rate_per_s,
                "callers": division.options[demand.name].replicas,
            }
        worker = Worker("serving all models")
        load_cores = 0.0
        try:
            with measuring():
                load = BackgroundLoad([worker.pid])
                answer = worker.call(
                    "serve",
                    limit_s=compile_limit_s(),
                    run_limit_s=run_limit_s() + seconds + len(models) * self.alone_s,
                    bundle=str(bundle),
                    models=models,
                    seconds=seconds,
                    alone_s=self.alone_s,
                    seed=seed,
                )
                load_cores = load.read([worker.pid])
        except (AivmmError, WorkerDied) as error:
            return Trial(division=division, seen={}, error=error.reason if isinstance(error, WorkerDied) else error.message)
        finally:
            worker.close()
        seen = {each.name: seen_of(each, answer["models"][each.name], self._cosine) for each in self.demands}
        return Trial(division=division, seen=seen, load_cores=load_cores)

    # --- what comes of it

    def _combine(self, destination: Path, folder: Path, division: Division, seen: Mapping[str, Seen], verdict: str) -> None:
        bundles, adjust, models = {}, {}, []
        for number, demand in enumerate(self.demands):
            option, plan = division.options[demand.name], f"plans/{number}.json"
            bundles[plan] = self.ladders[demand.name].bundles[option.name]
            adjust[plan] = _adjusted(option, seen.get(demand.name), self._words.text(option, seen.get(demand.name)))
            promise = promise_of(demand, seen.get(demand.name))
            models.append(Served(name=demand.name, buckets=[Bucket(name="", plan=plan)], promise=promise))
        family = Family(
            kind="workload",
            created_by=f"aivmm {version('aivmm')}",
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            models=models,
            verdict=verdict,
            files=dict.fromkeys(bundles, "0" * 64),
        )
        with tempfile.TemporaryDirectory(prefix="gathered-", dir=folder) as gathered:  # all weights once more, for each division
            combine(destination, family, bundles, Path(gathered), adjust=adjust)

    def _write(self, folder: Path, outcomes: Sequence[TuneOutcome], chosen: Trial, trials: Sequence[Trial], started: float) -> ManyOutcome:
        asked = any(each.latency_s or each.p99_s or each.rate_per_s for each in self.demands)
        held = "every limit holds" if asked else "nobody asked for a limit"
        lines = (f"{len(self.demands)} models served at once on {self._words.machine()}: {held}.", *self._words.told(chosen))
        verdict = " ".join(lines)
        self._combine(self.output, folder, chosen.division, chosen.seen, verdict)
        links = {}
        for index, (wish, found) in enumerate(zip(self.wishes, outcomes, strict=True)):
            links[wish.demand.name] = f"report-{index}.html"
            self._copied(found.report_path, self.output / links[wish.demand.name])
        report = self.output / "report.html"
        use = f"import aivmm; engines = aivmm.load_plan({str(self.output)!r}); engines[{self.demands[0].name!r}].run(inputs)"
        return self._outcome(self.output, report, lines, outcomes, chosen, trials, links, started, use)

    def _infeasible(
        self, why: Sequence[str], outcomes: Sequence[TuneOutcome], chosen: Trial | None, trials: Sequence[Trial], started: float
    ) -> ManyOutcome:
        told = self._words.told(chosen) if chosen is not None and chosen.seen else ()
        lines = ("This machine cannot serve this workload.", *why, *told)
        report = report_beside(self.output)
        links = {}
        for index, (wish, found) in enumerate(zip(self.wishes, outcomes, strict=False)):
            beside = report.with_name(f"{report.name.removesuffix('.html')}-{index}.html")
            self._copied(found.report_path, beside)
            links[wish.demand.name] = beside.name
        return self._outcome(None, report, lines, outcomes, chosen, trials, links, started, "")

    @staticmethod
    def _copied(source: Path, destination: Path) -> None:
        try:
            shutil.copyfile(source, destination)
        except OSError as error:
            raise UsageError(
                f"cannot write the report to {destination}: {error.strerror or error}", advice="choose another with -o DIR"
            ) from error

    def _outcome(
        self,
        plan: Path | None,
        report: Path,
        lines: tuple[str, ...],
        outcomes: Sequence[TuneOutcome],
        chosen: Trial | None,
        trials: Sequence[Trial],
        links: Mapping[str, str],
        started: float,
        use: str,
    ) -> ManyOutcome:
        verdict = " ".join(lines)
        if chosen is not None:
            cautions = machine_cautions(chosen.load_cores, usable_cores())
            self.notes += [f"while all models were served, {each.message}: {each.advice}" for each in cautions]
        try:
            report.write_text(render_family(self._words.overview(chosen, lines, links, self.notes)), encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"cannot write the report to {report}: {error.strerror or error}", advice="choose another with -o DIR"
            ) from error
        summary = self._words.summary(
            plan=None if plan is None else str(plan),
            report=str(report),
            chosen=chosen,
            tried=trials,
            alone=self._alone(outcomes, plan, report, links),
            probes=summed(outcomes),
            notes=self.notes,
            wall_s=time.perf_counter() - started,
            verdict=verdict,
        )
        notes = tuple(self.notes)
        return ManyOutcome(plan_path=plan, report_path=report, summary=summary, lines=lines, outcomes=tuple(outcomes), notes=notes, use=use)

    def _alone(
        self, outcomes: Sequence[TuneOutcome], plan: Path | None, report: Path, links: Mapping[str, str]
    ) -> dict[str, Mapping[str, Any]]:
        """Return what each model's own tuning gave, with the report where it lies now, and no plan where no bundle was written."""
        found: dict[str, Mapping[str, Any]] = {}
        for wish, each in zip(self.wishes, outcomes, strict=False):
            name = wish.demand.name
            kept = each.summary["plan"]
            shown = str(report.with_name(links[name])) if name in links else None
            found[name] = {**each.summary, "report": shown, "plan": kept if plan is not None or kept is None else {**kept, "path": None}}
        return found


def _run_of(name: str, session: Session) -> TuneOutcome:
    """Tune one model of several.

    Raises:
        AivmmError: as `Session.run`; what is wrong with this model's file, or with what is said of it, says which one it is.
    """
    try:
        found = session.run()
    except (ModelError, UsageError) as error:
        raise type(error)(f"{name}: {error.message}", advice=error.advice) from error
    assert isinstance(found, TuneOutcome)
    return found


def require_alone(options: TuneOptions, shapes: Sequence[Wanted]) -> None:
    """Raise UsageError when an option is given that speaks of one model."""
    given = {
        "--dim or --shape": len(shapes) > 1 or bool(shapes[0].dims) or bool(shapes[0].shapes),
        "--inputs": options.inputs is not None,
        "--dataset": options.dataset is not None,
        "--metric": options.metric is not None,
        "--batch": bool(options.batches),
        "--min-segments": options.min_segments > 1,
        "--objective": options.objective != "latency",
        "--constraint": bool(options.constraints),
        "--prefer": bool(options.prefer),
        "--other-shapes": options.other_shapes != "refuse",
        "--input-contract": options.input_contract != "model",
        "--cut-around": bool(options.cut_around),
    }
    odd = next((name for name, there in given.items() if there), None)
    if odd is not None:
        raise UsageError(f"{odd} is for one model, not for a workload", advice="say in the workload file what each model is to reach")


def _proven_s(summary: Mapping[str, Any]) -> float:
    """Return the shortest call that the proof of a tuning timed, of its plan or of a baseline; infinite where it says none."""
    proven = [summary.get("measured"), *summary.get("baselines", ())]
    return min((each["least_s"] for each in proven if each and each.get("least_s")), default=math.inf)


def _same(one: Division, other: Division) -> bool:
    return {name: each.name for name, each in one.options.items()} == {name: each.name for name, each in other.options.items()}


def _worst(trials: Sequence[Trial]) -> dict[str, float]:
    """Return the largest slowdown that each model was seen to suffer."""
    found: dict[str, float] = {}
    for trial in trials:
        for name, each in trial.seen.items():
            found[name] = max(found.get(name, 1.0), each.slowdown)
    return found


def _tail_s(demand: Demand, option: Option) -> float:
    """Return how long to serve for as many requests as a limit on the 99th percentile needs; 0 without one."""
    if demand.p99_s is None:
        return 0.0
    return 1.2 * TAIL_SAMPLES / (demand.rate_per_s or option.replicas / option.service_s)


def _adjusted(option: Option, seen: Seen | None, verdict: str) -> Callable[[Plan], Plan]:
    """Return what gives a plan its replicas, its callers, and what was seen of it in company."""

    def adjust(plan: Plan) -> Plan:
        stages = [each.replaced(replicas=option.replicas) for each in plan.stages]
        update: dict[str, Any] = {"stages": stages, "callers": option.replicas, "verdict": verdict}
        if seen is not None and seen.latency_s < math.inf:
            update["expected"] = dict(promise_of(Demand(name=option.model), seen).seen)
        return plan.replaced(**update)

    return adjust
