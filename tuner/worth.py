"""Which targets are worth searching: by what their defaults take, and cards by what their promising settings make of them as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.choice import rank
from aivmm.planner.constraints import TARGETS, Constraint, check
from aivmm.planner.objectives import Objective
from aivmm.planner.room import Room
from aivmm.runtime.target import Target

HOPELESS = {"latency": 2.0, "throughput": 3.0}  # a target this far behind with its defaults is not searched
LOWERED_GAIN = 4.0  # so many times faster than fp32 int8 has been seen: a target within this is tried with it
# A default session of a card is launched kernel by kernel, by one or two callers, from memory that is not page-locked. Its promising
# settings were seen to make it 2.2 to 3.9 times as fast (five models on an H100), and to tell that takes one measurement.
CARD_GAIN = 4.0
MOST_TRIED = 2  # points of a card's promising settings that are measured before it is judged
# Limits that the search can judge; the others need a fresh process, or hundreds of calls, and are for the proof.
JUDGED_IN_SEARCH = frozenset({"latency", "throughput", "cosine", "energy", "power", "size", "device_memory"})
_DID_NOT_RUN = ("refused", "failed")
Outcome = Score | Rejection


def keeps(constraints: Iterable[Constraint], candidate: Candidate, score: Score, *, without: Collection[str] = ()) -> bool:
    """True unless what the search saw of a candidate already breaks a constraint, those on the metrics `without` aside."""
    metrics = {name: value for name, value in score.metrics.items() if name in JUDGED_IN_SEARCH and name not in without}
    return not check(constraints, metrics, targets=[str(candidate.target)])


def speed_decides(objectives: Sequence[Objective], drive: str, constraints: Iterable[Constraint]) -> bool:
    """True where the time of a sample, driven so, is all that decides what the plan is, but for limits that the search sees too."""
    return [each.name for each in objectives] == [drive] and all(each.metric in (*JUDGED_IN_SEARCH, TARGETS) for each in constraints)


@dataclass(slots=True, kw_only=True)
class Standing:
    """The least time that was seen of each target, over the reference's, and what follows for a search.

    What a card takes as it was tried counts for the card. Where `decisive`, others are held against it too: not where another objective
    comes first, or counts as well, by which they may win.
    """

    best: dict[Target, float]
    allowed: set[Target]  # those where what took that may be the plan
    drive: str
    prefer: Sequence[str]
    decisive: bool = True
    reached: dict[Target, float] = field(default_factory=dict)  # what cards were seen to take as they were tried, where not decisive

    @property
    def hopeless(self) -> float:
        """How far behind is too far."""
        return HOPELESS[self.drive]

    def behind(self, target: Target) -> float:
        """Return how many times as long a target takes as the best one of its rank; 0 where there is no such.

        On hardware that is wanted more than another, being slower than that is no reason to give up.
        """
        rivals = {each: ratio for each, ratio in self.best.items() if each in self.allowed} or self.best
        mine, own = self._rank(target), self.best[target]
        if target in self.reached:
            own = min(own, self.reached[target]) if target in self.allowed else self.reached[target]
        return own / min((ratio for each, ratio in rivals.items() if self._rank(each) == mine), default=math.inf)

    def to_try(self, batches: Sequence[int]) -> list[Target]:
        """Return the cards whose promising settings are measured before anybody is judged: those that these may yet bring into reach.

        With one target there is nothing to decide. A default is measured at the model's own batch, and a card gains with the batch.
        """
        gain = CARD_GAIN * (max(batches) / min(batches) if self.drive == "throughput" else 1.0)
        found = [target for target in self.best if target.device.memory_bytes is not None and len(self.best) > 1]
        return [target for target in found if self.behind(target) <= self.hopeless * gain]

    def learn(self, target: Target, ratio: float) -> None:
        """Take up what a target was seen to take in a way that may be the plan."""
        if not self.decisive:
            self.reached[target] = min(ratio, self.reached.get(target, ratio))
            return
        self.best[target] = min(ratio, self.best[target]) if target in self.allowed else ratio
        self.allowed.add(target)

    def worth_lowering(self) -> list[Target]:
        """Return the targets that a lower precision may bring into reach."""
        return [target for target in self.best if self.behind(target) <= self.hopeless * LOWERED_GAIN]

    def _rank(self, target: Target) -> int:
        return rank([str(target)], self.prefer)


def try_cards(
    standing: Standing,
    points: Sequence[Candidate],
    *,
    known: Mapping[str, tuple[Candidate, Outcome]],
    measure: Callable[[Sequence[Candidate]], None],
    room: Room,
    may_be: Callable[[Candidate, Score], bool],
) -> set[Target]:
    """Measure promising points of cards until `MOST_TRIED` of each have run, and return the cards that have a score then.

    `measure` puts what comes out into `known`, or does nothing where nothing may be measured; `may_be` says what may be the plan.
    A point that was refused gives way to the next: other loads first, and then other precisions.
    """
    waiting = {target: _by_load([each for each in points if each.target == target]) for target in dict.fromkeys(p.target for p in points)}
    ran, tried = dict.fromkeys(waiting, 0), set[Target]()
    while any(waiting.values()):
        group: list[Candidate] = []
        for target, left in waiting.items():
            wanted = MOST_TRIED - ran[target]
            fit = [each for each in left if each.key in known or room.why_not(each) is None][:wanted]
            waiting[target] = [each for each in left if each not in fit] if 0 < wanted == len(fit) else []
            group += fit
        if missing := [each for each in group if each.key not in known]:
            measure(missing)
        for each in group:
            _, outcome = known.get(each.key, (each, None))
            if outcome is None:
                continue
            room.learn(each, outcome)
            ran[each.target] += isinstance(outcome, Score) or outcome.state not in _DID_NOT_RUN
            if isinstance(outcome, Score):
                tried.add(each.target)
                if may_be(each, outcome):
                    standing.learn(each.target, outcome.ratio)
    return tried


def _by_load(points: Sequence[Candidate]) -> list[Candidate]:
    """Return points of a card with one precision of each load first."""
    seen: dict[tuple[int, int], int] = {}
    turns = []
    for each in points:
        load = each.batch, each.callers
        seen[load] = seen.get(load, 0) + 1
        turns.append((seen[load], each))
    return [each for _, each in sorted(turns, key=lambda turn: turn[0])]
