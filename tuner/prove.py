"""The proof: each finalist and each baseline as a bundle, loaded by the engine in a worker of its own, and raced on fresh samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from threading import BoundedSemaphore

from aivmm.errors import AivmmError
from aivmm.planner.choice import Option, alternatives, as_good, distance, misfit, preferred
from aivmm.planner.constraints import ACCURACY, TARGETS, Constraint, Violation, check, unjudged
from aivmm.planner.objectives import OBJECTIVES, Objective, counts_rate
from aivmm.planner.placement import device_of
from aivmm.probes import conditions
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.machine import BackgroundLoad, measuring, wait_until_quiet
from aivmm.probes.race import Contestant, RaceState, block_s, far_behind, leader_of, race, runs_single, undecided
from aivmm.probes.records import Samples
from aivmm.probes.timer import BATCH_BELOW_S
from aivmm.runtime.cpu import usable_cores
from aivmm.runtime.target import Target
from aivmm.tuner.joules import COUNTED, ENERGY, absent, asks_for_energy, counts_cards_only, device_memory, energy_metrics, why_no_energy
from aivmm.tuner.judging import Judge, Metric
from aivmm.tuner.proof import Entrant, Proof, by_rounds, constraint_metrics, sample_s, targets_of, typical_s, unbeaten
from aivmm.tuner.strays import explained, read_stages
from aivmm.tuner.subject import Further

# Seconds of racing: as many as the entrants' own speed asks for, within these. Loading, the tail and the report come on top.
_LEAST_S, _MOST_S = 4.0, 6.5
_ROUNDS = 20
_SPEED = ("latency", "throughput")  # objectives and limits of which a race tells all
_LOADS, _MOST_LOADS, _CORES_TO_LOAD = 2, 6, 4  # entrants that are loaded at once: two, or as many as have so many cores each
_ROUNDS_TO_PROVE = 10  # at least, where there is time for them
_SETTLE_S = 12.0  # on top of it, for those alone that may be the plan and are not told apart
_ROUNDS_TO_TELL, _MOST_TO_TELL_S = 5, 3.0  # of the reference, before it rests: whichever comes first
_WORTH_CHANGING = 0.97  # two processes that run the very same differ by as much: a smaller gain may be gone in the next one
_SWITCH_S = 0.03  # between two workers: until the one before has stopped spinning
TAIL_SAMPLES = 500  # below this a 99th percentile is not given
TAIL_S = 3.0
_LOAD_AGAIN_S = 5.0  # what loads slower is not loaded again, to see what a cache saves
TAIL_ASKED_S = 40.0  # when a constraint asks for it


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
        reference: str | None = None,
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
        self._objectives, self._prefer, self._reference = objectives, prefer, reference
        self._rate = counts_rate(objectives, constraints)
        wanted = {constraint.metric for constraint in constraints} | {each.metric for each in objectives}
        self._asks_tail, self._asks_energy = "p99" in wanted, not wanted.isdisjoint(ENERGY)
        # What is forced is the plan however slow it is; and the slowest may draw the least, or be the only one that keeps a limit.
        limited = {constraint.metric for constraint in constraints} - {*_SPEED, *ACCURACY, TARGETS}
        self._may_win_slow = forced or objectives[0].name not in _SPEED or bool(limited)
        self._asks_compile = not wanted.isdisjoint({"compile", "first_inference"})
        self._cards: dict[str, BoundedSemaphore] = {}
        self._ready = count(1)

    def run(self) -> Proof:
        """Prove. The workers are ended in any case."""
        entrants = self._proof.entrants
        try:
            self._tell_loading(0)
            self._cards = {card: BoundedSemaphore(_LOADS) for each in entrants for card in _cards_of(each)}
            # Several at a time to save time, but one at a time where it counts what loading takes.
            with ThreadPoolExecutor(max_workers=1 if self._asks_compile else loads_at_once(usable_cores())) as pool:
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
        # What looks for its algorithms by timing them on a card finds others where many do: of those two at a time on each.
        with ExitStack() as held:
            for card in _cards_of(entrant):
                held.enter_context(self._cards[card])
            self._load_now(entrant)
        self._tell_loading(next(self._ready))  # on cards this takes longer than all races

    def _tell_loading(self, ready: int) -> None:
        self._tell(f"loading the finalists and the baselines: {ready} of {len(self._proof.entrants)} are ready", None)

    def _load_now(self, entrant: Entrant) -> None:
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
        held, why = device_memory(entrant.worker.pid, targets_of(entrant))
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
            keep=entrant.role == "baseline" or self._may_win_slow or bool(entrant.ends),
            rate=self._rate,
            single=runs_single(targets_of(entrant), entrant.draft.all_configs),
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
        tell: Callable[[RaceState], None] = cards.beside(lambda state: self._tell("proving the plan against the baselines", state))
        next_round = race(
            contestants,
            budget_s=_racing_s([each for each in contestants if each.racing]),
            least_rounds=_ROUNDS_TO_PROVE,
            most_rounds=200,
            seed=self._seed + 1,
            first_round=next_round,
            tire=self._tire(),
            tell=tell,
        )
        self._settle(next_round, tell)
        load_cores, after = load.read(pids), conditions.read(self._targets())
        self._proof.cautions = (*conditions.cautions(before, after, load_cores=load_cores), *cards.cautions())
        for entrant in self._proof.entrants:
            if entrant.worker is not None and "device_memory_bytes" in entrant.metrics:  # arenas grow while they run
                held, _ = device_memory(entrant.worker.pid, targets_of(entrant)) if entrant.running else (None, "")
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

    def _settle(self, next_round: int, tell: Callable[[RaceState], None]) -> None:
        """Let those run on that may be the plan and are not told apart, where time ended the race before it had its rounds.

        With many entrants that many callers keep busy a round takes seconds, and three of them tell little on a machine that is not quiet:
        what takes a third of the best baseline's time would not be the plan for that alone. They are those that `_pick` will choose among
        by speed. Where who that is hangs on what is measured afterwards (tails, energy), or a cut is the plan in any case, nobody does.
        """
        if self._forced or self._asks_tail or self._asks_energy:
            return
        timed = [each for each in self._proof.entrants if each.eligible and each.contestant is not None and each.contestant.durations]
        for each in timed:
            self._measure(each, each.contestant.samples() if each.contestant else None)
        may_be = self._serving([each for each in timed if not self._unmet(each)])
        field = [each.contestant for each in may_be if each.contestant is not None and each.contestant.racing and not each.contestant.rests]
        done = max((len(set(each.rounds)) for each in field), default=_ROUNDS_TO_PROVE)
        leader, still_open = leader_of(field), undecided(field)
        if leader is None or not still_open or done >= _ROUNDS_TO_PROVE:
            return
        for rival in still_open:
            rival.cautions = ()  # which say that it is open
        left = _ROUNDS_TO_PROVE - done
        race(
            [leader, *still_open],
            budget_s=_SETTLE_S,
            least_rounds=min(3, left),
            most_rounds=left,
            seed=self._seed + 2,
            first_round=next_round,
            warmup=False,
            tell=tell,
        )

    def _tire(self) -> Callable[[int], None] | None:
        """Return what lets baselines rest that are far behind what may be the plan, where speed alone decides which that is.

        The reference of the search rests later: what was promised is a ratio to it, and two rounds cannot tell whether that was kept.
        """
        if len(self._objectives) > 1 or self._prefer or self._may_win_slow:
            return None
        # A lowered one may yet be found too inaccurate on all that was held out: for its sake nobody rests.
        sure = (each for each in self._proof.entrants if each.eligible and each.draft.lowered is None)
        field = [each.contestant for each in sure if each.contestant is not None]
        who = [each for each in self._proof.entrants if each.contestant is not None and each.role == "baseline"]
        everyone = far_behind([each.contestant for each in who if each.contestant], field)
        reference = next((each.contestant for each in who if each.draft.name == self._reference), None)
        if reference is None:
            return everyone
        others = far_behind([each.contestant for each in who if each.contestant and each.contestant is not reference], field)

        def tire(rounds: int) -> None:
            (everyone if rounds >= _ROUNDS_TO_TELL or reference.took_s > _MOST_TO_TELL_S else others)(rounds)

        return tire

    def _targets(self) -> set[Target]:
        return {target for each in self._proof.entrants for target in targets_of(each)}

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
        if asks_for_energy(self._objectives[:1], self._constraints):
            for each in finalists:
                if each.running:
                    self._count_energy(each)
        running = [each for each in finalists if each.running]
        chosen = self._leader(running)
        for each in running:  # what chose is not what proves
            each.metrics = {name: value for name, value in each.metrics.items() if name not in COUNTED}
        ends = [each.contestant for each in running if each.ends]
        for contestant in contestants:
            if contestant is not chosen and contestant not in ends:
                contestant.dropped = contestant.dropped or "another candidate was faster, or kept the constraints"
        return next_round

    def _leader(self, running: Sequence[Entrant]) -> Contestant | None:
        """Return the fastest of those that keep the constraints; where none does, what comes nearest: it says what a limit could be."""
        serving = self._serving([each for each in running if not self._violations(each)])
        nearest = min(running, key=lambda each: distance(self._violations(each)), default=None)
        return leader_of([each.contestant for each in serving if each.contestant]) or (nearest.contestant if nearest else None)

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
        seconds = typical_s(entrant, samples)
        entrant.metrics |= {
            "latency_s": seconds * entrant.draft.callers,
            "throughput_per_s": entrant.draft.batch / seconds,
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
            self._proof.absent |= plan.absent | absent(targets_of(plan), plan.metrics)

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
            targets = ", ".join(sorted(map(str, targets_of(plan))))
            plan.absent["load from cache"] = "; ".join(answer["problems"]) or f"nothing compiled for {targets} can be kept"

    def _explain_strays(self, plan: Entrant) -> None:
        """Find out what the nodes cost that the plan's accelerators leave to the CPU. What goes wrong costs this figure."""
        if all(target.device.kind == "cpu" for target in targets_of(plan)):
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
            entrant.metrics |= energy_metrics(entrant.contestant, targets_of(entrant))
        except (WorkerDied, AivmmError) as error:
            entrant.problem, entrant.fatal = str(error), True
            entrant.contestant.failed = WorkerDied(entrant.problem)
        return not entrant.fatal

    def _judge(self, entrant: Entrant) -> None:
        """Note which constraints an entrant breaks, or cannot be shown to keep."""
        if found := self._unmet(entrant):
            self._proof.violations[entrant.draft.name] = found

    def _unmet(self, entrant: Entrant) -> tuple[Violation, ...]:
        """Return the constraints that an entrant breaks, or cannot be shown to keep."""
        metrics, targets = constraint_metrics(entrant), list(map(str, entrant.draft.all_targets))
        found = self._violations(entrant)
        for missing in unjudged(self._constraints, metrics, targets=targets):
            why = "there is no output that is a classifier's" if "agreement" in missing.metric else "there was no time to measure it"
            if missing.metric in ENERGY:
                why = why_no_energy(targets_of(entrant)) or why
            why = entrant.absent.get(missing.metric, why)
            sentence = f"{missing.metric} is not known ({why}), so {missing} is not shown to hold"
            found = (*found, Violation(constraint=missing, value=math.nan, percent=math.inf, sentence=sentence))
        return found

    def _pick(self) -> Entrant | None:
        proof = self._proof
        allowed = self._serving([each for each in proof.entrants if self._may_be_plan(each)])
        baselines = [each for each in allowed if each.role == "baseline"]
        candidates = [each for each in allowed if each.role == "candidate"]
        best = min(candidates, key=sample_s, default=None)
        if self._forced:
            return best  # a cut was asked for: an uncut plan is no answer, however fast
        proof.best_baseline = unbeaten(baselines)
        proof.challenger, proof.beaten = None, False
        if best is not None and proof.best_baseline is not None:
            proof.challenger = by_rounds(best, proof.best_baseline)
            proof.beaten = proof.challenger.verdict == "faster" and proof.challenger.ratio <= _WORTH_CHANGING
        if best is not None and (proof.best_baseline is None or proof.beaten):
            return best
        # A device that only OpenVINO resolves at load is the last choice among equals: a plan should say where it runs.
        named = unbeaten([each for each in baselines if not each.draft.targets.endswith(":AUTO")])
        if named is not None and proof.best_baseline is not None:
            behind = by_rounds(named, proof.best_baseline)
            if behind.verdict != "slower" or 1 / behind.ratio > _WORTH_CHANGING:
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
        durations = list(entrant.confirmed.timed_s) if typical >= BATCH_BELOW_S and not self._rate else []
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


def _cards_of(entrant: Entrant) -> list[str]:
    """Return the cards that an entrant runs on, in one order for all, so that no two hold what the other waits for."""
    return sorted({device_of(each) for each in targets_of(entrant) if each.device.kind != "cpu"})


def loads_at_once(cores: int) -> int:
    """Return how many entrants to load at once."""
    return max(_LOADS, min(_MOST_LOADS, cores // _CORES_TO_LOAD))


def _racing_s(contestants: Sequence[Contestant]) -> float:
    """Return how long to race: so many rounds as make an interval, within limits; what matters and stays open is settled on top of it."""
    return min(_MOST_S, max(_LEAST_S, _ROUNDS * sum(_turn_s(each) for each in contestants)))


def _turn_s(contestant: Contestant) -> float:
    return block_s(contestant.expected_s, contestant.callers, rate=contestant.rate) + _SWITCH_S
