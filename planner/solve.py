"""Solving a placement problem: which solver when, and what is known about the result.

    solution = solve(read_problem(Path("problem.json")), "throughput", time_limit_s=30)

Latency: dynamic programming on chains (`chain`), elimination on narrow graphs (`elimination`), else an integer program (`program`).
Contiguous: dynamic programming over downsets (`downsets`). Throughput in any pieces: the best of the contiguous plan and those that prices
lead to (`balance`), made better a few devices at a time (`improve`), with the integer program for the bound. Whatever made a plan,
`evaluate` prices it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from aivmm.errors import Infeasible, UsageError
from aivmm.planner.balance import balanced
from aivmm.planner.bounds import load_bound
from aivmm.planner.chain import place
from aivmm.planner.compact import Compact, Ints, assignment_of, chains_of, compact, condensed, spots_of
from aivmm.planner.downsets import Doubt, Family, Search, depends_on_sender, every_downset, swept_downsets
from aivmm.planner.elimination import Elimination
from aivmm.planner.evaluate import Evaluation, evaluate
from aivmm.planner.improve import improve
from aivmm.planner.problem import Goal, Place, Problem
from aivmm.planner.program import Program, Spots

TIME_LIMIT_S = 25.0

_MOST_DOWNSETS = 20_000
_MOST_CELLS = 30_000_000  # of the tables of one search over downsets
_MOST_ORDER_ROWS = 200_000  # of the program that keeps placements contiguous
_MOST_WAYS = 200  # to say how many devices of each kind are used
_CONTIGUOUS_SHARE = 0.5  # of the time, at most, goes into the contiguous plan from which the others start
_PROGRAM_SHARE = 0.6
_BALANCE_SHARE = 0.2
_FLOW_S = 4e-5  # to write a variable of the program and to presolve it, about
_TOLERANCE = 1e-5  # relative; HiGHS's, with a margin
_SAME = 1e-9  # relative; differences below are rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A plan and what is known of it. `objective` is recomputed from the problem; no plan of the kind asked for is below `bound`."""

    objective: float
    bound: float
    seconds: float
    contiguous: bool  # whether the plan is
    assignment: Mapping[str, Place]
    evaluation: Evaluation

    @property
    def gap(self) -> float:
        """How much of the objective is not proven necessary: 0 is optimal."""
        return (self.objective - self.bound) / self.objective if self.objective else 0.0


def solve(problem: Problem, goal: Goal, *, contiguous: bool = False, time_limit_s: float = TIME_LIMIT_S) -> Solution:
    """Return the best plan found within the limit, with a proven lower bound on all plans.

    Raises:
        Infeasible: there is no plan; the message says what is in the way, as far as that can be told.
        UsageError: the time limit is no positive number, or none was found within it.
    """
    if not 0 < time_limit_s < math.inf:
        raise UsageError(f"the time limit is {time_limit_s} s", advice="give a positive number of seconds")
    started = time.perf_counter()
    best = _Best(problem, goal, contiguous, started + time_limit_s)
    merged = compact(problem)
    _require_supported(problem, merged)
    if contiguous:
        merged = condensed(merged)
        _require_supported(problem, merged)
    if goal == "latency":
        _contiguous(merged, best) if contiguous else _latency(merged, best)
    else:
        _in_one_place(merged, best)
        _throughput(merged, best)
    if best.evaluation is None:
        if best.bound == math.inf:
            raise _no_plan(problem, contiguous)
        raise UsageError(f"no plan was found within {time_limit_s:g} s", advice="raise the time limit")
    objective = best.evaluation.objective(goal)
    if best.bound > objective * (1 + _TOLERANCE):
        raise RuntimeError(f"a solver is wrong: it proved that no plan is below {best.bound}, and there is one of {objective}")
    bound = objective if best.bound >= objective * (1 - _SAME) else best.bound
    return Solution(
        objective=objective,
        bound=bound,
        seconds=time.perf_counter() - started,
        contiguous=best.evaluation.contiguous,
        assignment=best.assignment,
        evaluation=best.evaluation,
    )


@dataclass(slots=True)
class _Best:
    """The best plan so far, priced by the definition, and the best bound."""

    problem: Problem
    goal: Goal
    contiguous: bool
    deadline: float
    bound: float = 0.0
    value: float = math.inf
    assignment: Mapping[str, Place] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    ceiling: float = math.inf  # plans that are no better are of no interest: another part of the problem has one

    def offer(self, merged: Compact, spots: Spots | None) -> bool:
        """Take a plan if it is allowed and better than the best; return whether it is allowed."""
        if spots is None:
            return False
        assignment = assignment_of(self.problem, merged, spots)
        found = evaluate(self.problem, assignment)
        if found.broken or (self.contiguous and not found.contiguous):
            return False
        if found.objective(self.goal) < self.value:
            self.value, self.assignment, self.evaluation = found.objective(self.goal), assignment, found
        return True

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def closed(self) -> bool:
        """Whether there is nothing left to find, or no time."""
        return self.bound >= self.at_most() * (1 - _SAME) or self.left() <= 0

    def at_most(self) -> float:
        """Return what a plan has to cost at most to be of interest."""
        return min(self.value, self.ceiling)

    def prove(self, bound: float) -> None:
        """Take a bound if it is better."""
        self.bound = max(self.bound, bound)

    def part(self, share: float) -> _Best:
        """Return an empty record for a part of the problem, which may take a share of the time that is left."""
        return _Best(self.problem, self.goal, self.contiguous, time.perf_counter() + max(self.left(), 0.0) * share, ceiling=self.at_most())

    def take(self, part: _Best) -> None:
        """Take the plan of a part if it is better. Its bound is a bound on the part only."""
        if part.value < self.value:
            self.value, self.assignment, self.evaluation = part.value, part.assignment, part.evaluation


