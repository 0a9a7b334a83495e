"""How deep a pipeline runs: how many requests each stage has at once, searched on the engine itself once the stages are placed.

A stage that waits for its neighbour's request stands still; one with more of them waiting holds more memory, and finds its caches colder.
Where that is best no model says, so each depth runs in a worker of its own, in one race with the search's reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from aivmm.planner.candidates import Draft, Policy, Rejection, Score
from aivmm.planner.importance import importances
from aivmm.planner.records import StudyRecord
from aivmm.planner.search import Search
from aivmm.planner.space import Space
from aivmm.probes.compare import cautions, compare
from aivmm.probes.race import Contestant, race
from aivmm.probes.records import Measured, ProbeKey, Samples
from aivmm.runtime.environment import environment_of
from aivmm.runtime.null import counts_itself
from aivmm.tuner.inplace import chain_digest
from aivmm.tuner.measure import Measurer, fresh
from aivmm.tuner.whole import load_engine
from aivmm.tuner.work import Work

STUDY = "pipeline"
MOST_DEPTH = 4
_RACE_S = 5.0
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
        keys = self._keys(draft, depths)
        known = {} if self.work.options.fresh else self.work.database.find_many(keys.values())
        found = {depth: each for depth, key in keys.items() if isinstance(each := known.get(key), Measured)}
        races = {each.race for each in found.values()}
        reused = 0 in found and len(races) == 1
        if reused:
            self.measurer.counts.reused += len(found)
            self.work.database.link(self.work.run_id, [keys[depth] for depth in found])
        else:
            found = self._raced(draft, keys) if self.measure_new and not self.stop() else {}
        batch = self.measurer.reference.batch
        outcomes: dict[int, Score | Rejection] = {}
        for depth in depths:
            if depth in found and 0 in found:
                seen = compare(found[depth].samples, found[0].samples, scale=batch / draft.batch)
                median_s = found[depth].samples.median_s
                metrics = {"throughput": draft.batch / median_s}
                outcomes[depth] = Score(ratio=seen.ratio, low=seen.low, high=seen.high, median_s=median_s, reused=reused, metrics=metrics)
            else:
                outcomes[depth] = Rejection(state="failed", reason="it could not be measured")
        return outcomes

    def _raced(self, draft: Draft, keys: Mapping[int, ProbeKey]) -> dict[int, Measured]:
        """Race the depths with the reference, and store what came out; 0 is the reference."""
        reference = self.measurer.load_reference()
        if reference is None:
            return {}
        self.work.progress.detail("pipeline: measuring how many requests its stages take at once")
        contestants = {0: fresh(reference, rate=self.measurer.rate)}
        contestants[0].keep = True
        with ExitStack() as workers:
            for depth in keys:
                if self.stop():
                    return {}
                if depth and (made := self._loaded(draft, depth, workers)) is not None:
                    contestants[depth] = made
            race(list(contestants.values()), budget_s=_RACE_S, seed=self.work.options.seed, stop=self.work.asked)
        samples = {depth: each.samples() for depth, each in contestants.items() if each.failed is None}
        return self._stored({depth: each for depth, each in samples.items() if each is not None}, keys)

    def _loaded(self, draft: Draft, depth: int, workers: ExitStack) -> Contestant | None:
        made = replace(deep(draft, depth), name=f"{draft.name} with {depth} requests for each stage")
        return load_engine(self.work, made, self.work.folder / f"depth-{depth}.aivmm", workers, rate=self.measurer.rate)

    def _stored(self, samples: Mapping[int, Samples], keys: Mapping[int, ProbeKey]) -> dict[int, Measured]:
        if 0 not in samples:
            return {}
        name = f"{self.work.run_id} {STUDY}"
        found = {depth: Measured(key=keys[depth], samples=each, cautions=cautions(each), race=name) for depth, each in samples.items()}
        self.work.database.add_many(found.values(), run_id=self.work.run_id)
        self.measurer.counts.measured += len(found)
        return found

    def _keys(self, draft: Draft, depths: Sequence[int]) -> dict[int, ProbeKey]:
        """Return what the depths, and as 0 the reference beside them, are known by."""
        structures = [self.work.emitter(draft.batch).segment(each.first, each.last).structure for each in draft.pieces]
        replicas = " ".join(str(each.replicas) for each in draft.pieces)
        how = " by windows" if self.measurer.rate else ""
        chain = f"pipeline{how} {chain_digest(draft, structures, self.measurer.reference.key)} x {replicas}"
        first = draft.pieces[0]

        def key(depth: int) -> ProbeKey:
            return ProbeKey(
                kind="segment",
                subject=f"{chain}, {depth} deep" if depth else f"beside {chain}",
                target=str(first.target),
                environment=environment_of(first.target).fingerprint,
                config=first.config,
                batch=draft.batch,
                callers=deep(draft, depth).callers if depth else 1,
            )

        return {depth: key(depth) for depth in (0, *depths)}


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
