"""The proof: each finalist and each baseline as a bundle, loaded by the engine in a worker of its own, and raced on fresh samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from aivmm.errors import AivmmError
from aivmm.planner.candidates import Draft
from aivmm.planner.choice import Misfit, Option, alternatives, as_good, misfit, preferred
from aivmm.planner.constraints import ACCURACY, Constraint, Violation, check, unjudged
from aivmm.planner.objectives import OBJECTIVES, Objective
from aivmm.planner.records import ProofRecord
from aivmm.probes import conditions
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.compare import Comparison, cautions, compare, median_interval, round_medians
from aivmm.probes.machine import BackgroundLoad, measuring, wait_until_quiet
from aivmm.probes.operations import BATCH_BELOW_S
from aivmm.probes.race import Contestant, RaceState, block_s, by_of, leader_of, race, runs_single, versus
from aivmm.probes.records import Caution, Samples
from aivmm.runtime.target import Target
from aivmm.tuner.joules import ENERGY, absent, counts_cards_only, device_memory, energy_metrics, why_no_energy
from aivmm.tuner.judging import Judge, Metric
from aivmm.tuner.strays import explained, read_stages
from aivmm.tuner.subject import Further

# Seconds of racing: as many as the entrants' own speed asks for, within these. Loading, the tail and the report come on top.
_LEAST_S, _MOST_S = 4.0, 6.5
_ROUNDS = 20
_WORTH_CHANGING = 0.97  # two processes that run the very same differ by as much: a smaller gain may be gone in the next one
_SWITCH_S = 0.03  # between two workers: until the one before has stopped spinning
TAIL_SAMPLES = 500  # below this a 99th percentile is not given
TAIL_S = 3.0
_LOAD_AGAIN_S = 5.0  # the proof may take 30 s: what loads slower is not loaded again to see what a cache saves
TAIL_ASKED_S = 40.0  # when a constraint asks for it


@dataclass(slots=True)
class Entrant:
    """A written bundle in the proof."""

    draft: Draft
    role: str  # "candidate" or "baseline"
    bundle: Path
    size_bytes: int
    sample: Path
    reference: Path
    samples: Sequence[Path] = ()
    references: Sequence[Path] = ()
    extras: Sequence[Path | None] = ()  # what the user's data set says of `samples`, and then of `sample`
    judged: list[dict[str, float]] = field(default_factory=list)  # accuracy, sample by sample
    worker: Worker | None = None
    contestant: Contestant | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str = ""  # why it cannot be the plan; "" when nothing is against it
    fatal: bool = False  # it could not run at all
    choosing: Samples | None = None  # of the first race
    confirmed: Samples | None = None  # of the second, which chose nothing
    absent: dict[str, str] = field(default_factory=dict)  # what could not be measured of it, and why
    cards_only: bool = False  # the energy that counts is that of its cards: nothing counts the host's
    strays: str = ""  # which nodes its accelerators leave to the CPU, and what they cost; "" where there are none
    ends: tuple[str, ...] = ()  # objectives in which nothing that was searched is better: proven whatever its speed

    @property
    def running(self) -> bool:
        """True while it can be measured."""
        return self.contestant is not None and self.contestant.failed is None

    @property
    def eligible(self) -> bool:
        """True when it may be the plan, as far as accuracy goes."""
        return self.running and not self.problem


@dataclass(slots=True)
class Proof:
    """What the proof found. `plan` is what to emit; None when nothing meets the constraints."""

    entrants: list[Entrant]
    plan: Entrant | None = None
    best_baseline: Entrant | None = None
    beaten: bool = False  # a candidate of the search beat the best eligible baseline beyond noise
    challenger: Comparison | None = None  # the best candidate against the best baseline
    violations: dict[str, tuple[Violation, ...]] = field(default_factory=dict)  # by draft name
    cautions: tuple[Caution, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)  # what could not be measured of the plan, and why
    alternatives: list[Entrant] = field(default_factory=list)  # what the plan is traded for where another objective counts
    misfit: Misfit | None = None  # why there is no plan, where limits are the reason

    def records(self) -> list[ProofRecord]:
        """Return what the database keeps."""
        return [self._record(each) for each in self.entrants]

    def against(self, entrant: Entrant) -> Comparison | None:
        """Compare the plan's time per sample with an entrant's; what one process and another differ by counts as noise."""
        if self.plan is None or self.plan.confirmed is None or entrant.confirmed is None:
            return None
        assert self.plan.contestant and entrant.contestant
        everyone = [each.contestant for each in self.entrants if each.contestant is not None and each.confirmed is not None]
        return versus(self.plan.contestant, entrant.contestant, field=everyone)

    def _record(self, entrant: Entrant) -> ProofRecord:
        found = self.against(entrant) if entrant is not self.plan else None
        first = entrant.draft.pieces[0]
        against = "; ".join(each.sentence for each in self.violations.get(entrant.draft.name, ()))
        known: dict[str, Any] = {}
        if found is not None:
            # The other way round: how many times the plan's time this one takes.
            known = {"ratio": 1 / found.ratio, "ratio_low": 1 / found.high, "ratio_high": 1 / found.low, "verdict": found.verdict}
        return ProofRecord(
            name=entrant.draft.name,
            role="plan" if entrant is self.plan else "baseline" if entrant.role == "baseline" else "candidate",
            target=entrant.draft.targets,
            config=first.config,
            batch=entrant.draft.batch,
            callers=entrant.draft.callers,
            eligible=entrant.eligible and not against,
            why_not=entrant.problem or against or (entrant.contestant.dropped if entrant.contestant else ""),
            samples=entrant.confirmed or entrant.choosing,
            metrics=entrant.metrics,
            cautions=(
                *(cautions(entrant.confirmed) if entrant.confirmed else ()),
                *(entrant.contestant.cautions if entrant.contestant else ()),
                *self.cautions,
            ),
            **known,
        )


class Prover:
    """Loads entrants, races them twice (to choose, then to confirm on fresh samples), and decides."""

    def __init__(
        self,
        entrants: Sequence[Entrant],
        *,
        constraints: Sequence[Constraint],
        cosine_limit: float | None,
        seed: int,
        tell: Callable[[str, RaceState | None], None],
        forced: bool = False,
        metric: Metric | None = None,
        further: Callable[[], Further] | None = None,
        objectives: Sequence[Objective] = (OBJECTIVES["latency"],),
        prefer: Sequence[str] = (),
    ) -> None:
        self._proof = Proof(entrants=list(entrants))
        if any(each.name == "energy" for each in objectives) and counts_cards_only(self._targets()):
            for each in entrants:
                each.cards_only = True
        self._constraints = constraints
        self._seed = seed
        self._tell = tell
        self._forced = forced
        self._judge_outputs = Judge(cosine_limit=cosine_limit, metric=metric, further=further, constraints=constraints)
        self._objectives, self._prefer = objectives, prefer
        wanted = {constraint.metric for constraint in constraints} | {each.metric for each in objectives}
        self._asks_tail, self._asks_energy = "p99" in wanted, not wanted.isdisjoint(ENERGY)
        self._asks_compile = not wanted.isdisjoint({"compile", "first_inference"})

    def run(self) -> Proof:
        """Prove. The workers are ended in any case."""
        entrants = self._proof.entrants
        try:
            self._tell("loading the finalists and the baselines", None)
            # Two at a time to save time, but one at a time where it counts what loading takes.
            with ThreadPoolExecutor(max_workers=1 if self._asks_compile else 2) as pool:
                list(pool.map(self._load, entrants))
            contestants = [each.contestant for each in entrants if each.contestant is not None]
            if contestants:
                self._race(contestants)
                self._decide()
        finally:
            for each in entrants:
                if each.worker is not None:
                    each.worker.close()
        return self._proof

    def _load(self, entrant: Entrant) -> None:
        entrant.worker = Worker(f"proof of {entrant.draft.name}")
        try:
            answer = entrant.worker.call(
                "load_bundle",
                limit_s=compile_limit_s(),
                run_limit_s=run_limit_s(),
                name="engine",
                bundle=str(entrant.bundle),
                inputs=str(entrant.sample),
                reference=str(entrant.reference),
            )
            accuracy, problem = self._judge_outputs.proof(entrant, answer)
        except (WorkerDied, AivmmError) as error:
            entrant.problem = f"{error.reason}" if isinstance(error, WorkerDied) else error.message
            entrant.fatal = True
            return
        entrant.metrics = {
            "load_s": answer["load_s"],
            "compile_s": answer["compile_s"],
            "first_inference_s": answer["first_inference_s"],
            "size_bytes": float(entrant.size_bytes),
            **accuracy,
        }
        held, why = device_memory(entrant.worker.pid, _targets_of(entrant))
        if held is not None:
            entrant.metrics["device_memory_bytes"] = float(held)
        else:
            entrant.absent["device_memory"] = why
        entrant.problem = entrant.problem or problem
        if any("fallback" in event for event in answer["events"]):
            entrant.problem = "; ".join(answer["events"])
        expected = answer["first_inference_s"]
        entrant.contestant = Contestant(
            "engine",
            entrant.worker,
            batch=entrant.draft.batch,
            callers=entrant.draft.callers,
            expected_s=expected,
            keep=entrant.role == "baseline",
            single=runs_single(_targets_of(entrant), entrant.draft.all_configs),
        )

    def _race(self, contestants: list[Contestant]) -> None:
        pids = [each.worker.pid for each in contestants]
        load, before, cards = BackgroundLoad(pids), conditions.read(self._targets()), conditions.CardWatch(self._targets())
        finalists = [each for each in self._proof.entrants if each.role == "candidate" and each.eligible]
        next_round = self._choose(finalists) if len(finalists) > 1 else 0
        # ... then, on samples that chose nothing, to confirm.
        for entrant in self._proof.entrants:
            entrant.choosing = entrant.contestant.samples() if entrant.contestant else None
        for each in contestants:
            each.durations.clear()
            each.rounds.clear()
        race(
            contestants,
            budget_s=_racing_s([each for each in contestants if each.racing]),
            least_rounds=10,
            most_rounds=200,
            seed=self._seed + 1,
            first_round=next_round,
            tell=cards.beside(lambda state: self._tell("proving the plan against the baselines", state)),
        )
        load_cores, after = load.read(pids), conditions.read(self._targets())
        self._proof.cautions = (*conditions.cautions(before, after, load_cores=load_cores), *cards.cautions())
        for entrant in self._proof.entrants:
            if entrant.worker is not None and "device_memory_bytes" in entrant.metrics:  # arenas grow while they run
                held, _ = device_memory(entrant.worker.pid, _targets_of(entrant)) if entrant.running else (None, "")
                entrant.metrics["device_memory_bytes"] = max(entrant.metrics["device_memory_bytes"], float(held or 0))
        around = {**before.metrics("before"), **cards.metrics(), **after.metrics("after")}
        for entrant in self._proof.entrants:
            if entrant.contestant is None:
                continue
            if entrant.contestant.failed is not None:
                entrant.problem, entrant.fatal = entrant.contestant.failed.reason, True
                continue
            entrant.confirmed = entrant.contestant.samples()
            entrant.metrics |= around
            self._measure(entrant, entrant.confirmed)

    def _targets(self) -> set[Target]:
        return {target for each in self._proof.entrants for target in _targets_of(each)}

    def _choose(self, finalists: Sequence[Entrant]) -> int:
        """Race the finalists, and drop all but the fastest of those that keep the constraints; return the next round's number."""
        contestants = [each.contestant for each in finalists if each.contestant is not None]
        next_round = race(
            contestants,
            budget_s=0.6 * _racing_s(contestants),
            least_rounds=6,
            most_rounds=60,
            seed=self._seed,
            tell=lambda state: self._tell("choosing among the finalists", state),
        )
        for each in finalists:
            self._measure(each, each.contestant.samples() if each.contestant else None)
        running = [each for each in finalists if each.running]
        serving = self._serving([each for each in running if not self._violations(each)])
        chosen = leader_of([each.contestant for each in serving if each.contestant]) or leader_of(contestants)
        ends = [each.contestant for each in running if each.ends]
        for contestant in contestants:
            if contestant is not chosen and contestant not in ends:
                contestant.dropped = contestant.dropped or "another candidate was faster, or kept the constraints"
        return next_round

    def _option(self, entrant: Entrant) -> Option:
        return Option(metrics=constraint_metrics(entrant), targets=tuple(map(str, entrant.draft.all_targets)))

    def _serving(self, entrants: Sequence[Entrant]) -> list[Entrant]:
        """Return those on the hardware wanted most that no other one beats in what the first objective counts; of speed the races judge."""
        first = self._objectives[0]
        if first.name == "latency" and len(self._objectives) > 1:  # where callers and batches are tried too, a call of one is what counts
            least = min((each.draft.batch for each in entrants), default=1)
            entrants = [each for each in entrants if each.draft.callers == 1 and each.draft.batch == least] or list(entrants)
        options = {number: self._option(each) for number, each in enumerate(entrants)}
        wanted = preferred(options, self._prefer)
        if first.name not in ("latency", "throughput"):
            wanted = as_good({number: options[number] for number in wanted}, first)
        return [entrants[number] for number in wanted]

    def _violations(self, entrant: Entrant) -> tuple[Violation, ...]:
        targets = list(map(str, entrant.draft.all_targets))
        return check(self._constraints, constraint_metrics(entrant), targets=targets)

    def _measure(self, entrant: Entrant, samples: Samples | None) -> None:
        if samples is None or entrant.contestant is None:
            return
        entrant.metrics |= {
            "latency_s": samples.median_s * entrant.draft.callers,
            "throughput_per_s": entrant.draft.batch / samples.median_s,
            "peak_memory_bytes": float(entrant.contestant.memory_bytes),
        }

    def _decide(self) -> None:
        """Choose the plan; again without it, should it die while its tail is measured."""
        measured = [each for each in self._proof.entrants if each.eligible and each.confirmed is not None]
        if self._asks_tail:
            for each in measured:
                self._tail(each)
        for each in measured:
            if self._asks_energy and each.eligible:
                self._count_energy(each)
            self._judge(each)
        while True:
            plan = self._pick()
            self._proof.plan = plan
            if plan is None or (self._tail(plan) and self._count_energy(plan) and self._holds_on_all(plan)):
                break
        if plan is None:
            self._proof.misfit = misfit([self._option(each) for each in measured if each.eligible], self._constraints)
        if plan is not None:
            self._keep_alternatives(plan)
            beside = self._proof.best_baseline
            if beside is not None and beside is not plan:
                self._count_energy(beside)
            self._load_again(plan)
            self._explain_strays(plan)
            self._proof.absent |= plan.absent | absent(_targets_of(plan), plan.metrics)

    def _holds_on_all(self, plan: Entrant) -> bool:
        """Judge the plan on all that was held out; False where it is over a limit there, or died of it."""
        if not self._judge_outputs.on_all(plan, lambda what: self._tell(what, None)):
            return plan.eligible
        self._judge(plan)
        return self._may_be_plan(plan)

    def _load_again(self, plan: Entrant) -> None:
        """Measure how long the plan takes to load once its compiled stages are in the engine's cache. What goes wrong costs this figure."""
        assert plan.worker is not None
        if plan.metrics["load_s"] > _LOAD_AGAIN_S:
            plan.absent["load from cache"] = f"loading takes {plan.metrics['load_s']:.0f} s, and that twice more"
            return
        self._tell("loading the plan from the cache of compiled stages", None)
        try:
            answer = plan.worker.call("load_cached", limit_s=2 * compile_limit_s(), bundle=str(plan.bundle))
        except (WorkerDied, AivmmError) as error:
            plan.absent["load from cache"] = str(error)
            return
        if answer["found"]:
            plan.metrics["load_cached_s"] = answer["load_s"]
        else:
            targets = ", ".join(sorted(map(str, _targets_of(plan))))
            plan.absent["load from cache"] = "; ".join(answer["problems"]) or f"nothing compiled for {targets} can be kept"

    def _explain_strays(self, plan: Entrant) -> None:
        """Find out what the nodes cost that the plan's accelerators leave to the CPU. What goes wrong costs this figure."""
        if all(target.device.kind == "cpu" for target in _targets_of(plan)):
            return
        assert plan.worker is not None
        try:
            stages = read_stages(plan.bundle)
            found = explained(plan.worker, stages, plan.draft.pieces, plan.bundle, plan.sample, plan.bundle.parent)
        except (WorkerDied, AivmmError) as error:
            plan.absent["nodes on the CPU"] = str(error)
            return
        plan.metrics |= found.get("metrics", {})
        plan.strays = found.get("sentence", "")

    def _keep_alternatives(self, plan: Entrant) -> None:
        """Keep what no other one beats in all objectives at once, where there are several."""
        entrants = self._proof.entrants
        if len(self._objectives) > 1:
            allowed = {at: self._option(each) for at, each in enumerate(entrants) if self._may_be_plan(each)}
            self._proof.alternatives = [entrants[at] for at in alternatives(allowed, entrants.index(plan), self._objectives)]

    def _may_be_plan(self, entrant: Entrant) -> bool:
        return entrant.eligible and entrant.confirmed is not None and entrant.draft.name not in self._proof.violations

    def _count_energy(self, entrant: Entrant) -> bool:
        """Count the energy of one sample, where a counter tells. False when it died of it."""
        if entrant.contestant is None or any("energy_j" in name for name in entrant.metrics):
            return True
        try:
            entrant.metrics |= energy_metrics(entrant.contestant, _targets_of(entrant))
        except (WorkerDied, AivmmError) as error:
            entrant.problem, entrant.fatal = str(error), True
            entrant.contestant.failed = WorkerDied(entrant.problem)
        return not entrant.fatal

    def _judge(self, entrant: Entrant) -> None:
        """Note which constraints an entrant breaks, or cannot be shown to keep."""
        metrics, targets = constraint_metrics(entrant), list(map(str, entrant.draft.all_targets))
        found = self._violations(entrant)
        for missing in unjudged(self._constraints, metrics, targets=targets):
            why = "there is no output that is a classifier's" if "agreement" in missing.metric else "there was no time to measure it"
            if missing.metric in ENERGY:
                why = why_no_energy(_targets_of(entrant)) or why
            why = entrant.absent.get(missing.metric, why)
            sentence = f"{missing.metric} is not known ({why}), so {missing} is not shown to hold"
            found = (*found, Violation(constraint=missing, value=math.nan, percent=math.inf, sentence=sentence))
        if found:
            self._proof.violations[entrant.draft.name] = found

    def _pick(self) -> Entrant | None:
        proof = self._proof
        allowed = self._serving([each for each in proof.entrants if self._may_be_plan(each)])
        baselines = [each for each in allowed if each.role == "baseline"]
        candidates = [each for each in allowed if each.role == "candidate"]
        best = min(candidates, key=_time, default=None)
        if self._forced:
            return best  # a cut was asked for: an uncut plan is no answer, however fast
        proof.best_baseline = _unbeaten(baselines)
        proof.challenger, proof.beaten = None, False
        if best is not None and proof.best_baseline is not None:
            proof.challenger = _versus(best, proof.best_baseline)
            proof.beaten = proof.challenger.verdict == "faster" and proof.challenger.ratio <= _WORTH_CHANGING
        if best is not None and (proof.best_baseline is None or proof.beaten):
            return best
        # A device that only OpenVINO resolves at load is the last choice among equals: a plan should say where it runs.
        named = _unbeaten([each for each in baselines if not each.draft.targets.endswith(":AUTO")])
        if named is not None and proof.best_baseline is not None and _versus(named, proof.best_baseline).verdict != "slower":
            return named
        return proof.best_baseline

    def _tail(self, entrant: Entrant) -> bool:
        """Run on until there are enough samples for a 99th percentile, where that takes seconds only. False when it died of it."""
        contestant = entrant.contestant
        if contestant is None or entrant.confirmed is None or "p99_s" in entrant.metrics:
            return True
        if entrant.draft.callers > 1:
            if self._asks_tail:
                entrant.absent["p99"] = f"with {entrant.draft.callers} callers the time between answers is measured, not that of a call"
            return True
        typical = entrant.confirmed.median_s
        # Below 100 µs the durations of a race are means of several calls, and a mean has no tail.
        durations = list(entrant.confirmed.timed_s) if typical >= BATCH_BELOW_S else []
        missing = TAIL_SAMPLES - len(durations)
        if missing > 0 and typical * missing <= (TAIL_ASKED_S if self._asks_tail else TAIL_S):
            for other in self._proof.entrants:
                if other.worker is not None and other is not entrant and other.worker.pid:
                    wait_until_quiet(other.worker.pid)
            try:
                with measuring():
                    answer = contestant.worker.call(
                        "timed", limit_s=60 + TAIL_ASKED_S, name="engine", seconds=0.0, least=missing, each=True
                    )
            except (WorkerDied, AivmmError) as error:
                entrant.problem = error.reason if isinstance(error, WorkerDied) else error.message
                entrant.fatal = True
                contestant.failed = WorkerDied(entrant.problem)
                return False
            durations += answer["durations"]
        if len(durations) >= TAIL_SAMPLES:
            entrant.metrics["p99_s"] = Samples(timed_s=tuple(durations)).quantile_s(0.99)
        return True