def _require_supported(problem: Problem, merged: Compact) -> None:
    """Name a group that no choice supports, or that no device holds."""
    supported = np.isfinite(merged.cost)
    fits = merged.memory <= merged.capacity[merged.device]
    for members, here, held in zip(merged.members, supported, supported & fits, strict=True):
        names = ", ".join(repr(problem.nodes[member].id) for member in members[:3]) + (", ..." if len(members) > 3 else "")
        what = f"node {names}" if len(members) == 1 else f"nodes {names} together"
        if not here.any():
            raise Infeasible(f"no choice supports {what}", advice="allow more choices, or part what is colocated")
        if not held.any():
            raise Infeasible(f"no device that supports {what} has the memory for it", advice="raise memory_bytes, or allow more choices")


def _in_one_place(merged: Compact, best: _Best) -> None:
    """Take the best plan that uses one device, should there be no time for another."""
    fits = merged.memory.sum(axis=0) <= merged.capacity[merged.device]
    sums = np.where(fits, merged.cost.sum(axis=0), np.inf)
    choice = int(sums.argmin())
    if np.isfinite(sums[choice]):
        best.offer(merged, [(choice, 0)] * len(merged.members))


def _no_plan(problem: Problem, contiguous: bool) -> Infeasible:
    """Return the error where each node fits somewhere, and all of them nowhere; it names what the problem has of what can be in the way."""
    limits = [
        (any(math.isfinite(each.memory_bytes) for each in problem.devices), "the limits on memory", "raise memory_bytes"),
        (bool(problem.unsupported), "the unsupported pairs", "give one of them a transfer"),
        (contiguous, "one segment on each device", "drop --contiguous"),
    ]
    ways = [*(way for here, _, way in limits if here), "allow more choices"]
    names = [name for here, name, _ in limits if here]
    what = ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]
    return Infeasible(f"no plan keeps {what}", advice=", ".join(ways[:-1]) + f", or {ways[-1]}")


# --- latency ---


def _latency(merged: Compact, best: _Best) -> None:
    """Memory rarely binds, and without it one of the identical devices is enough: a smaller problem, which mostly settles it."""
    loose = replace(merged, count=np.ones_like(merged.count), capacity=np.full(len(merged.capacity), np.inf))
    if merged.is_paths():
        spots, bound = _along_chains(loose)
    elif (way := Elimination(loose)).possible:
        spots, bound = way.solve(loose)
    else:
        answer = Program(loose, "latency").solve(best.left() * _PROGRAM_SHARE)
        spots, bound = answer.spots, answer.bound
    best.prove(bound)
    best.offer(merged, spots)
    if best.bound == math.inf or best.closed():
        return
    start = best.part(_CONTIGUOUS_SHARE)
    _contiguous(condensed(merged), start)
    best.take(start)
    answer = Program(merged, "latency").solve(best.left(), at_most=best.at_most())
    best.offer(merged, answer.spots)
    best.prove(answer.bound)


def _along_chains(merged: Compact) -> tuple[Spots | None, float]:
    """Return the best plan of a chain, or of several put one behind the other; an infinite value where there is none."""
    order = [group for chain in chains_of(merged) for group in chain]
    width = merged.cost.shape[1]
    boundary = np.zeros((len(order) - 1, width, width))
    position = {group: index for index, group in enumerate(order)}
    for tensor in merged.tensors:
        boundary[position[tensor.source]] += tensor.export[:, None] + tensor.move
    boundary[:, np.arange(width), np.arange(width)] = 0.0
    try:
        plan = place(merged.cost[order], boundary)
    except Infeasible:
        return None, math.inf
    return [(plan.assignment[position[group]], 0) for group in range(len(order))], plan.bound_s


# --- throughput ---


def _throughput(merged: Compact, best: _Best) -> None:
    """Contention depends on which devices are used, so each way to use them is a problem of its own, with fixed prices."""
    if not merged.slowed.any():
        _at_fixed_prices(merged, best)
        return
    if _ways(merged) > _MOST_WAYS:
        # As if all were used: a plan priced too high. The bound is that without contention.
        part = best.part(1.0)
        _at_fixed_prices(_slowed(merged, merged.count), part)
        best.take(part)
        best.bound = load_bound(replace(merged, slowed=np.zeros_like(merged.slowed)))
        return
    parts = [(_slowed(merged, count), count) for count in _uses(merged)]
    ranked = sorted(((load_bound(scaled), index) for index, (scaled, _) in enumerate(parts)))
    bounds = []
    for done, (least, index) in enumerate(ranked):
        part = best.part(1.0 / (len(ranked) - done))
        part.bound = least
        if not part.closed():
            _at_fixed_prices(parts[index][0], part)
            best.take(part)
        bounds.append(part.bound)
    best.bound = min(bounds)


