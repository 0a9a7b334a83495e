"""How deep a pipeline runs: how many requests each stage has at once, searched on the engine itself once the stages are placed.

A stage that waits for its neighbour's request stands still; one with more of them waiting holds more memory, and finds its caches colder.
Where that is best no model says, so each depth runs in a worker of its own, in a race with the best depth before it, and the first one with
the search's reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from aivmm.planner.candidates import Draft, Policy, Rejection, Score
from aivmm.planner.importance import importances
from aivmm.planner.records import StudyRecord
from aivmm.planner.search import Search
from aivmm.planner.space import Space
from aivmm.probes.compare import Comparison, cautions, compare, rate_s
from aivmm.probes.race import Contestant, race
from aivmm.probes.records import Measured, Outcome, ProbeKey
from aivmm.runtime.environment import environment_of
from aivmm.runtime.null import counts_itself
from aivmm.tuner.inplace import chain_digest
from aivmm.tuner.measure import Measurer, fresh
from aivmm.tuner.whole import load_engine
from aivmm.tuner.work import Work

STUDY = "pipeline"
MOST_DEPTH = 4
_RACE_S = 2.5  # of two
_ADDS = 0.02  # relative: a request more for each stage that gains less is not worth its memory


@dataclass(slots=True)
class DepthSearch:
    """Finds the depth of a pipelined draft. What an earlier run measured is reused; with `measure_new` False nothing else is.

    Once `stop` says so nothing more is loaded, and what was loaded is not raced.
    """

    work: Work
    measurer: Measurer
    measure_new: bool = True
    stop: Callable[[], bool] = lambda: False

    def best(self, draft: Draft) -> tuple[Draft, Score | None]:
        """Return the draft as deep as is best, with its score; as it is, without one, where no depth could be measured.

        Of depths that are as fast within 2 % the least. Stages of null devices take as long whatever runs beside them: as it is.
        """
        if counts_itself(draft.all_targets):
            return draft, None
        search = Search(space=_space(draft), seed=self.work.options.seed)
        asked = search.ask(MOST_DEPTH)
        outcomes = self._outcomes(draft, [each.depth for each in asked])
        for each in asked:
            search.tell(each, outcomes[each.depth])
            record = replace(search.records[-1], callers=deep(draft, each.depth).callers)
            self.work.database.add_trial(self.work.run_id, record, study_name=STUDY)
        scored = {candidate.depth: score for candidate, score in search.best(MOST_DEPTH)}
        best = min((score.ratio for score in scored.values()), default=math.inf)
        chosen = min((depth for depth, score in scored.items() if score.ratio <= best * (1 + _ADDS)), default=None)
        number = next((each.number for each in search.records if each.depth == chosen and each.value is not None), None)
        front = () if number is None else (number,)
        known = StudyRecord(name=STUDY, objectives=("throughput",), front=front, importance=tuple(importances(search)))
        self.work.database.end_study(self.work.run_id, known)
        if chosen is None:
            return draft, None
        shown = ", ".join(f"{depth}: {best / score.ratio:.0%}" for depth, score in sorted(scored.items()))
        self.work.note(f"requests at once for each stage of the pipeline, and its speed of the best: {shown}")
        return deep(draft, chosen), scored[chosen]

    def _outcomes(self, draft: Draft, depths: Sequence[int]) -> dict[int, Score | Rejection]:
        """Return how the depths came out: the first against the reference, each next one against the best before it, in one race each.

        So no more than two of them are loaded at once, and whoever is compared ran in turn with what it is compared to.
        """
        outcomes: dict[int, Score | Rejection] = {}
        known = self._known(draft, depths)
        with ExitStack() as workers:
            held = _Held(work=self.work, draft=draft, measurer=self.measurer, workers=workers)
            for depth in sorted(depths):
                scored = {each: found for each, found in outcomes.items() if isinstance(found, Score)}
                best = min(scored, key=lambda each: scored[each].ratio, default=0)
                mine, beside = self._keys(draft, depth, best)
                pair = [found for key in (mine, beside) if isinstance(found := known.get(key), Measured)]
                reused = len(pair) == 2 and pair[0].race == pair[1].race
                if reused:
                    self.measurer.counts.reused += 2
                    self.work.database.link(self.work.run_id, [mine, beside])
                else:
                    pair = self._raced(held, depth, best, mine, beside) if self.measure_new and not self.stop() else []
                if len(pair) == 2:
                    outcomes[depth] = self._score(draft, pair[0], pair[1], scored.get(best), reused=reused)
                else:
                    outcomes[depth] = Rejection(state="failed", reason="it could not be measured")
        return outcomes

    def _known(self, draft: Draft, depths: Sequence[int]) -> Mapping[ProbeKey, Outcome]:
        if self.work.options.fresh:
            return {}
        keys = [key for depth in depths for best in (0, *depths) if best < depth for key in self._keys(draft, depth, best)]
        return self.work.database.find_many(keys)

    def _score(self, draft: Draft, mine: Measured, beside: Measured, best: Score | None, *, reused: bool) -> Score:
        """Return the score of a depth by its race with the `best` before it; with the reference, where that is None."""
        scale = 1.0 if best is not None else self.measurer.reference.batch / draft.batch
        seen = compare(mine.samples, beside.samples, scale=scale, by=self.measurer.by)
        ratio = seen.ratio * (best.ratio if best is not None else 1.0)
        spread = math.hypot(_spread(seen), _spread(best)) if best is not None else _spread(seen)
        seconds = rate_s(mine.samples)
        metrics = {"throughput": draft.batch / seconds}
        low, high = ratio * math.exp(-spread / 2), ratio * math.exp(spread / 2)
        return Score(ratio=ratio, low=low, high=high, median_s=seconds, reused=reused, metrics=metrics)

    def _raced(self, held: _Held, depth: int, best: int, mine: ProbeKey, beside: ProbeKey) -> list[Measured]:
        """Race a depth with the best before it, 0 the reference, and store what came out."""
        self.work.progress.detail(f"pipeline: measuring how many requests its stages take at once ({depth} of {MOST_DEPTH})")
        contestants = [held.contestant(each) for each in (depth, best)]
        both = [each for each in contestants if each is not None]
        if len(both) < 2:
            return []
        for each in both:
            each.keep = True
        race(both, budget_s=_RACE_S, seed=self.work.options.seed, stop=self.work.asked)
        samples = [each.samples() for each in both if each.failed is None]
        name = f"{self.work.run_id} {STUDY} {depth}"
        found = [
            Measured(key=key, samples=each, cautions=cautions(each), race=name)
            for key, each in zip((mine, beside), samples, strict=False)
            if each is not None
        ]
        if len(samples) < 2 or len(found) < 2:
            held.drop(depth)
            return []
        self.work.database.add_many(found, run_id=self.work.run_id)
        self.measurer.counts.measured += len(found)
        slower = depth if best and compare(found[0].samples, found[1].samples, by=self.measurer.by).ratio > 1 else best
        held.drop(slower)
        return found

    def _keys(self, draft: Draft, depth: int, best: int) -> tuple[ProbeKey, ProbeKey]:
        """Return what a depth, and what it raced with, the depth `best` or 0 for the reference, are known by."""
        structures = [self.work.emitter(draft.batch).segment(each.first, each.last).structure for each in draft.pieces]
        replicas = " ".join(str(each.replicas) for each in draft.pieces)
        how = " by windows" if self.measurer.rate else ""
        chain = f"pipeline{how} {chain_digest(draft, structures, self.measurer.reference.key)} x {replicas}"
        first = draft.pieces[0]
        rival = f"{best} deep" if best else "reference"

        def key(subject: str, callers: int) -> ProbeKey:
            return ProbeKey(
                kind="segment",
                subject=subject,
                target=str(first.target),
                environment=environment_of(first.target).fingerprint,
                config=first.config,
                batch=draft.batch,
                callers=callers,
            )

        return (
            key(f"{chain}, {depth} deep beside {rival}", deep(draft, depth).callers),
            key(f"{rival} beside {chain}, {depth} deep", deep(draft, best).callers if best else 1),
        )


@dataclass(slots=True)
class _Held:
    """The depths of a draft that are loaded, each in a worker of its own: two at most, for memory's sake."""

    work: Work
    draft: Draft
    measurer: Measurer
    workers: ExitStack
    _loaded: dict[int, tuple[Contestant, ExitStack]] = field(default_factory=dict)

    def contestant(self, depth: int) -> Contestant | None:
        """Return a depth, loaded, with nothing measured yet, or the reference for 0; None where it does not load."""
        if not depth:
            reference = self.measurer.load_reference()
            return None if reference is None else fresh(reference, rate=self.measurer.rate)
        if depth not in self._loaded:
            made = replace(deep(self.draft, depth), name=f"{self.draft.name} with {depth} requests for each stage")
            worker = self.workers.enter_context(ExitStack())
            loaded = load_engine(self.work, made, self.work.folder / f"depth-{depth}.aivmm", worker, rate=self.measurer.rate)
            if loaded is None:
                worker.close()
                return None
            self._loaded[depth] = loaded, worker
        return fresh(self._loaded[depth][0], rate=self.measurer.rate)

    def drop(self, depth: int) -> None:
        """End the worker of a depth, where it has one."""
        if depth in self._loaded:
            self._loaded.pop(depth)[1].close()


def _spread(seen: Comparison | Score) -> float:
    """Return the width of an interval, of logarithms; 0 where it has none."""
    return math.log(seen.high / seen.low) if 0 < seen.low <= seen.high < math.inf else 0.0


def deep(draft: Draft, depth: int) -> Draft:
    """Return a pipelined draft with so many requests in flight for each stage and replica, and as many callers to make them."""
    return replace(draft, depth=depth, callers=depth * len(draft.pieces) * max(each.replicas for each in draft.pieces))


def _space(draft: Draft) -> Space:
    configs = {each.target: each.config for each in draft.pieces}
    placed = Policy(targets=tuple(configs.items()), most_pieces=len(draft.pieces))
    return Space(
        targets=list(configs),
        knobs={str(each): () for each in configs},
        objective="throughput",
        precisions={str(target): [config.precision] for target, config in configs.items()},
        batches=(draft.batch,),
        most_depth=MOST_DEPTH,
        placed=placed,
    )
