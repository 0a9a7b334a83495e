"""Measuring candidates: what the database knows is reused, the rest races against the reference."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from aivmm.db.database import Database
from aivmm.errors import ModelError, Unsupported, UsageError
from aivmm.planner.candidates import MOST_REPLICAS, Candidate, Rejection, Score
from aivmm.probes import conditions
from aivmm.probes.accuracy import over_limit
from aivmm.probes.client import WorkerDied
from aivmm.probes.compare import By, cautions, compare, rate_s
from aivmm.probes.lab import Lab, Loaded
from aivmm.probes.machine import BackgroundLoad
from aivmm.probes.race import Contestant, RaceState, far_behind, known_well, race
from aivmm.probes.records import Caution, Failed, Measured, Outcome, ProbeKey, Refused, in_replicas
from aivmm.runtime.config import Setting
from aivmm.runtime.environment import environment_of
from aivmm.runtime.target import Target
from aivmm.tuner import strays
from aivmm.tuner.disturbed import of_search
from aivmm.tuner.joules import energy_metrics, has_counters
from aivmm.tuner.subject import Subject

Tell = Callable[[RaceState], None]
WINDOWS = "by_windows"  # a metric of what one caller was measured by windows, for throughput: its durations are means, of no one call
UNCOUNTED = "uncounted_"  # before the name of an energy that nothing counted: 1 where the counters could be read all the same
_PRECISE_S = 1.5  # what is predicted of a plan is a multiple of the reference


@dataclass(slots=True)
class Counts:
    """How many probes came out which way, for the summary."""

    measured: int = 0
    reused: int = 0
    refused: int = 0
    failed: int = 0

    def add(self, outcome: Outcome, *, reused: bool) -> None:
        """Count one outcome."""
        if isinstance(outcome, Refused):
            self.refused += 1
        elif isinstance(outcome, Failed):
            self.failed += 1
        elif reused:
            self.reused += 1
        else:
            self.measured += 1


@dataclass(slots=True)
class Measurer:
    """Scores candidates for the whole model. One reference runs in every race, so that scores of different races compare."""

    lab: Lab
    subject: Subject
    database: Database
    run_id: str
    reference: Candidate
    cosine_limit: float | None
    fresh: bool = False
    retry_failed: bool = False
    seed: int = 0
    counts_energy: bool = False  # of each candidate, for seconds each: only where that is an objective or limited
    needs: frozenset[str] = frozenset()  # metrics of the objectives: without one of them there is nothing to compare
    rate: bool = False  # what is answered in a second counts, also of one caller; see `Contestant.rate`
    cards_only: bool = False  # the energy that counts is that of cards: nothing counts the host's
    stop: Callable[[], bool] | None = None  # True: races end as soon as they may
    say: Callable[[str], None] = lambda text: None  # what is loaded now
    counts: Counts = field(default_factory=Counts)
    _loaded: dict[str, Loaded] = field(default_factory=dict)
    _races: dict[str, dict[str, Measured]] = field(default_factory=dict)  # race -> key digest -> outcome
    _old: dict[str, Outcome] = field(default_factory=dict)  # candidate key -> newest outcome
    _rejected: dict[str, Rejection] = field(default_factory=dict)  # refused or failed, in this run or as the database remembers
    _around: dict[str, float] = field(default_factory=dict)  # clocks before, during and after the last race
    _number: int = 0

    def key(self, candidate: Candidate) -> ProbeKey:
        """Return the database key of a candidate."""
        return ProbeKey(
            kind="model",
            subject=in_replicas(self.subject.subject_of(candidate.config.lowered), candidate.replicas),
            target=str(candidate.target),
            environment=environment_of(candidate.target).fingerprint,
            config=candidate.config,
            batch=candidate.batch,
            callers=candidate.callers,
        )

    def recall(self, targets: Iterable[Target]) -> list[tuple[Candidate, Score | Rejection]]:
        """Return what the database knows of this model on these targets under today's conditions, newest first, each candidate once."""
        self.counts.reused = 0
        if self.fresh:
            return []
        by_environment = {environment_of(target).fingerprint: target for target in targets}
        found: dict[str, tuple[Candidate, ProbeKey]] = {}
        plain = [self.subject.subject_of(each) for each in self._variants()]
        subjects = [in_replicas(each, count) for each in plain for count in range(1, MOST_REPLICAS + 1)]
        outcomes = [
            outcome
            for fingerprint in by_environment
            for outcome in self.database.outcomes(kind="model", subject=subjects, environment=fingerprint, all=True)
        ]
        for outcome in outcomes:
            key = outcome.key
            target = by_environment[key.environment]
            if key.target != str(target):
                continue
            candidate = Candidate(target=target, config=key.config, batch=key.batch, callers=key.callers, replicas=key.replicas)
            if candidate.config.lowered not in self._variants():
                continue  # of another version
            if self.key(candidate) != key:
                continue  # lowered in another way
            found[candidate.key] = (candidate, key)
            if isinstance(outcome, Measured):
                self._races.setdefault(outcome.race, {})[candidate.key] = outcome
            elif not (isinstance(outcome, Failed) and self.retry_failed):
                self._old[candidate.key] = outcome
        known: list[tuple[Candidate, Score | Rejection]] = []
        used: list[ProbeKey] = []
        for candidate, key in found.values():
            score = self._known(candidate)
            if score is not None:
                known.append((candidate, score))
                self.counts.reused += isinstance(score, Score) or score.state == "pruned"
                used.append(key)
        self.database.link(self.run_id, used)
        return known

    def _variants(self) -> tuple[str | None, ...]:
        """Return the forms of the model that may have been measured: as it is, and lowered in each way."""
        if not self.subject.lowered_precisions:
            return (None,)
        return (None, *dict.fromkeys((*self.subject.ways(), *self.subject.lowerer.recipes)))

    def _known(self, candidate: Candidate) -> Score | Rejection | None:
        for outcomes in reversed(self._races.values()):
            mine, reference = outcomes.get(candidate.key), outcomes.get(self.reference.key)
            alike = reference is not None and self._of_one_kind(self.reference, reference)
            if mine is not None and reference is not None and alike and self._tells_enough(candidate, mine):
                return self._score(candidate, mine, reference, reused=True)
        old = self._old.get(candidate.key)
        if isinstance(old, Refused):
            return Rejection(state="refused", reason=old.reason, reused=True)
        if isinstance(old, Failed):
            return Rejection(state="failed", reason=old.reason, reused=True)
        return None

    def _tells_enough(self, candidate: Candidate, mine: Measured) -> bool:
        """Say whether a measurement of an earlier run holds what the objectives need: times outlast the inputs they were judged on."""
        if not self._of_one_kind(candidate, mine):
            return False
        judged = self.subject.judged_of(candidate.config.lowered)
        accuracy = "cosine" not in self.needs or f"cosine@{judged}" in mine.metrics or f"unusable@{judged}" in mine.metrics
        if not accuracy or not self.counts_energy or self._energy_name in mine.metrics:
            return accuracy
        # That it could not be counted is as much as another race would find, as long as there are the same counters.
        return mine.metrics.get(UNCOUNTED + self._energy_name) == float(has_counters(candidate.target))

    def _of_one_kind(self, candidate: Candidate, found: Measured) -> bool:
        """Say whether an earlier run timed a candidate as this one would: medians of calls and means of windows do not compare."""
        return (WINDOWS in found.metrics) == (self.rate and candidate.callers == 1)

    @property
    def by(self) -> By:
        """What a round stands for in a score or a promise: as the proof tells throughput, by means, however busy the machine is."""
        return "mean" if self.rate else "median"

    def seconds(self, found: Measured) -> float:
        """Return the median duration of a call; of windows the seconds from one answer to the next, stalls of the machine included."""
        return rate_s(found.samples) if self.rate or found.key.callers > 1 else found.samples.median_s

    def measure(
        self,
        candidates: Sequence[Candidate],
        *,
        budget_s: float,
        tell: Tell | None = None,
        keep: Sequence[Candidate] = (),
        beside: Sequence[Candidate] = (),
        precise: bool = False,
    ) -> dict[str, Score | Rejection]:
        """Load and race `candidates` (with the reference and those in `beside`); store what came out; return scores by candidate key.

        A race ends when it is clear who is faster. With `precise` it goes on until it is also known by how much, within some more seconds.
        """
        started = time.perf_counter()
        on = {each.target for each in (*candidates, *beside)}
        load, before, cards = BackgroundLoad(self.lab.pids()), conditions.read(on), conditions.CardWatch(on)
        results: dict[str, Score | Rejection] = {}
        everyone = tuple(dict.fromkeys((self.reference, *beside, *candidates)))
        stay = {self.reference, *keep, *beside}
        for _ in everyone:  # each time around but the last has cost one of them, which crashed and took others' worker down
            field_ = self._field(everyone, stay, results)
            if self.reference.key not in field_:
                self._unload_except(())
                return _complete(results, candidates)
            contestants = [fresh(loaded.contestant, rate=self.rate) for _, loaded in field_.values()]
            by_name = {each.name: each for each in contestants}
            self._number += 1
            left = max(1.0, budget_s - (time.perf_counter() - started))
            seed = self.seed + self._number
            shown = cards.beside(tell)
            # Where all are kept, nobody waits for what is slow beyond doubt but the reference, which all are compared with.
            others = [each for each in contestants if each.name != field_[self.reference.key][1].contestant.name]
            tire = far_behind(others, contestants) if precise else None
            number = race(contestants, budget_s=left, seed=seed, tell=shown, tire=tire, stop=self.stop)
            left = min(_PRECISE_S if precise else 0.0, budget_s - (time.perf_counter() - started))
            if left > 0 and not any(each.failed for each in contestants):
                well = known_well(contestants)
                race(contestants, budget_s=left, seed=seed, first_round=number, warmup=False, enough=well, tell=shown, stop=self.stop)
            guilty = {key: each for key, each in field_.items() if (by := by_name[each[1].contestant.name]).failed and not by.lost}
            if not guilty or not any(each.lost for each in contestants):
                break
            self._store(guilty, by_name, (), results, 0.0)
        spent = (time.perf_counter() - started) / max(1, len(candidates))
        load_cores, after = load.read(self.lab.pids()), conditions.read(on)
        self._around = {**before.metrics("before"), **cards.metrics(), **after.metrics("after")}
        extra = tuple(map(of_search, (*conditions.cautions(before, after, load_cores=load_cores), *cards.cautions())))
        self._store(field_, by_name, extra, results, spent)
        self._unload_except({self.reference.key, *(each.key for each in keep), *(each.key for each in beside)})
        return _complete(results, candidates)

    def _field(
        self, everyone: Sequence[Candidate], stay: Collection[Candidate], results: dict[str, Score | Rejection]
    ) -> dict[str, tuple[Candidate, Loaded]]:
        """Load everyone that loads, by candidate key; the others' outcome goes into `results`."""
        field_: dict[str, tuple[Candidate, Loaded]] = {}
        for candidate in (*everyone, *everyone):
            # Twice over: a candidate that crashes its worker takes with it what was loaded there before.
            if candidate.key in self._rejected:
                results[candidate.key] = self._rejected[candidate.key]
                field_.pop(candidate.key, None)
                continue
            outcome = self._load(candidate)
            if isinstance(outcome, Loaded):
                field_[candidate.key] = (candidate, outcome)
                outcome.contestant.keep = candidate in stay
            else:
                results[candidate.key] = self._reject(candidate, outcome)
                field_.pop(candidate.key, None)
        return field_

    def _load(self, candidate: Candidate) -> Loaded | Refused | Failed:
        held = self._loaded.get(candidate.key)
        if held is not None and held.contestant.worker.pid and held.contestant.worker.generation == held.contestant.generation:
            return held
        self._loaded.pop(candidate.key, None)
        self.say(f"loading {candidate}")
        key = self.key(candidate)
        try:
            prepared = self.subject.at(candidate.batch)
            loaded = self.lab.load(
                self.subject.variant(candidate.batch, candidate.config.lowered),
                candidate.target,
                candidate.config,
                inputs=prepared.samples[0],
                reference=prepared.references[0],
                batch=candidate.batch,
                callers=candidate.callers,
                replicas=candidate.replicas,
            )
        except (Unsupported, UsageError, ModelError) as error:
            return Refused(key=key, reason=error.message)
        except WorkerDied as died:
            return Failed(key=key, reason=died.reason, output=died.output)
        self._loaded[candidate.key] = loaded
        return loaded

    def load(self, candidate: Candidate) -> Loaded | Refused | Failed:
        """Load a candidate, or say why not; nothing is stored. The next race that it takes part in finds it loaded."""
        return self._load(candidate)

    def unload(self, candidate: Candidate) -> None:
        """Unload what `load` loaded."""
        self._unload_except(self._loaded.keys() - {candidate.key})

    def try_load(self, candidate: Candidate) -> Rejection | None:
        """Load a candidate if the target takes it and it was not measured before; otherwise return why not, stored once."""
        if candidate.key not in self._rejected:
            old = self._known(candidate)
            if isinstance(old, Score):
                return None
            if isinstance(old, Rejection) and old.state in ("refused", "failed"):
                self._rejected[candidate.key] = old
            else:
                outcome = self._load(candidate)
                if isinstance(outcome, Loaded):
                    return None
                self._reject(candidate, outcome)
        return self._rejected[candidate.key]

    def rejection(self, candidate: Candidate) -> Rejection | None:
        """Return why a candidate was refused or failed, in this run or as the database remembers, or None."""
        known = self._rejected.get(candidate.key) or self._known(candidate)
        return known if isinstance(known, Rejection) and known.state in ("refused", "failed") else None

    def load_reference(self) -> Contestant | None:
        """Return the reference, loaded, for what is measured beside it outside a race; None where it does not load any more."""
        loaded = self._load(self.reference)
        return loaded.contestant if isinstance(loaded, Loaded) else None

    def _remember_lowering(self, candidate: Candidate, loaded: Loaded | None) -> None:
        """Keep which variant of the model a candidate ran, and how near it came to fp32 on its target, or why there is none."""
        lowered = candidate.config.lowered
        if lowered is not None:
            known = (str(candidate.target), lowered) in self.subject.lowerer.judged  # on more samples than the race has
            accuracy = {str(candidate.target): loaded.accuracy} if loaded and loaded.accuracy and not loaded.problem and not known else {}
            record = self.subject.lowerer.record(lowered, accuracy=accuracy)
            if record is not None:
                self.database.remember_lowering(record)

    def _reject(self, candidate: Candidate, outcome: Refused | Failed) -> Rejection:
        self._remember_lowering(candidate, None)
        self.database.add(outcome, run_id=self.run_id)
        self.counts.add(outcome, reused=False)
        rejection = Rejection(state="refused" if isinstance(outcome, Refused) else "failed", reason=outcome.reason)
        self._rejected[candidate.key] = rejection
        return rejection

    def _store(
        self,
        raced: Mapping[str, tuple[Candidate, Loaded]],
        contestants: Mapping[str, Contestant],
        extra: tuple[Caution, ...],
        results: dict[str, Score | Rejection],
        seconds: float,
    ) -> None:
        name = str(uuid.uuid4())
        outcomes: dict[str, Measured] = {}
        for key, (candidate, loaded) in raced.items():
            contestant = contestants[loaded.contestant.name]
            samples = contestant.samples()
            if contestant.lost or (contestant.failed is None and samples is None):
                # No fault of its own: it says nothing about this candidate, so nothing is stored.
                results[key] = Rejection(state="pruned", reason="lost when another candidate crashed its worker")
                self._loaded.pop(key, None)
                continue
            if contestant.failed is not None or samples is None:
                died = contestant.failed or WorkerDied("no call ended within the budget")
                if contestant.refused:
                    results[key] = self._reject(candidate, Refused(key=self.key(candidate), reason=died.reason))
                else:
                    results[key] = self._reject(candidate, Failed(key=self.key(candidate), reason=died.reason, output=died.output))
                continue
            outcomes[key] = Measured(
                key=self.key(candidate),
                samples=samples,
                metrics={**self._metrics(candidate, loaded), **_device_memory(loaded, contestant), **self._energy(candidate, contestant)},
                cautions=(
                    *cautions(samples),
                    *contestant.cautions,
                    *strays.cautions(candidate.target, loaded.nodes, loaded.stray, loaded.strays),
                    *extra,
                ),
                effective_config=loaded.effective_config,
                placement=loaded.nodes,
                race=name,
            )
            self._remember_lowering(candidate, loaded)
        self.database.add_many(outcomes.values(), run_id=self.run_id)
        self._races[name] = outcomes
        for key, outcome in outcomes.items():
            self.counts.add(outcome, reused=False)
            reference = outcomes.get(self.reference.key)
            if reference is not None:
                results[key] = self._score(raced[key][0], outcome, reference, reused=False, seconds=seconds, loaded=raced[key][1])

    def _metrics(self, candidate: Candidate, loaded: Loaded) -> dict[str, float]:
        # Numerical verdicts hold for one content and one input only, while times hold for the structure: their names carry which.
        holds_for = self.subject.judged_of(candidate.config.lowered)
        judged = {f"{name}@{holds_for}": value for name, value in loaded.accuracy.items()}
        if loaded.problem:
            judged[f"unusable@{holds_for}"] = 1.0
        if self.rate and candidate.callers == 1:
            judged[WINDOWS] = 1.0
        if loaded.strays and candidate.target.device.kind != "cpu":
            judged["stray_nodes"] = float(loaded.strays)
        return {"compile_s": loaded.compile_s, "first_inference_s": loaded.first_inference_s, **self._around, **judged}

    @property
    def _energy_name(self) -> str:
        return "card_energy_j" if self.cards_only else "energy_j"

    def _energy(self, candidate: Candidate, contestant: Contestant) -> dict[str, float]:
        """Return what a sample costs in energy, where that is asked for and counted."""
        if not self.counts_energy:
            return {}
        try:
            found = energy_metrics(contestant, {candidate.target})
        except WorkerDied:  # its times are known all the same
            return {}
        return found if self._energy_name in found else {**found, UNCOUNTED + self._energy_name: float(has_counters(candidate.target))}

    def _score(
        self, candidate: Candidate, mine: Measured, reference: Measured, *, reused: bool, seconds: float = 0.0, loaded: Loaded | None = None
    ) -> Score | Rejection:
        found = compare(mine.samples, reference.samples, scale=reference.key.batch / mine.key.batch, by=self.by)
        judged = self.subject.judged_of(candidate.config.lowered)
        cosine = mine.metrics.get(f"cosine@{judged}")
        shared = {"seconds": seconds, "reused": reused, "median_s": self.seconds(mine)}
        problem = ""
        if f"unusable@{judged}" in mine.metrics:
            problem = loaded.problem if loaded and loaded.problem else "its outputs are unusable"
        elif self.cosine_limit is not None and self.subject.deterministic and cosine is not None:
            problem = over_limit(cosine, mine.metrics.get(f"relative_l2@{judged}", 0.0), self.cosine_limit)
        if not problem and self.counts_energy and not mine.metrics.get(self._energy_name):  # 0: the counter did not tick
            problem = "its energy could not be counted" + (", only that of cards can here" if self.cards_only else "")
        metrics = {} if problem else self._limited(candidate, mine, cosine)
        if not problem and not self.needs <= metrics.keys():
            problem = f"its {' and '.join(sorted(self.needs - metrics.keys()))} is not known"
        if problem:
            return Rejection(state="pruned", reason=problem, ratio=found.ratio, **shared)  # type: ignore[arg-type]
        return Score(ratio=found.ratio, low=found.low, high=found.high, cosine=cosine, metrics=metrics, **shared)  # type: ignore[arg-type]

    def _limited(self, candidate: Candidate, mine: Measured, cosine: float | None) -> dict[str, float]:
        """Return what is known of a candidate before its proof, under the names that constraints use.

        Without memory, and without how long a fresh process takes to its first answer: those only the proof sees.
        """
        seconds = self.seconds(mine)
        known = {
            "latency": seconds * candidate.callers,
            "throughput": candidate.batch / seconds,
            "compile": mine.metrics.get("compile_s"),
            "cosine": cosine,
            "energy": mine.metrics.get(self._energy_name),
            "power": mine.metrics.get("power_w"),
            "device_memory": mine.metrics.get("device_memory_bytes"),
            "size": self.subject.size_bytes(candidate.config.lowered),
            # Of what one race gives: a hint for the search, while the proof takes 500 calls.
            "p99": mine.samples.quantile_s(0.99) if candidate.callers == 1 and not self.rate else None,
        }
        return {name: float(value) for name, value in known.items() if value is not None}

    def accuracy(self, candidate: Candidate) -> dict[str, float]:
        """Return how close a candidate's outputs were seen to come on the samples at hand; empty when that is not known."""
        suffix = f"@{self.subject.judged_of(candidate.config.lowered)}"
        known = (each[candidate.key].metrics for each in reversed(self._races.values()) if candidate.key in each)
        return next(({name.removesuffix(suffix): value for name, value in each.items() if name.endswith(suffix)} for each in known), {})

    def least_s(self, candidate: Candidate) -> float:
        """Return the shortest duration of a call that any race saw of a candidate; 0 where none did."""
        seen = (each[candidate.key].samples for each in self._races.values() if candidate.key in each)
        return min((min(each.timed_s) for each in seen), default=0.0)

    def effective_config(self, candidate: Candidate) -> Mapping[str, Setting] | None:
        """Return the settings that the runtime read back for a candidate, now or when it was last measured; None when it never ran."""
        loaded = self._loaded.get(candidate.key)
        if loaded is not None:
            return loaded.effective_config
        return next((each[candidate.key].effective_config for each in reversed(self._races.values()) if candidate.key in each), None)

    def _unload_except(self, keep: Iterable[str]) -> None:
        wanted = set(keep)
        for key in [each for each in self._loaded if each not in wanted]:
            loaded = self._loaded.pop(key)
            try:
                self.lab.unload(loaded.contestant)
            except WorkerDied:
                continue  # it died while cleaning up: nothing is left to free

    def release(self) -> None:
        """Unload everything."""
        self._unload_except(())


def _device_memory(loaded: Loaded, contestant: Contestant) -> dict[str, float]:
    """Return what a candidate held of its device's own memory at most: when it was loaded, or after it grew while it was raced."""
    if loaded.device_memory_bytes is None:
        return {}
    return {"device_memory_bytes": float(max(loaded.device_memory_bytes, contestant.device_memory_bytes))}


def _complete(results: dict[str, Score | Rejection], candidates: Iterable[Candidate]) -> dict[str, Score | Rejection]:
    """Give an outcome to each candidate that has none because the reference was lost in its race."""
    for candidate in candidates:
        results.setdefault(candidate.key, Rejection(state="pruned", reason="the reference was lost in its race"))
    return results


def fresh(contestant: Contestant, *, rate: bool = False) -> Contestant:
    """Return a contestant for the same loaded model with nothing measured yet."""
    made = Contestant(
        contestant.name,
        contestant.worker,
        batch=contestant.batch,
        callers=contestant.callers,
        expected_s=contestant.expected_s,
        single=contestant.single,
        rate=rate,
    )
    made.keep = contestant.keep
    made.generation = contestant.generation
    return made
