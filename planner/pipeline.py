"""Pipelines: which run of blocks goes to which target, so that the slowest stage sets the pace, with what stages cost each other.

Two stages that run at once on one package share its caches, its bandwidth and its cores, so each takes longer than alone. By how much is
measured in place for the pairs that a plan uses together, enters the throughput objective as the problem's contention, and the plan is made
anew with it, until the plan rests on factors that were measured. What is not measured yet is taken to cost nothing beside another device,
which is the most that can be hoped for: a pair is looked at whenever hoping for it could make a plan the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from aivmm.errors import Infeasible, UsageError
from aivmm.planner.evaluate import evaluate
from aivmm.planner.problem import Choice, Edge, Move, Node, PlacedDevice, Problem
from aivmm.planner.solve import solve

Pair = tuple[str, str]  # (target slowed, target beside it)
Run = tuple[int, int, str]  # first and last block, and the target
MeasureFactors = Callable[[Sequence[Run]], Mapping[Pair, float]]

_TIME_LIMIT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A pipelined plan. `load_s` is the time per request of its slowest stage beside the others, `bound_s` what no such plan is below."""

    runs: tuple[Run, ...]
    load_s: float
    bound_s: float
    factors: Mapping[Pair, float]  # measured, of the pairs that it uses together


def pipeline_problem(
    costs: Mapping[str, Sequence[float | None]],
    crossing_bytes: Sequence[int],
    moves: Mapping[Pair, Move],
    factors: Mapping[Pair, float],
) -> Problem:
    """Return the problem of placing a chain of blocks for throughput, each target on its own part of the machine.

    Args:
        costs: seconds of each block, by target; None where it does not run.
        crossing_bytes: what crosses the boundary before each block but the first.
        moves: what handing over costs, by (sender, reader); pairs that are missing cannot follow each other.
        factors: how many times as long the first takes beside the second.
    """
    names = list(costs)
    count = len(next(iter(costs.values())))
    return Problem(
        devices=[PlacedDevice(name=name) for name in names],
        choices=[Choice(name=name, target=name, device=name) for name in names],
        nodes=[
            Node(id=str(index), costs={name: cost for name, each in costs.items() if (cost := each[index]) is not None})
            for index in range(count)
        ],
        edges=[Edge(source=str(index), reader=str(index + 1), bytes=float(size)) for index, size in enumerate(crossing_bytes)],
        transfers={(a, b): moves[a, b] for a in names for b in names if a != b and (a, b) in moves},
        unsupported=frozenset((a, b) for a in names for b in names if a != b and (a, b) not in moves),
        contention={pair: factor for pair, factor in factors.items() if set(pair) <= set(names)},
    )


def place_pipeline(
    costs: Mapping[str, Sequence[float | None]],
    crossing_bytes: Sequence[int],
    moves: Mapping[Pair, Move],
    measure: MeasureFactors,
    *,
    most: int = 4,
) -> Pipeline | None:
    """Return the best pipeline whose stages' effect on each other was measured; None where one stage is best, or no plan was possible.

    `measure` returns the factors of the stages of a plan beside each other, and nothing where they cannot be measured; it is asked at most
    `most` times. `bound_s` holds for the factors known when the plan was found.
    """
    factors: dict[Pair, float] = {}
    seen: dict[tuple[Run, ...], Pipeline] = {}
    alone = math.inf
    for _ in range(most + 1):
        problem = pipeline_problem(costs, crossing_bytes, moves, factors)
        try:
            found = solve(problem, "throughput", contiguous=True, time_limit_s=_TIME_LIMIT_S)
        except (Infeasible, UsageError):  # no plan, or none within the time
            break
        runs = _runs([found.assignment[str(index)].choice for index in range(len(crossing_bytes) + 1)])
        if len(runs) < 2:
            alone = found.objective
            break
        if runs in seen or len(seen) == most:
            break
        pairs = [(a, b) for _, _, a in runs for _, _, b in runs if a != b]
        known = measure(runs)
        if any(pair not in known for pair in pairs):
            break
        factors |= {pair: max(1.0, known[pair]) for pair in pairs}
        own = pipeline_problem(costs, crossing_bytes, moves, {pair: factors[pair] for pair in pairs})
        load = evaluate(own, found.assignment).objective("throughput")
        seen[runs] = Pipeline(runs=runs, load_s=load, bound_s=found.bound, factors={pair: factors[pair] for pair in pairs})
    best = min(seen.values(), key=lambda each: each.load_s, default=None)
    return best if best is not None and best.load_s < alone else None


def _runs(names: Sequence[str]) -> tuple[Run, ...]:
    """Return the runs of equal names."""
    runs: list[Run] = []
    for index, name in enumerate(names):
        if runs and runs[-1][2] == name:
            runs[-1] = (runs[-1][0], index, name)
        else:
            runs.append((index, index, name))
    return tuple(runs)
