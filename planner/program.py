"""Placement as an integer program, solved by HiGHS (through SciPy) with a proven bound.

`x[g, p]` says that group g is at place p. What a tensor costs is linear in variables that the solver makes as small as `x` lets it:
`out[p]`, whether it leaves place p, and `into[q]`, whether it enters place q; where the price depends on both ends, a flow from sender to
reader (the local polytope of the pair, whose relaxation is tight on trees). Bounds hold within HiGHS's tolerance, 1e-6 of the objective.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from aivmm.planner.compact import Array, Compact, Tensor
from aivmm.planner.problem import Goal
from aivmm.planner.quiet import native_stdout_to_stderr

Spots = list[tuple[int, int]]
Allowed = npt.NDArray[np.bool_]  # [groups, places]

_SCALE = 100.0  # what the objective is scaled to: HiGHS's tolerances are absolute
_INFEASIBLE, _OPTIMAL = 2, 0  # what SciPy calls HiGHS's answers


@dataclass(frozen=True, slots=True)
class Answer:
    """What the solver found. `bound` holds for every placement that the program allowed; infinite: there is none."""

    spots: Spots | None
    bound: float


@dataclass(slots=True)
class _Rows:
    """Constraints and variables of a program while it is written."""

    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    variables: int = 0

    def new(self, count: int = 1) -> int:
        """Return the first of `count` new variables."""
        self.variables += count
        return self.variables - count

    def add(self, terms: Iterable[tuple[int, float]], low: float = -math.inf, high: float = 0.0) -> None:
        """Require low <= sum of coefficient * variable <= high."""
        for column, value in terms:
            self.columns.append(column)
            self.values.append(value)
        self.starts.append(len(self.columns))
        self.low.append(low)
        self.high.append(high)


class Program:
    """One placement problem as a program: `solve` it as often as is useful, under different limits."""

    def __init__(self, merged: Compact, goal: Goal, *, contiguous: bool = False, allowed: Allowed | None = None) -> None:
        self.merged, self.goal, self.contiguous = merged, goal, contiguous
        self.places = merged.places
        self.boxes = sorted({(int(merged.device[choice]), index) for choice, index in self.places})  # single devices
        self.box = [self.boxes.index((int(merged.device[choice]), index)) for choice, index in self.places]
        self.choice = np.array([choice for choice, _ in self.places])
        self.allowed = np.isfinite(merged.cost)[:, self.choice] & (True if allowed is None else allowed)
        self.rows = _Rows()
        self.load: list[list[tuple[int, float]]] = [[] for _ in self.boxes]
        self._place_groups(fixed=allowed is not None)
        for tensor in merged.tensors:
            self._price(tensor)
        if contiguous:
            self._put_in_order()

    def x(self, group: int, place: int) -> int:
        """Return the variable that says whether a group is at a place."""
        return group * len(self.places) + place

    def _place_groups(self, *, fixed: bool) -> None:
        merged, width = self.merged, len(self.places)
        self.rows.new(len(merged.members) * width)
        if not fixed and not self.contiguous:
            self._break_symmetry()
        held: list[list[tuple[int, float]]] = [[] for _ in self.boxes]
        for group in range(len(merged.members)):
            here = np.flatnonzero(self.allowed[group]).tolist()
            self.rows.add([(self.x(group, place), 1.0) for place in here], 1.0, 1.0)
            for place in here:
                choice = self.choice[place]
                self.load[self.box[place]].append((self.x(group, place), merged.cost[group, choice]))
                held[self.box[place]].append((self.x(group, place), merged.memory[group, choice]))
        for terms, (device, _) in zip(held, self.boxes, strict=True):
            capacity = merged.capacity[device]
            if math.isfinite(capacity) and sum(value for _, value in terms) > capacity:
                scale = max(capacity, max(value for _, value in terms)) or 1.0
                self.rows.add([(column, value / scale) for column, value in terms], high=capacity / scale)

    def _break_symmetry(self) -> None:
        """Let the i-th group use the first i + 1 of identical devices only: any placement can be renamed to that."""
        heavy_first = np.argsort(-self.merged.cheapest, kind="stable")
        for rank, group in enumerate(heavy_first):
            for place, (_, index) in enumerate(self.places):
                if index > rank:
                    self.allowed[group, place] = False

    def _price(self, tensor: Tensor) -> None:
        """Charge a tensor to the devices, and forbid the pairs of places that it cannot go between."""
        move = tensor.move[np.ix_(self.choice, self.choice)]
        apart = ~np.eye(len(self.places), dtype=bool)
        for one, other in np.argwhere(np.isinf(move) & apart):
            for reader in tensor.readers:
                if self.allowed[tensor.source, one] and self.allowed[reader, other]:
                    self.rows.add([(self.x(tensor.source, one), 1.0), (self.x(reader, other), 1.0)], high=1.0)
        move = np.where(np.isfinite(move), move, 0.0)
        for place in np.flatnonzero(tensor.export[self.choice] > 0):
            self._charge_change(tensor.source, tensor.readers, int(place), tensor.export[self.choice[place]], leaving=True)
        alike = np.where(apart, move, np.inf).min(axis=0) == np.where(apart, move, -np.inf).max(axis=0)
        entering = np.where(apart, move, -np.inf).max(axis=0)
        if alike.all():
            for place in np.flatnonzero(entering > 0):
                self._charge_change(tensor.source, tensor.readers, int(place), entering[place], leaving=False)
        elif len(self.places) > 1:
            self._charge_flow(tensor, move)

    def _charge_change(self, source: int, readers: tuple[int, ...], place: int, cost: float, *, leaving: bool) -> None:
        """Charge `cost` at a place when the source is there and a reader is not, or (entering) a reader is there and the source is not."""
        if not self.allowed[[source] if leaving else list(readers), place].any():
            return
        changed = self.rows.new()
        for reader in readers:
            one, other = (source, reader) if leaving else (reader, source)
            self.rows.add([(self.x(one, place), 1.0), (self.x(other, place), -1.0), (changed, -1.0)])
        self.load[self.box[place]].append((changed, cost))

    def _charge_flow(self, tensor: Tensor, move: Array) -> None:
        """Charge by pairs: one unit flows from where the source is to where each reader is; what moves is the largest of the flows."""
        senders = np.flatnonzero(self.allowed[tensor.source]).tolist()
        moved: dict[tuple[int, int], int] = {}
        for reader in tensor.readers:
            places = np.flatnonzero(self.allowed[reader]).tolist()
            first = self.rows.new(len(senders) * len(places))
            flow = {pair: first + offset for offset, pair in enumerate(itertools.product(senders, places))}
            for one in senders:
                self.rows.add([*((flow[one, other], 1.0) for other in places), (self.x(tensor.source, one), -1.0)], 0.0, 0.0)
            for other in places:
                self.rows.add([*((flow[one, other], 1.0) for one in senders), (self.x(reader, other), -1.0)], 0.0, 0.0)
            if len(tensor.readers) == 1:
                moved = flow
                break
            for pair, column in flow.items():
                if pair not in moved:
                    moved[pair] = self.rows.new()
                self.rows.add([(column, 1.0), (moved[pair], -1.0)])
        for (one, other), column in moved.items():
            if one != other:
                self.load[self.box[other]].append((column, move[one, other]))

    def _put_in_order(self) -> None:
        """Let each device run one choice only, and the devices have an order in which every edge stays or goes forward."""
        rows, merged, boxes = self.rows, self.merged, range(len(self.boxes))
        used = rows.new(len(self.places))
        for group, place in np.argwhere(self.allowed).tolist():
            rows.add([(self.x(group, place), 1.0), (used + place, -1.0)])
        at = [[place for place, box in enumerate(self.box) if box == each] for each in boxes]
        for each in boxes:
            rows.add([(used + place, 1.0) for place in at[each]], high=1.0)
        first = rows.new(len(self.boxes) ** 2)  # [a, b]: a comes before b
        for one, other in itertools.permutations(boxes, 2):
            before = first + one * len(self.boxes) + other
            rows.add([(before, 1.0), (first + other * len(self.boxes) + one, 1.0)], high=1.0)
            if self.boxes[one][0] == self.boxes[other][0] and one > other:
                rows.add([(before, 1.0)])  # identical devices come in the order of their numbers
            for source, reader in merged.edges:
                terms = [(self.x(source, place), 1.0) for place in at[one]] + [(self.x(reader, place), 1.0) for place in at[other]]
                rows.add([*terms, (before, -1.0)], high=1.0)
        for one, other, third in itertools.permutations(boxes, 3):
            size = len(self.boxes)
            terms = [(first + one * size + other, 1.0), (first + other * size + third, 1.0), (first + one * size + third, -1.0)]
            rows.add(terms, high=1.0)
        self.orders = (first, len(self.boxes) ** 2)

    def solve(
        self,
        time_limit_s: float,
        *,
        at_most: float = math.inf,
        free: frozenset[int] | None = None,
        others_at_most: float = math.inf,
        relaxed: bool = False,
    ) -> Answer:
        """Minimise latency, or the largest load: of all devices, or of those in `free` while the others stay below `others_at_most`.

        Args:
            at_most: placements above are of no interest; a bound is then the lesser of it and what the search proves.
            free: indices of `boxes`.
            relaxed: let groups be split into fractions, which makes a bound quickly and no placement.
        """
        unit = self._unit(at_most)
        loads = [[(column, value * unit) for column, value in terms] for terms in self.load]
        caps = self._caps(loads, free, others_at_most * unit) if self.goal == "throughput" else _Rows()
        size = self.rows.variables + 1
        with native_stdout_to_stderr():
            result = milp(
                self._costs(loads),
                constraints=[_constraint(each, size) for each in (self.rows, caps) if each.low],
                bounds=Bounds(np.zeros(size), self._upper(at_most * unit)),
                integrality=self._whole() * (not relaxed),
                options={"time_limit": max(time_limit_s, 0.01), "mip_rel_gap": 0.0},
            )
        if relaxed:
            return Answer(None, result.fun / unit if result.status == _OPTIMAL else 0.0)
        if result.status == _INFEASIBLE:
            return Answer(None, at_most)
        proven = result.mip_dual_bound
        bound = proven / unit if proven is not None and math.isfinite(proven) else 0.0
        return Answer(None if result.x is None else self._spots(result.x), min(bound, at_most))

    def _caps(self, loads: list[list[tuple[int, float]]], free: frozenset[int] | None, others: float) -> _Rows:
        """Return the rows that hold the loads below the last variable, or below what the others may have."""
        caps = _Rows()
        for box, terms in enumerate(loads):
            if free is None or box in free:
                caps.add([*terms, (self.rows.variables, -1.0)])
            else:
                caps.add(terms, high=others)
        return caps

    def _costs(self, loads: list[list[tuple[int, float]]]) -> Array:
        cost = np.zeros(self.rows.variables + 1)
        if self.goal == "throughput":
            cost[-1] = 1.0
        else:
            for column, value in itertools.chain.from_iterable(loads):
                cost[column] += value
        return cost

    def _upper(self, at_most: float) -> Array:
        upper = np.ones(self.rows.variables + 1)
        upper[: self.allowed.size] = self.allowed.ravel()
        upper[-1] = at_most if self.goal == "throughput" else np.inf
        return upper

    def _whole(self) -> Array:
        whole = np.zeros(self.rows.variables + 1)
        whole[: self.allowed.size] = 1
        if self.contiguous:
            whole[self.orders[0] : self.orders[0] + self.orders[1]] = 1
        return whole

    def _unit(self, at_most: float) -> float:
        """Return the factor that brings the objective near `_SCALE`."""
        typical = at_most if math.isfinite(at_most) else float(self.merged.cheapest.sum())
        return _SCALE / typical if typical > 0 else 1.0

    def _spots(self, x: Array) -> Spots:
        picks = x[: self.allowed.size].reshape(self.allowed.shape).argmax(axis=1)
        return [self.places[pick] for pick in picks]


def _constraint(rows: _Rows, size: int) -> LinearConstraint:
    matrix = csr_matrix((rows.values, rows.columns, rows.starts), shape=(len(rows.low), size))
    return LinearConstraint(matrix, np.array(rows.low), np.array(rows.high))