def constraint_metrics(entrant: Entrant) -> dict[str, float]:
    """Return an entrant's metrics under the names that constraints use."""
    names = {
        "latency": "latency_s",
        "p99": "p99_s",
        "throughput": "throughput_per_s",
        "memory": "peak_memory_bytes",
        "device_memory": "device_memory_bytes",
        "energy": "card_energy_j" if entrant.cards_only else "energy_j",
        "power": "power_w",
        "size": "size_bytes",
        "compile": "compile_s",
        "first_inference": "first_inference_s",
        **dict(zip(ACCURACY, ACCURACY, strict=True)),
    }
    return {ours: entrant.metrics[theirs] for ours, theirs in names.items() if theirs in entrant.metrics}


def _targets_of(entrant: Entrant) -> set[Target]:
    return set(entrant.draft.all_targets)


def _racing_s(contestants: Sequence[Contestant]) -> float:
    """Return how long to race: so many rounds as make an interval, within limits that keep the whole proof below 30 s."""
    return min(_MOST_S, max(_LEAST_S, _ROUNDS * sum(block_s(each.expected_s, each.callers) + _SWITCH_S for each in contestants)))


def call_s(entrant: Entrant) -> float:
    """Return the median duration of one call: with several callers the time between two completions holds one of each."""
    assert entrant.confirmed
    return entrant.confirmed.median_s * entrant.draft.callers


