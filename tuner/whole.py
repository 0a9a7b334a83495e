"""Plans that answer several callers at once, measured whole before they are proven: on the engine, beside the search's reference.

What parts were seen to cost each other two by two is what a plan of them may be hoped to reach; and what callers or replicas reach who call
executables in a bare loop, as the search has them, is not what they reach through the engine. Here both are measured as the proof will
measure them, so that what is promised is what is proven, but for what the machine does in between.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean

from aivmm.errors import AivmmError
from aivmm.planner.candidates import Candidate, Draft, Score
from aivmm.planner.evidence import Estimate
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.compare import Comparison, cautions, compare
from aivmm.probes.race import Contestant, race
from aivmm.probes.records import Measured, Outcome, ProbeKey, Samples
from aivmm.runtime.environment import environment_of
from aivmm.runtime.null import counts_itself
from aivmm.tuner.measure import Measurer, fresh
from aivmm.tuner.options import allowed_s
from aivmm.tuner.work import Work

_RACE_S = 4.0
_ROUNDS = 20
_NEAR = 1.1  # of the least time: who is farther behind is told by what the search measured
_LOADING = 0.5  # of that time; the race has what is left


def at_its_batch(work: Work, draft: Draft) -> Draft:
    """Return a draft of one piece with the blocks of its batch, which may be numbered differently: the whole is the whole."""
    if len(draft.pieces) > 1:
        return draft
    last = len(work.subject.structure_at(draft.batch).blocks) - 1
    return replace(draft, pieces=(replace(draft.pieces[0], first=0, last=last),))


def runs_same(candidate: Candidate, draft: Draft) -> bool:
    """Say whether a draft runs what a candidate does."""
    piece = draft.pieces[0]
    if len(draft.pieces) > 1 or piece.copies or piece.replicas != candidate.replicas:
        return False
    return (candidate.target, candidate.config, candidate.batch, candidate.callers) == (
        piece.target,
        piece.config,
        draft.batch,
        draft.callers,
    )


def load_engine(work: Work, draft: Draft, bundle: Path, workers: ExitStack, *, rate: bool) -> Contestant | None:
    """Write a draft and load it with the engine in a worker of its own, which ends with `workers`; None, and a note, where that fails."""
    work.emitter(draft.batch).write(at_its_batch(work, draft), bundle, objective=work.options.objective)
    worker = Worker(draft.name)
    workers.callback(worker.close)
    sample = work.subject.at(draft.batch).samples[0]
    try:
        answer = worker.call(
            "load_bundle", limit_s=compile_limit_s(), run_limit_s=run_limit_s(), name="engine", bundle=str(bundle), inputs=str(sample)
        )
    except (WorkerDied, AivmmError) as error:
        work.note(f"{draft.name} could not be measured: {error.reason if isinstance(error, WorkerDied) else error.message}")
        return None
    return Contestant("engine", worker, batch=draft.batch, callers=draft.callers, expected_s=answer["first_inference_s"], rate=rate)


@dataclass(slots=True)
class Whole:
    """Measures drafts of one piece, in one place or several.

    What an earlier run measured is reused; with `measure_new` False nothing else is. Within `most_s` seconds it loads as many of the
    drafts, in order, as half of that is enough for, and races those. What `stop` ended early says nothing, and is not kept.
    """

    work: Work
    measurer: Measurer
    reference_s: float | None  # what a call of the reference took in the search
    measure_new: bool = True
    stop: Callable[[], bool] = lambda: False
    most_s: float = math.inf

    def expected(self, draft: Draft) -> Estimate | None:
        """Return the seconds from one answered request of the draft to the next, where the reference takes what it took in the search.

        None where it was not measured: it does not load, there is no time, or its devices are made of arithmetic.
        """
        return self.all_expected([draft]).get(draft.name)

    def all_expected(self, drafts: Sequence[Draft]) -> dict[str, Estimate]:
        """Return that of several drafts, by name, as far as it was measured: in one race, what was not known yet."""
        if self.reference_s is None:
            return {}
        found: dict[str, Estimate] = {}
        for draft, seen in self._seen([each for each in drafts if not counts_itself(each.all_targets)]):
            seconds = seen.ratio * self.reference_s * draft.batch / self.measurer.reference.batch
            sigma = math.log(seen.high / seen.low) / (2 * 1.96) if 0 < seen.low <= seen.high else 0.0
            found[draft.name] = Estimate(seconds=seconds, sigma=sigma, source="measured", because="all callers at once, on the engine")
        return found

    def _seen(self, drafts: Sequence[Draft]) -> list[tuple[Draft, Comparison]]:
        keys = {draft.name: self._keys(draft) for draft in drafts}
        wanted = list(chain.from_iterable(keys.values()))
        known = {} if self.work.options.fresh or not wanted else self.work.database.find_many(wanted)
        pairs = {name: _of_one_race(known.get(mine), known.get(beside)) for name, (mine, beside) in keys.items()}
        old = [key for name, pair in pairs.items() if pair is not None for key in keys[name]]
        self.measurer.counts.reused += len(old)
        self.work.database.link(self.work.run_id, old)
        missing = [draft for draft in drafts if pairs[draft.name] is None]
        if missing and self.measure_new and not self.stop():
            pairs |= self._raced(missing, keys)
        scale = self.measurer.reference.batch
        return [
            (draft, compare(pair[0].samples, pair[1].samples, scale=scale / draft.batch, by=self.measurer.by))
            for draft in drafts
            if (pair := pairs[draft.name]) is not None
        ]

    def _raced(self, drafts: Sequence[Draft], keys: Mapping[str, tuple[ProbeKey, ProbeKey]]) -> dict[str, tuple[Measured, Measured]]:
        """Race drafts beside the reference and store what came out, by draft name; what does not load, or fails, is left out."""
        began = time.perf_counter()
        reference = self.measurer.load_reference()
        if reference is None:
            return {}
        what = "all callers at once, on the engine"
        rival = fresh(reference, rate=self.measurer.rate)
        rival.keep = True
        entrants: dict[str, Contestant] = {}
        with ExitStack() as workers:
            for number, draft in enumerate(drafts, 1):
                if self.stop():
                    return {}
                self.work.progress.detail(f"{what}: loading {number} of {len(drafts)}")
                if entrants and time.perf_counter() - began > _LOADING * self.most_s:
                    break
                bundle = self.work.folder / f"whole-{keys[draft.name][0].subject[-16:]}-{draft.batch}.aivmm"
                contestant = load_engine(self.work, draft, bundle, workers, rate=self.measurer.rate)
                if contestant is not None:
                    contestant.keep = True
                    entrants[draft.name] = contestant
            if not entrants:
                return {}
            # As many rounds as the proof has: this is to say what that will say.
            budget_s = min(_RACE_S * (1 + len(entrants)) / 2, max(0.0, self.most_s - (time.perf_counter() - began)))
            stopped: list[bool] = []
            race(
                [rival, *entrants.values()],
                budget_s=budget_s,
                seed=self.work.options.seed,
                stop=lambda: self.stop() and not stopped.append(True),  # type: ignore[func-returns-value]
                tell=lambda state: self.work.progress.detail(f"{what}: round {state.round} with {len(entrants)} of them"),
                enough=lambda done: done >= _ROUNDS,
            )
            if stopped:
                return {}
        race_name, theirs = f"{self.work.run_id} {keys[drafts[0].name][0].subject}", rival.samples()
        found: dict[str, tuple[Measured, Measured]] = {}
        for name, contestant in entrants.items():
            mine = contestant.samples()
            if mine is not None and theirs is not None and contestant.failed is None and rival.failed is None:
                one, other = zip(keys[name], (mine, theirs), strict=True)
                found[name] = _stored(*one, race_name), _stored(*other, race_name)
        rows = list(chain.from_iterable(found.values()))
        self.work.database.add_many(rows, run_id=self.work.run_id)
        self.measurer.counts.measured += len(rows)
        return found

    def _keys(self, draft: Draft) -> tuple[ProbeKey, ProbeKey]:
        """Return what the draft, and the reference beside it, are known by."""
        (piece,) = draft.pieces
        places = [
            f"{environment_of(each.target).fingerprint} {each.config.digest()} x{each.replicas} of {each.weight:g}"
            for each in piece.everywhere()
        ]
        how = [
            *places,
            f"{draft.callers} callers",
            self.measurer.reference.key,
            f"{self.measurer.rate}",
            self.work.subject.subject_of(draft.lowered),
        ]
        digest = hashlib.sha256("\n".join(how).encode()).hexdigest()[:16]

        def key(what: str, callers: int) -> ProbeKey:
            return ProbeKey(
                kind="segment",
                subject=f"{what} {digest}",
                target=str(piece.target),
                environment=environment_of(piece.target).fingerprint,
                config=piece.config,
                batch=draft.batch,
                callers=callers,
            )

        return key("copies at once", draft.callers), key("beside copies", self.measurer.reference.callers)


def _of_one_race(mine: Outcome | None, beside: Outcome | None) -> tuple[Measured, Measured] | None:
    alike = isinstance(mine, Measured) and isinstance(beside, Measured) and mine.race == beside.race
    return (mine, beside) if alike else None  # type: ignore[return-value]


def _stored(key: ProbeKey, samples: Samples, race_name: str) -> Measured:
    return Measured(key=key, samples=samples, cautions=cautions(samples), race=race_name)


def raced_whole(
    work: Work, measurer: Measurer, scored: Sequence[tuple[Candidate, Score]], *, reference_s: float | None, measure_new: bool
) -> dict[str, Estimate]:
    """Race on the engine, as the proof will, what has several callers and may yet be the plan; return what it takes, by candidate key.

    `scored` are baselines and finalists that may be the plan, with what the search measured of them, calling executables. It takes as long
    on top of the budget as what is tried at once: what there is no time for, those that are farther behind, is told by the search.
    """
    least = min((score.ratio for _, score in scored), default=0.0)
    close = sorted((each for each in scored if each[1].ratio <= _NEAR * least), key=lambda each: each[1].ratio)
    near = dict.fromkeys(each for each, _ in close if each.callers > 1)
    if work.asked() or not near:
        return {}
    if measure_new:
        work.progress.phase("measuring on the engine what serves several callers")
    blocks = len(work.subject.structure.blocks)
    drafts = {each.key: Draft.whole(f"{each.target} of {each.callers} callers, {number}", each, blocks) for number, each in enumerate(near)}
    whole = Whole(
        work=work,
        measurer=measurer,
        reference_s=reference_s,
        measure_new=measure_new,
        stop=work.asked,
        most_s=allowed_s(work.options.budget_s),
    )
    seen = whole.all_expected(list(drafts.values()))
    return {key: seen[draft.name] for key, draft in drafts.items() if draft.name in seen}


def engine_factor(candidate: Candidate, raced: Sequence[tuple[Candidate, float]]) -> float:
    """Return how many times as long a candidate of several callers takes on the engine as calling executables: as those most like it.

    One caller has what the engine adds to a call.
    """
    if candidate.callers == 1:
        return 1.0
    on_it = [each for each in raced if each[0].target == candidate.target]
    driven = [each for each in on_it if each[0].callers == candidate.callers]
    alike = [factor for _, factor in driven or on_it or raced]
    return math.exp(fmean(map(math.log, alike))) if alike else 1.0