def _ways(merged: Compact) -> int:
    return math.prod(len(each) for each in _use_ranges(merged))


def _use_ranges(merged: Compact) -> list[range]:
    """Return for each kind how many of its devices may be used; those that neither slow nor are slowed are used as one likes."""
    touched = np.any(merged.slowed, axis=0) | np.any(merged.slowed, axis=1)
    return [range(0 if each else int(count), int(count) + 1) for each, count in zip(touched, merged.count, strict=True)]


def _uses(merged: Compact) -> Iterator[Ints]:
    """Yield every way to use the devices, as a count of each kind."""
    for counts in itertools.product(*_use_ranges(merged)):
        if any(counts):
            yield np.array(counts)


def _slowed(merged: Compact, count: Ints) -> Compact:
    """Return the problem in which `count` devices of each kind are used."""
    beside = np.maximum(count[None, :] - np.eye(len(count), dtype=np.int64), 0)
    return merged.scaled(count, 1.0 + (merged.slowed * beside).sum(axis=1))


def _at_fixed_prices(merged: Compact, best: _Best) -> None:
    best.prove(load_bound(merged))
    if best.closed():
        return
    if best.contiguous:
        _contiguous(merged, best)
        return
    start = best.part(_CONTIGUOUS_SHARE)
    _contiguous(condensed(merged), start)
    best.take(start)
    _balance(merged, best)
    for share, step in ((0.3, _improve), (0.7, _prove), (1.0, _improve)):
        if best.closed():
            return
        step(merged, best, time.perf_counter() + best.left() * share)


def _balance(merged: Compact, best: _Best) -> None:
    for spots, bound in balanced(merged, time.perf_counter() + best.left() * _BALANCE_SHARE):
        best.prove(bound)
        best.offer(merged, spots)
        if best.closed():
            break


def _improve(merged: Compact, best: _Best, deadline: float) -> None:
    if best.evaluation is not None:
        spots = spots_of(best.problem, merged, best.assignment)
        best.offer(merged, improve(merged, spots, deadline))


def _prove(merged: Compact, best: _Best, deadline: float) -> None:
    flows = sum(len(each.readers) for each in merged.tensors) * len(merged.places) ** 2
    if flows * _FLOW_S > deadline - time.perf_counter():
        return  # it would be over time before the search begins
    program = Program(merged, "throughput")
    answer = program.solve(deadline - time.perf_counter(), at_most=best.at_most())
    best.offer(merged, answer.spots)
    best.prove(answer.bound)


# --- contiguous, either goal ---


def _contiguous(merged: Compact, best: _Best) -> None:
    """Search some downsets for a plan, all for the optimum; where that is too much, let the integer program say what it can."""
    best.prove(float(merged.cheapest.sum() if best.goal == "latency" else merged.cheapest.max()))
    if best.bound == math.inf:
        return  # what a cycle of groups joins, no choice supports
    forgetful = depends_on_sender(merged) and not merged.is_chain()
    some = swept_downsets(merged)
    if some is not None:
        _over_downsets(merged, some, best, "most" if forgetful else "exact")
    family = every_downset(merged, _MOST_DOWNSETS, time.perf_counter() + best.left() / 2)
    if family is not None:
        if forgetful:
            _over_downsets(merged, family, best, "most")
        _over_downsets(merged, family, best, "least" if forgetful else "exact")
    if best.closed():
        return
    _prove_for_any_pieces(merged, best)
    places = len(merged.places)
    if not best.closed() and len(merged.edges) * places**2 <= _MOST_ORDER_ROWS:
        answer = Program(merged, best.goal, contiguous=True).solve(best.left(), at_most=best.at_most())
        best.offer(merged, answer.spots)
        best.prove(answer.bound)


def _prove_for_any_pieces(merged: Compact, best: _Best) -> None:
    """Take a bound that holds for plans in any pieces, and so for contiguous ones."""
    if best.goal == "throughput":
        for _, bound in balanced(merged, time.perf_counter() + best.left() * _BALANCE_SHARE):
            best.prove(bound)
        return
    loose = replace(merged, count=np.ones_like(merged.count), capacity=np.full(len(merged.capacity), np.inf))
    way = Elimination(loose)
    if way.possible:
        best.prove(way.solve(loose)[1])


def _over_downsets(merged: Compact, family: Family, best: _Best, doubt: Doubt) -> None:
    """Search one family; what it finds is a bound where the family is complete and no price was raised."""
    search = Search(merged, family, best.goal, doubt)
    if search.cells() > _MOST_CELLS:
        return
    limit = best.at_most()
    try:
        found = search.run(best.deadline, limit)
    except TimeoutError:
        return
    if found is not None:
        best.offer(merged, found[0])
    if family.complete and doubt != "most":
        best.prove(limit if found is None else found[1])
