"""Pipelines: which run of blocks goes to which target, so that the slowest stage sets the pace, with what stages cost each other.

Two stages that run at once on one package share its caches, its bandwidth and its cores, so each takes longer than alone. By how much is
measured in place for the pairs that a plan uses together, enters the throughput objective as the problem's contention, and the plan is made
anew with it, until the plan rests on factors that were measured. What is not measured yet is taken to cost nothing beside another device,
which is the most that can be hoped for: a pair is looked at whenever hoping for it could make a plan the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from aivmm.errors import Infeasible, UsageError
from aivmm.planner.evaluate import evaluate
from aivmm.planner.problem import Choice, Edge, Move, Node, PlacedDevice, Problem
from aivmm.planner.solve import Solution, solve

Pair = tuple[str, str]  # (target slowed, target beside it)
Run = tuple[int, int, str]  # first and last block, and the target
Replicas = Mapping[str, int]  # of the stage on a target, where it is more than one
MeasureFactors = Callable[[Sequence[Run], Replicas], Mapping[Pair, float]]

_TIME_LIMIT_S = 1.0
_SAME = 1e-9  # relative; differences below are rounding
_MOST_REPLICAS = 64  # of a stage, as a plan may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A pipelined plan. `load_s` is the time per request of its slowest stage beside the others, `bound_s` what no such plan is below."""

    runs: tuple[Run, ...]
    replicas: Replicas
    load_s: float
    bound_s: float
    factors: Mapping[Pair, float]  # measured, of the pairs that it uses together; a target beside itself where it has replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What limits a plan beside its blocks' costs: no plan that breaks it can be written down.

    `block_bytes` are what each block takes on a device, in each replica; `memory_bytes` the room on each target, infinite where it is not
    named. A stage has `most_replicas` replicas at most, by target.
    """

    block_bytes: Sequence[float] = ()
    memory_bytes: Mapping[str, float] = field(default_factory=dict)
    most_replicas: Mapping[str, int] = field(default_factory=dict)


_NO_LIMITS = Room()


def pipeline_problem(
    costs: Mapping[str, Sequence[float | None]],
    crossing_bytes: Sequence[int],
    moves: Mapping[Pair, Move],
    factors: Mapping[Pair, float],
    room: Room = _NO_LIMITS,
) -> Problem:
    """Return the problem of placing a chain of blocks for throughput, each target on its own part of the machine.

    A choice is a target and a number of replicas, r: `a`, `a x2`. Per request it costs what r replicas beside each other take, over r, and
    it takes r times the memory.

    Args:
        costs: seconds of each block, by target; None where it does not run.
        crossing_bytes: what crosses the boundary before each block but the first.
        moves: what handing over costs, by (sender, reader); pairs that are missing cannot follow each other.
        factors: how many times as long the first takes beside the second; of one target, a replica beside another.
        room: memory and replicas.
    """
    names = list(costs)
    count = len(next(iter(costs.values())))
    held = room.block_bytes or [0.0] * count
    ways = {_choice(name, number): (name, number) for name in names for number in range(1, room.most_replicas.get(name, 1) + 1)}
    # Seconds per request of what takes a second alone.
    scale = {way: (1.0 + (number - 1) * (factors.get((name, name), 1.0) - 1.0)) / number for way, (name, number) in ways.items()}
    able = [(a, b) for a in ways for b in ways if ways[a][0] != ways[b][0]]
    return Problem(
        devices=[PlacedDevice(name=name, memory_bytes=room.memory_bytes.get(name, math.inf)) for name in names],
        choices=[Choice(name=way, target=way, device=name) for way, (name, _) in ways.items()],
        nodes=[
            Node(
                id=str(index),
                costs={way: cost * scale[way] for way, (name, _) in ways.items() if (cost := costs[name][index]) is not None},
                memory_bytes={way: held[index] * number for way, (_, number) in ways.items()},
            )
            for index in range(count)
        ],
        edges=[Edge(source=str(index), reader=str(index + 1), bytes=float(size)) for index, size in enumerate(crossing_bytes)],
        transfers={
            (a, b): Move(fixed=move.fixed * scale[b], per_byte=move.per_byte * scale[b])
            for a, b in able
            if (move := moves.get((ways[a][0], ways[b][0]))) is not None
        },
        unsupported=frozenset(
            (a, b) for a in ways for b in ways if a != b and ((a, b) not in able or (ways[a][0], ways[b][0]) not in moves)
        ),
        contention={pair: factor for pair, factor in factors.items() if set(pair) <= set(names) and pair[0] != pair[1]},
    )


def _choice(name: str, replicas: int) -> str:
    return name if replicas == 1 else f"{name} x{replicas}"


def look_at_pipelines(
    costs: Mapping[str, Sequence[float | None]],
    crossing_bytes: Sequence[int],
    moves: Mapping[Pair, Move],
    measure: MeasureFactors,
    *,
    room: Room = _NO_LIMITS,
    most: int = 4,
    forced: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> list[Pipeline]:
    """Return the pipelines whose stages' effect on each other was measured, the fastest first.

    `measure` returns the factors of the stages of a plan beside each other, and nothing where they cannot be measured; it is asked at most
    `most` times. Looks end with a plan that is known, or where one stage is as good as any; unless it is `forced` to be cut, so that plans
    of one stage do not count. `stop` ends them before the next is measured. `bound_s` holds for the factors known when the plan was found.

    One stage in several replicas is for `copies` to measure. What these cost each other is not known here, so they are no reason not to
    look at plans that are cut: from then on only at those.
    """
    factors: dict[Pair, float] = {}
    seen: dict[tuple[tuple[Run, ...], tuple[tuple[str, int], ...]], Pipeline] = {}
    for _ in range(most + 2):
        found = _best(pipeline_problem(costs, crossing_bytes, moves, factors, room), forced=forced)
        if found is None:
            break
        ways = [found.assignment[str(index)].choice for index in range(len(crossing_bytes) + 1)]
        runs, replicas = _runs(ways, costs)
        if len(runs) < 2:
            if not replicas:
                break
            forced = True
            continue
        key = (runs, tuple(replicas.items()))
        if key in seen or len(seen) == most or stop():
            break
        pairs = [(a, b) for _, _, a in runs for _, _, b in runs if a != b or a in replicas]
        known = measure(runs, replicas)
        if any(pair not in known for pair in pairs):
            break
        factors |= {pair: max(1.0, known[pair]) for pair in pairs}
        mine = {pair: factors[pair] for pair in pairs}
        load = evaluate(pipeline_problem(costs, crossing_bytes, moves, mine, room), found.assignment).objective("throughput")
        seen[key] = Pipeline(runs=runs, replicas=replicas, load_s=load, bound_s=found.bound, factors=mine)
    return sorted(seen.values(), key=lambda each: each.load_s)


def hoped_pipeline(
    costs: Mapping[str, Sequence[float | None]], crossing_bytes: Sequence[int], moves: Mapping[Pair, Move], room: Room = _NO_LIMITS
) -> Pipeline | None:
    """Return the best plan of several stages if stages left each other alone: no pipeline is faster. None where there is none."""
    problem = pipeline_problem(costs, crossing_bytes, moves, {}, room)
    found = _best(problem, forced=True)
    if found is None:
        return None
    runs, replicas = _runs([found.assignment[each.id].choice for each in problem.nodes], costs)
    return Pipeline(runs=runs, replicas=replicas, load_s=found.objective, bound_s=found.bound, factors={})


def _best(problem: Problem, *, forced: bool) -> Solution | None:
    """Return the best contiguous plan; None where there is none, or none within the time.

    Where it is `forced` to be cut, the first and the last block are on different devices, which is the same where each device has one run.
    """
    first, last = problem.nodes[0], problem.nodes[-1]
    problems = [problem]
    if forced:
        device = {each.name: each.device for each in problem.choices}

        def with_ends(name: str) -> Problem:
            head = replace(first, costs={way: cost for way, cost in first.costs.items() if device[way] == name})
            tail = replace(last, costs={way: cost for way, cost in last.costs.items() if device[way] != name})
            return replace(problem, nodes=[head, *problem.nodes[1:-1], tail])

        problems = [with_ends(each.name) for each in problem.devices] if len(problem.nodes) > 1 else []
    solutions, bounds = [], []
    for each in problems:
        try:
            solutions.append(solve(each, "throughput", contiguous=True, time_limit_s=_TIME_LIMIT_S))
            bounds.append(solutions[-1].bound)
        except Infeasible:
            continue
        except UsageError:  # none within the time: nothing is proven of these
            bounds.append(0.0)
    best = min(solutions, key=lambda each: each.objective, default=None)
    return None if best is None else replace(best, bound=min(bounds))


def place_pipeline(
    costs: Mapping[str, Sequence[float | None]],
    crossing_bytes: Sequence[int],
    moves: Mapping[Pair, Move],
    measure: MeasureFactors,
    *,
    room: Room = _NO_LIMITS,
    most: int = 4,
) -> Pipeline | None:
    """Return the best pipeline that `look_at_pipelines` finds; None where one stage is as good, or there is none."""
    best = next(iter(look_at_pipelines(costs, crossing_bytes, moves, measure, room=room, most=most)), None)
    return best if best is not None and best.load_s < in_one_stage(costs, room) * (1 - _SAME) else None


def in_one_stage(costs: Mapping[str, Sequence[float | None]], room: Room) -> float:
    """Return the least that the whole takes on one target that has the memory; infinite where there is none."""
    held = math.fsum(room.block_bytes)
    able = [each for name, each in costs.items() if held <= room.memory_bytes.get(name, math.inf)]
    return min((math.fsum(each) for each in able if None not in each), default=math.inf)  # type: ignore[arg-type]


def _runs(ways: Sequence[str], names: Iterable[str]) -> tuple[tuple[Run, ...], Replicas]:
    """Return the runs of equal choices as targets, and the replicas of those that have several."""
    by_choice = {_choice(name, number): (name, number) for name in names for number in range(1, _MOST_REPLICAS + 1)}
    runs: list[Run] = []
    replicas: dict[str, int] = {}
    for index, way in enumerate(ways):
        name, number = by_choice[way]
        if runs and runs[-1][2] == name:
            runs[-1] = (runs[-1][0], index, name)
        else:
            runs.append((index, index, name))
        if number > 1:
            replicas[name] = number
    return tuple(runs), replicas
