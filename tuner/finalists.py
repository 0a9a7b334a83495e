"""Who of the search is worth proving."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from aivmm.planner.candidates import Candidate, Score
from aivmm.planner.choice import rank
from aivmm.planner.constraints import Constraint, beyond
from aivmm.planner.objectives import Objective
from aivmm.planner.search import Search

WORTH_PROVING = 1.02  # a finalist this far behind the best baseline would only cost time
_ALL = 1000

Scored = tuple[Candidate, Score]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A candidate that goes into the proof. `ends` names the objectives in which nothing that was searched is better."""

    candidate: Candidate
    score: Score
    ends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Chooses finalists. `baselines` are those that were scored: they are proven in any case, and whoever wants to join must keep up."""

    search: Search
    baselines: Sequence[Scored]
    known: Collection[str]  # keys of all baselines
    keeps: Callable[[Candidate, Score], bool]  # whether what the search saw breaks no constraint
    constraints: Sequence[Constraint]
    objectives: Sequence[Objective]
    prefer: Sequence[str]
    top: int

    def finalists(self) -> list[Finalist]:
        """Return the best few, the ends of the front, and, where nothing keeps the constraints, what comes nearest."""
        found = self._best_few()
        found += self._in_own_precision(found)
        found = self._with_ends(found)
        if not found and self.constraints and not any(self.keeps(*each) for each in self.baselines):
            found = self._nearest()
        return found

    def _rank(self, candidate: Candidate) -> int:
        return rank([str(candidate.target)], self.prefer)

    def _new(self) -> list[Scored]:
        """Return what keeps the constraints and is no baseline, on what is wanted most first, then best first."""
        found = [each for each in self.search.best(_ALL, self._steer) if each[0].key not in self.known and self.keeps(*each)]
        return sorted(found, key=lambda each: self._rank(each[0]))  # stable: best first within a rank

    @property
    def _steer(self) -> Objective:
        """The first objective that the search could see."""
        return self.search.objectives[0]

    def _worth(self, scored: Scored) -> bool:
        """Say whether a candidate may beat the best baseline on equally wanted hardware; what the search cannot see may be anything."""
        if not self.objectives[0].in_search:
            return True
        rivals = [each for each in self.baselines if self._rank(each[0]) == self._rank(scored[0]) and self.keeps(*each)]
        least = min((self._steer.loss(*each) for each in rivals), default=math.inf)
        return self._steer.loss(*scored) <= least + math.log(WORTH_PROVING)

    def _best_few(self) -> list[Finalist]:
        found = [each for each in self._new() if self._worth(each)]
        wanted = [each for each in found if self._rank(each[0]) == self._rank(found[0][0])]
        return [Finalist(candidate=candidate, score=score) for candidate, score in wanted[: self.top]]

    def _in_own_precision(self, finalists: Sequence[Finalist]) -> list[Finalist]:
        """Return the best candidate in the model's own precision, if lowered ones left it no room: those may yet fail on accuracy."""
        if not finalists or not all(each.candidate.config.lowered for each in finalists):
            return []
        plain = (each for each in self._new() if each[0].config.lowered is None and self._worth(each))
        return [Finalist(candidate=candidate, score=score) for candidate, score in [*plain][:1]]

    def _with_ends(self, finalists: Sequence[Finalist]) -> list[Finalist]:
        """Mark or add the best of the front in each further objective. Baselines are proven anyway."""
        found = {each.candidate.key: each for each in finalists}
        front = self.search.front() if len(self.search.objectives) > 1 else []
        for objective in self.search.objectives[1:] if front else ():
            candidate, score = min(front, key=lambda each: objective.loss(*each))
            if candidate.key not in self.known:
                held = found.setdefault(candidate.key, Finalist(candidate=candidate, score=score))
                found[candidate.key] = replace(held, ends=(*held.ends, objective.name))
        return list(found.values())

    def _nearest(self) -> list[Finalist]:
        """Return what breaks its worst limit by the least, as far as the search could see: the report names the nearest of all."""

        def broken(scored: Scored) -> float:
            known = (beyond(each, scored[1].metrics.get(each.metric, math.nan)) for each in self.constraints)
            return max((each for each in known if not math.isnan(each)), default=0.0)

        new = [each for each in self.search.best(_ALL) if each[0].key not in self.known]
        return [Finalist(candidate=candidate, score=score) for candidate, score in sorted(new, key=broken)[: self.top]]
