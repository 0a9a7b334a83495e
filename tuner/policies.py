"""How the model may be cut, searched: which targets may take part, how many pieces, what a cut is thought to cost, one piece each or any.

Where blocks go is answered exactly under each policy (`planner.policy`); policies that place alike are one point, which is measured once,
in its place. What is learnt so goes into the evidence that the exact placement of `planner.partition` rests on: it may be wrong about what
a cut costs, and then looks at what is best by wrong prices only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from aivmm.errors import Infeasible
from aivmm.planner.candidates import Candidate, Policy, Rejection, Score
from aivmm.planner.evidence import Estimate
from aivmm.planner.importance import importances
from aivmm.planner.lazy import Measure, Span
from aivmm.planner.partition import ChainEvidence
from aivmm.planner.policy import place_under, priced
from aivmm.planner.records import StudyRecord
from aivmm.planner.search import Search
from aivmm.planner.space import Space
from aivmm.runtime.config import Config
from aivmm.tuner.work import Work

STUDY = "placement"
_PIECES = 4
_PRICES = (0.5, 1.0, 2.0, 8.0)
_MOST = 3  # placements that are measured
_ASKS = 40  # most of them come to a placement that is known
_NEAR = 1.10  # of the best uncut plan: what is thought to take longer is not measured

Array = npt.NDArray[np.float64]


@dataclass(slots=True)
class PolicySearch:
    """Searches policies on the evidence of one model; `measure` times the segments of a placement in their place."""

    work: Work
    evidence: ChainEvidence
    configs: Mapping[str, Config]
    measure: Measure
    measurements: Callable[[], int]  # how many placements `measure` has had to measure so far; the rest it knew
    reference_s: float | None
    ends: float  # of time.perf_counter: no measurement is begun after it
    anew: bool = True  # False: a finished search is gone through again, so what is recalled counts as it did when it was measured
    _names: list[str] = field(init=False)
    _costs: Array = field(init=False)
    _prices: Array = field(init=False)
    _placed: dict[str, tuple[Span, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chain = self.evidence.chain()
        self._names, self._prices = chain.choices, chain.prices
        self._costs = np.array([self._scaled(name) for name in self._names]).T

    def run(self) -> int:
        """Search, and let the evidence learn what was measured; return how many had to be. None where no cut promises anything."""
        uncut_s = min((each.seconds for name in self._names if (each := self._whole(name)) is not None), default=math.inf)
        if not self._worth(uncut_s):
            return 0
        targets = [each for each in self.work.targets if str(each) in self._names and np.isfinite(self._column(str(each))).any()]
        space = Space(
            targets=targets,
            knobs={str(each): () for each in targets},
            objective="latency",
            precisions={str(each): [self._config(str(each)).precision] for each in targets},
            most_pieces=min(_PIECES, len(self._costs)),
            cut_prices=_PRICES,
        )
        search = Search(space=space, seed=self.work.options.seed, runs_as=self._runs_as)
        began, known = self.measurements(), 0
        for _ in range(_ASKS):
            asked = search.ask(1)
            if not asked or self.work.asked():
                break
            count = self.measurements() - began + (0 if self.anew else known)
            why_not = f"{_MOST} others were measured" if count >= _MOST else ""
            why_not = why_not or ("there was no time to measure it" if time.perf_counter() >= self.ends else "")
            before = self.measurements()
            outcome = self._outcome(asked[0], uncut_s, why_not)
            known += isinstance(outcome, Score) and len(self._spans(asked[0])) > 1 and self.measurements() == before
            search.tell(asked[0], outcome)
            self.work.database.add_trial(self.work.run_id, search.records[-1], study_name=STUDY)
        front = [each.number for each in search.records if each.value is not None and each.value == _least(search)]
        found = StudyRecord(name=STUDY, objectives=("latency",), front=tuple(front[:1]), importance=tuple(importances(search)))
        self.work.database.end_study(self.work.run_id, found)
        measured = self.measurements() - began
        if measured or known:
            said = f"{measured} placement{'' if measured == 1 else 's'} had to be measured"
            said += f", {known} {'was' if known == 1 else 'were'} known" if known else ""
            self.work.note(f"how the model may be cut was searched: {len(search.records)} policies, of which {said}")
        return measured

    def _worth(self, uncut_s: float) -> bool:
        """Say whether any placement is thought to come near the best uncut plan, at the most favourable price of a cut."""
        if len(self._names) < 2 or len(self._costs) < 2 or not self.reference_s or not math.isfinite(uncut_s):
            return False
        try:
            placed = place_under(self._costs, self._prices, most_pieces=_PIECES, cut_price=_PRICES[0], contiguous=False)
        except Infeasible:
            return False
        cut = len(placed.segments) > 1
        return cut and priced(placed.segments, self._costs, self._prices * _PRICES[0]) <= _NEAR * uncut_s

    def _outcome(self, candidate: Candidate, uncut_s: float, why_not: str) -> Score | Rejection:
        spans = self._spans(candidate)
        if not spans:
            return Rejection(state="pruned", reason="no placement under this policy has room for every block")
        if len(spans) == 1:
            whole = self._whole(spans[0][2])
            return self._score(whole.seconds, whole.sigma) if whole else Rejection(state="pruned", reason="not measured as a whole")
        thought = self._thought_s(spans)
        if thought > _NEAR * uncut_s:
            factor = thought / uncut_s
            return Rejection(state="pruned", reason=f"thought to take {factor:.2f} times as long as the best uncut plan")
        learnt = {} if why_not else self.measure(spans)
        if len(learnt) < len(spans):
            return Rejection(state="pruned", reason=why_not or "it could not be measured")
        for (first, last, name), each in learnt.items():
            self.evidence.beliefs[name].observe(first, last, each)
        crossings = self._thought_s(spans) - math.fsum(self._inside_s(span) for span in spans)
        seconds = math.fsum(each.seconds for each in learnt.values()) + crossings
        return self._score(seconds, max(each.sigma for each in learnt.values()))

    def _score(self, seconds: float, sigma: float) -> Score:
        assert self.reference_s
        ratio, width = seconds / self.reference_s, math.exp(1.96 * sigma)
        return Score(ratio=ratio, low=ratio / width, high=ratio * width, median_s=seconds, metrics={"latency": seconds})

    def _runs_as(self, candidate: Candidate) -> str:
        return repr(self._spans(candidate))

    def _spans(self, candidate: Candidate) -> tuple[Span, ...]:
        """Return the segments that a policy comes to; none where it allows no placement."""
        policy = candidate.policy
        if policy is None:
            return ((0, len(self._costs) - 1, str(candidate.target)),)
        key = repr(policy.as_json())
        if key not in self._placed:
            self._placed[key] = self._place(policy)
        return self._placed[key]

    def _place(self, policy: Policy) -> tuple[Span, ...]:
        columns = [self._names.index(str(target)) for target, _ in policy.targets]
        costs, prices = self._costs[:, columns], self._prices[:, columns][:, :, columns]
        try:
            found = place_under(costs, prices, most_pieces=policy.most_pieces, cut_price=policy.cut_price, contiguous=policy.contiguous)
        except Infeasible:
            return ()
        forbidden = self.evidence.chain().forbidden
        spans = tuple((first, last, self._names[columns[on]]) for first, last, on in found.segments)
        if forbidden is not None and any(forbidden[first, last, columns[on]] for first, last, on in found.segments):
            return ()
        return spans

    def _thought_s(self, spans: tuple[Span, ...]) -> float:
        columns = tuple((first, last, self._names.index(name)) for first, last, name in spans)
        return priced(columns, self._costs, self._prices)

    def _inside_s(self, span: Span) -> float:
        first, last, name = span
        return float(self._costs[first : last + 1, self._names.index(name)].sum())

    def _scaled(self, name: str) -> list[float]:
        """Return what each block takes on a target: in proportion to what it takes alone, in sum what the whole model takes."""
        last = len(self.evidence.structure.blocks) - 1
        alone = [self.evidence.segment(index, index, name) for index in range(last + 1)]
        whole, total = self._whole(name), math.fsum(each.seconds for each in alone if each is not None)
        share = whole.seconds / total if whole is not None and total > 0 and None not in alone else 1.0
        return [math.inf if each is None else each.seconds * share for each in alone]

    def _column(self, name: str) -> Array:
        found: Array = self._costs[:, self._names.index(name)]
        return found

    def _whole(self, name: str) -> Estimate | None:
        return self.evidence.beliefs[name].measured.get((0, len(self.evidence.structure.blocks) - 1))

    def _config(self, name: str) -> Config:
        return self.configs.get(name, Config(precision="fp32"))


def _least(search: Search) -> float:
    return min((score.ratio for _, score in search.best(1)), default=math.nan)