def interval_s(entrant: Entrant) -> tuple[float, float]:
    """Return the 95 % interval of the median duration of one call."""
    assert entrant.confirmed
    low, high = median_interval(entrant.confirmed)
    return low * entrant.draft.callers, high * entrant.draft.callers


def _time(entrant: Entrant) -> float:
    """Return seconds per sample: the median over rounds. A slow round holds fewer calls, and must not weigh less for that."""
    assert entrant.confirmed
    return float(median(round_medians(entrant.confirmed).values())) / entrant.draft.batch


def _versus(a: Entrant, b: Entrant) -> Comparison:
    """Compare by the noise of rounds alone.

    This decides what is emitted, while `Proof.against` says what may be claimed: of two that a few percent set apart the one that was
    faster in round after round is the better bet, even where another pair of processes might turn them around.
    """
    assert a.confirmed and b.confirmed and a.contestant and b.contestant
    return compare(a.confirmed, b.confirmed, scale=b.draft.batch / a.draft.batch, by=by_of(a.contestant, b.contestant))


def _unbeaten(entrants: Sequence[Entrant]) -> Entrant | None:
    """Return the fastest of those that no other one beats when compared round by round."""
    unbeaten = [each for each in entrants if not any(_versus(each, other).verdict == "slower" for other in entrants if other is not each)]
    return min(unbeaten or entrants, key=_time, default=None)
