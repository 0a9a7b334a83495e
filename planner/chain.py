"""Placing the blocks of a chain on choices (a target, in a precision, with a config), exactly, for serial latency.

A plan costs the sum of its segments and of the boundaries between them. Dynamic programming over (block, choice) finds the least in
O(n k²) for n blocks and k choices (Viterbi, 1967). Measured costs of whole segments make it O(n² k), the interval partitioning of Bellman
(1961). A limit on segments that binds multiplies time and memory (4 n k bytes) by that limit. Of plans that cost the same, the one with the
fewest segments is taken.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar, overload

import numpy as np
import numpy.typing as npt

from aivmm.errors import Infeasible, UsageError

C = TypeVar("C", bound=Hashable)
Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_NO_PLAN = np.int64(2**40)  # more segments than any plan has


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainPlan(Generic[C]):
    """The cheapest placement of a chain.

    `bound_s` is a proven lower bound on the cost of any placement: the search is exact, so it equals `cost_s`.
    """

    assignment: tuple[C, ...]  # the choice of each block
    segments: tuple[
        tuple[int, int, C], ...
    ]  # (first block, last block, choice); neighbours may have one choice, when a cut there was asked for
    cost_s: float
    bound_s: float
    seconds: float  # that the search took


@overload
def place(
    costs: Sequence[Mapping[C, float]],
    boundary: npt.ArrayLike | None = None,
    *,
    choices: Sequence[C] | None = None,
    cut: npt.ArrayLike | None = None,
    segment_cost: Callable[[int, int, C], float | None] | Array | None = None,
    min_segments: int = 1,
    max_segments: int | None = None,
) -> ChainPlan[C]: ...


@overload
def place(
    costs: npt.NDArray[Any],
    boundary: npt.ArrayLike | None = None,
    *,
    cut: npt.ArrayLike | None = None,
    segment_cost: Callable[[int, int, int], float | None] | Array | None = None,
    min_segments: int = 1,
    max_segments: int | None = None,
) -> ChainPlan[int]: ...


def place(
    costs: Any,
    boundary: npt.ArrayLike | None = None,
    *,
    choices: Sequence[Any] | None = None,
    cut: npt.ArrayLike | None = None,
    segment_cost: Callable[[int, int, Any], float | None] | Array | None = None,
    min_segments: int = 1,
    max_segments: int | None = None,
) -> ChainPlan[Any]:
    """Return the placement with the least cost, all in seconds.

    Args:
        costs: per block, choice -> cost, where a choice that is absent or infinite cannot run the block; or an array [blocks, choices], and
            then a choice is its column.
        boundary: [blocks - 1, choices, choices], or what broadcasts to it: the price of going from choice a before the boundary to b after
            it; infinite where that is impossible. The diagonal, staying without a cut, is zero. None: switching is free.
        choices: names the columns of `boundary` and `cut`, in order; by default the choices in the order in which `costs` names them.
        cut: [blocks - 1, choices], or what broadcasts to it: the price of a cut between two segments on one choice. None: no such cuts.
        segment_cost: costs of whole segments, (first block, last block, choice) -> cost, or None to add up the blocks; or an array [first
            block, last block, choice in order], with NaN to add up the blocks. What it says of a last block before the first is not read.
        min_segments: the fewest segments a plan may have.
        max_segments: the most it may have; None is no limit.

    Raises:
        Infeasible: no placement exists; the message names the block that nothing supports, or the limit that binds.
        UsageError: the limits on segments contradict themselves.
        ValueError: shapes do not fit, there are no blocks, the diagonal of `boundary` is not zero, or a cost is NaN or minus infinity.
    """
    started = time.perf_counter()
    if min_segments < 1 or (max_segments is not None and max_segments < min_segments):
        raise UsageError(
            f"no plan has at least {min_segments} and at most {max_segments} segments", advice="ask for 1 or more, at most >= least"
        )
    named, table = _table(costs, choices)
    steps = _steps(boundary, cut, *table.shape)
    priced = None if segment_cost is None else _overrides(segment_cost, named, len(table))
    starts, picks = _solve(table, steps, priced, min_segments, max_segments)
    segments = _segments(starts, picks)
    total = _price(segments, table, steps, priced)
    return ChainPlan(
        assignment=tuple(named[pick] for pick in picks),
        segments=tuple((first, last, named[pick]) for first, last, pick in segments),
        cost_s=total,
        bound_s=total,
        seconds=time.perf_counter() - started,
    )


_Priced = Array  # [first, last, choice]: what a segment costs, NaN to add up its blocks
_Solution = tuple[list[bool], list[int]]  # per block: whether a segment starts there, and the choice's index


def _table(costs: Any, choices: Sequence[Any] | None) -> tuple[Sequence[Any], Array]:
    """Return the choices in order, and the costs as [blocks, choices]."""
    if isinstance(costs, np.ndarray):
        table = np.asarray(costs, dtype=np.float64)
        if table.ndim != 2 or choices is not None:
            raise ValueError("costs as an array are [blocks, choices], and their choices have no other names")
        named: Sequence[Any] = range(table.shape[1])
    else:
        named = list(dict.fromkeys(choice for block in costs for choice in block) if choices is None else choices)
        unknown = {choice for block in costs for choice in block} - set(named)
        if unknown:
            raise ValueError(f"costs of {sorted(map(str, unknown))}, which are not among the choices")
        table = np.array([[block.get(choice, math.inf) for choice in named] for block in costs], dtype=np.float64)
        table = table.reshape(len(costs), len(named))
    if not len(table):
        raise ValueError("a chain has at least one block")
    return named, _require_costs(table, "costs")


def _steps(boundary: npt.ArrayLike | None, cut: npt.ArrayLike | None, blocks: int, width: int) -> Array:
    """Return the price of starting a new segment, [blocks - 1, from, to], with cuts within one choice on the diagonal."""
    prices = np.asarray(0.0 if boundary is None else boundary, dtype=np.float64)
    if np.any(np.diagonal(prices, axis1=-2, axis2=-1) if prices.ndim >= 2 else prices):
        raise ValueError(
            "the diagonal of boundary is staying without a cut, which is free; the price of a cut there is an argument of its own"
        )
    steps = _require_costs(np.array(np.broadcast_to(prices, (blocks - 1, width, width))), "boundary")
    within = np.asarray(math.inf if cut is None else cut, dtype=np.float64)
    diagonal = np.arange(width)
    steps[:, diagonal, diagonal] = _require_costs(np.broadcast_to(within, (blocks - 1, width)), "cut")
    return steps


def _require_costs(values: Array, name: str) -> Array:
    if np.any(np.isnan(values)) or np.any(np.isneginf(values)):
        raise ValueError(f"{name} holds NaN or minus infinity")
    return values


def _overrides(given: Callable[[int, int, Any], float | None] | Array, named: Sequence[Any], blocks: int) -> _Priced:
    """Return what segments cost as an array [first, last, choice]."""
    shape = (blocks, blocks, len(named))
    if isinstance(given, np.ndarray):
        if given.shape != shape or np.any(np.isneginf(given)):
            raise ValueError(f"segment costs as an array are {shape} and no minus infinity, not {given.shape}")
        return given
    values = np.full(shape, math.nan)
    for first, last in itertools.combinations_with_replacement(range(blocks), 2):
        for pick, choice in enumerate(named):
            value = given(first, last, choice)
            if value is None:
                continue
            if math.isnan(value) or value == -math.inf:
                raise ValueError(f"the cost of blocks {first} to {last} on {choice} is {value}")
            values[first, last, pick] = value
    return values


def _solve(table: Array, steps: Array, priced: _Priced | None, least: int, most: int | None) -> _Solution:
    """Search without limits first: its optimum usually keeps them, and then it is the optimum within them too."""
    if least > len(table):
        raise Infeasible(f"{len(table)} blocks cannot make {least} segments", advice=f"ask for at most {len(table)}")
    free = _search(table, steps, priced, 1, saturating=True) if table.size else None
    if free is None:
        _raise_unsupported(table)
    needed = sum(free[0])
    if least <= needed and (most is None or needed <= most):
        return free
    if most is None or most >= len(table):
        found = _search(table, steps, priced, least, saturating=True)
    else:
        found = _search(table, steps, priced, most, saturating=False, least=least)
    if found is None:
        _raise_limits(table, steps, priced, least, most)
    return found


def _search(
    table: Array, steps: Array, priced: _Priced | None, layers: int, *, saturating: bool, least: int | None = None
) -> _Solution | None:
    """Return the cheapest plan, or None.

    Layer l holds plans of l + 1 segments; when saturating, the last layer holds those of more as well, and only it is allowed at the end;
    otherwise the layers of `least` segments and more are.
    """
    first_allowed = (layers if least is None else least) - 1
    solver = _additive if priced is None else _with_measured_segments
    return solver(table, steps, priced, layers, saturating, first_allowed)


def _additive(table: Array, steps: Array, priced: _Priced | None, layers: int, saturating: bool, first_allowed: int) -> _Solution | None:
    """Search with segments that cost the sum of their blocks: a state is (layer, choice) of the block reached."""
    blocks, width = table.shape
    cost, count = _origin(layers, width)
    cost[0] += table[0]
    # Where each state came from: -1 stayed in its segment, else see `_arrivals`.
    origins = np.full((blocks, layers, width), -1, dtype=np.int32)
    for block in range(1, blocks):
        arrived, arrived_count, origin = _arrivals(cost, count, steps[block - 1], saturating)
        better = _lexically_less(arrived, arrived_count, cost, count)
        cost = np.where(better, arrived, cost) + table[block]
        count = np.where(better, arrived_count, count)
        origins[block] = np.where(better, origin, -1)
    end = _best_end(cost, count, first_allowed)
    if end is None:
        return None
    (layer, pick), starts, picks = end, [True] * blocks, [0] * blocks
    for block in reversed(range(blocks)):
        picks[block] = pick
        came = int(origins[block, layer, pick])
        starts[block] = block == 0 or came >= 0
        if came >= 0:
            layer, pick = _came_from(came, layer, width)
    return starts, picks


def _with_measured_segments(
    table: Array, steps: Array, priced: _Priced | None, layers: int, saturating: bool, first_allowed: int
) -> _Solution | None:
    """Search with segments that have costs of their own: a state is (layer, choice) of a segment that starts at a block, or ends there."""
    assert priced is not None
    blocks, width = table.shape
    before = np.full((layers, blocks, width), math.inf)  # the cost of all that lies before a segment that starts at the block
    counts = np.full((layers, blocks, width), _NO_PLAN)
    before[:, 0], counts[:, 0] = _origin(layers, width)
    came = np.full((layers, blocks, width), -1, dtype=np.int32)
    began = np.zeros((blocks, layers, width), dtype=np.int32)
    sums = np.zeros((blocks, width))  # [first, choice]: the blocks from `first` to `last` added up
    for last in range(blocks):
        sums[: last + 1] += table[last]
        whole = before[:, : last + 1] + _overridden(sums[: last + 1], priced, last)
        cost = whole.min(axis=1)
        tied = np.where(whole == cost[:, None], counts[:, : last + 1], _NO_PLAN)
        began[last], count = tied.argmin(axis=1), tied.min(axis=1)
        if last + 1 < blocks:
            before[:, last + 1], counts[:, last + 1], came[:, last + 1] = _arrivals(cost, count, steps[last], saturating)
    end = _best_end(cost, count, first_allowed)
    if end is None:
        return None
    (layer, pick), starts, picks, last = end, [False] * blocks, [0] * blocks, blocks - 1
    while last >= 0:
        first = int(began[last, layer, pick])
        starts[first] = True
        picks[first : last + 1] = [pick] * (last + 1 - first)
        if first:
            layer, pick = _came_from(int(came[layer, first, pick]), layer, width)
        last = first - 1
    return starts, picks


def _overridden(sums: Array, priced: _Priced, last: int) -> Array:
    """Return [first, choice]: the cost of the segment that ends at `last`, measured where it is."""
    measured = priced[: last + 1, last]
    return np.where(np.isnan(measured), sums, measured)


def _origin(layers: int, width: int) -> tuple[Array, Counts]:
    """Return cost and segment count per (layer, choice) before the first block: one segment is open, and has cost nothing yet."""
    cost, count = np.full((layers, width), math.inf), np.full((layers, width), _NO_PLAN)
    cost[0], count[0] = 0.0, 1
    return cost, count


def _arrivals(cost: Array, count: Counts, step: Array, saturating: bool) -> tuple[Array, Counts, npt.NDArray[np.int32]]:
    """Start a new segment in every state: return its cost, its number of segments, and where it came from.

    That is the choice before, and that plus the number of choices when it came from the last layer itself.
    """
    layers, width = cost.shape
    moved = cost[:, :, None] + step
    best = moved.min(axis=1)
    tied = np.where(moved == best[:, None], count[:, :, None], _NO_PLAN)
    via, more = tied.argmin(axis=1).astype(np.int32), tied.min(axis=1) + 1
    arrived, arrived_count = np.full((layers, width), math.inf), np.full((layers, width), _NO_PLAN)
    origin = np.zeros((layers, width), dtype=np.int32)
    arrived[1:], arrived_count[1:], origin[1:] = best[:-1], more[:-1], via[:-1]
    if saturating:
        better = _lexically_less(best[-1], more[-1], arrived[-1], arrived_count[-1])
        arrived[-1] = np.where(better, best[-1], arrived[-1])
        arrived_count[-1] = np.where(better, more[-1], arrived_count[-1])
        origin[-1] = np.where(better, via[-1] + width, origin[-1])
    return arrived, arrived_count, origin


def _came_from(origin: int, layer: int, width: int) -> tuple[int, int]:
    """Return the (layer, choice) before a new segment; the inverse of what `_arrivals` notes."""
    return (layer, origin - width) if origin >= width else (layer - 1, origin)


def _lexically_less(cost: Array, count: Counts, other_cost: Array, other_count: Counts) -> npt.NDArray[np.bool_]:
    """Say where (cost, count) is less than the other: cheaper, or as cheap with fewer segments."""
    less: npt.NDArray[np.bool_] = (cost < other_cost) | ((cost == other_cost) & (count < other_count))
    return less


def _best_end(cost: Array, count: Counts, first_allowed: int) -> tuple[int, int] | None:
    """Return the best (layer, choice) of the last block, or None when nothing got there."""
    allowed = cost[first_allowed:]
    best = allowed.min(initial=math.inf)
    if not math.isfinite(best):
        return None
    tied = np.where(allowed == best, count[first_allowed:], _NO_PLAN + 1)
    layer, pick = divmod(int(tied.argmin()), cost.shape[1])
    return layer + first_allowed, pick


def _segments(starts: list[bool], picks: list[int]) -> list[tuple[int, int, int]]:
    firsts = [block for block, start in enumerate(starts) if start]
    return [(first, after - 1, picks[first]) for first, after in zip(firsts, [*firsts[1:], len(starts)], strict=True)]


def _price(segments: list[tuple[int, int, int]], table: Array, steps: Array, priced: _Priced | None) -> float:
    """Return what a plan costs, added up without rounding in between."""
    parts: list[float] = []
    for first, last, pick in segments:
        measured = math.nan if priced is None else float(priced[first, last, pick])
        parts += table[first : last + 1, pick].tolist() if math.isnan(measured) else [measured]
    parts += [float(steps[one[1], one[2], next_one[2]]) for one, next_one in itertools.pairwise(segments)]
    return math.fsum(parts)


def _raise_unsupported(table: Array) -> NoReturn:
    """Say why there is no plan at all."""
    nowhere = [block for block, costs in enumerate(table) if not np.isfinite(costs).any()]
    if nowhere:
        more = f" (nor {len(nowhere) - 1} more)" if len(nowhere) > 1 else ""
        raise Infeasible(f"no choice supports block {nowhere[0]}{more}", advice="allow more targets or precisions")
    raise Infeasible("no placement connects the blocks: boundaries between their choices are impossible", advice="allow more targets")


def _raise_limits(table: Array, steps: Array, priced: _Priced | None, least: int, most: int | None) -> NoReturn:
    """Say which limit on segments binds."""

    def feasible(values: Array) -> Array:
        return np.where(np.isfinite(values), 0.0, math.inf)

    free = None if priced is None else np.where(np.isnan(priced), priced, feasible(priced))
    fewest = _search(feasible(table), feasible(steps), free, 1, saturating=True)
    needed = sum(fewest[0]) if fewest else 0
    if most is not None and needed > most:
        raise Infeasible(f"no placement has at most {most} segments", advice=f"allow {needed}")
    raise Infeasible(f"the chain cannot be cut into {least} segments", advice="ask for fewer, or allow cuts within one target")
