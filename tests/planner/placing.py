"""Small placement problems for tests, and what every plan of them costs by the definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from aivmm.planner.evaluate import evaluate
from aivmm.planner.problem import Choice, Edge, Goal, Move, Node, Place, PlacedDevice, Problem

_HERE = Path(__file__).resolve()
_NUMBER = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 7.0])  # whole, so that ties are common and sums exact
_MOST_PLANS = 1500


@st.composite
def problems(draw: st.DrawFn, *, contention: bool = True) -> Problem:
    """Draw problems small enough for brute force: unsupported nodes and pairs, tight memory, colocation, several tensors, lone nodes."""
    devices = [
        PlacedDevice(
            name=f"d{index}", count=draw(st.sampled_from([1, 1, 2])), memory_bytes=draw(st.sampled_from([math.inf, 1.0, 3.0, 5.0]))
        )
        for index in range(draw(st.integers(1, 3)))
    ]
    choices = [Choice(name=f"c{index}", target=f"t{index}", device=each.name) for index, each in enumerate(devices)]
    if draw(st.booleans()):
        more = draw(st.sampled_from(choices))
        choices.append(Choice(name="other", target=draw(st.sampled_from([more.target, "t9"])), device=more.device))
    places = sum(each.count for choice in choices for each in devices if each.name == choice.device)
    most = max(1, int(math.log(_MOST_PLANS, max(places, 2))))
    size = draw(st.integers(1, most) | st.integers(min(3, most), most))
    nodes = [draw(_nodes(f"n{index}", [each.name for each in choices])) for index in range(size)]
    edges = [
        Edge(source=f"n{one}", reader=f"n{other}", tensor=tensor)
        for one, other in itertools.combinations(range(size), 2)
        for tensor in draw(st.sampled_from([[], [], [""], [""], ["y"], ["", "y"]]))
    ]
    sizes = {(each.source, each.tensor): draw(_NUMBER) for each in edges}
    edges = [Edge(source=each.source, reader=each.reader, tensor=each.tensor, bytes=sizes[each.source, each.tensor]) for each in edges]
    targets = sorted({each.target for each in choices})
    alike = draw(st.booleans())  # whether a reader pays the same wherever a tensor comes from
    prices = {target: draw(_moves()) for target in targets}
    transfers = {(one, other): prices[other] if alike else draw(_moves()) for one in targets for other in targets}
    barred = {pair for pair in transfers if draw(st.integers(0, 7)) == 0}
    slowed = {(one.name, other.name): draw(st.sampled_from([1.0, 1.5, 3.0])) for one in devices for other in devices}
    return Problem(
        devices=devices,
        choices=choices,
        nodes=nodes,
        edges=edges,
        transfers={pair: move for pair, move in transfers.items() if pair not in barred},
        exports={target: draw(_moves()) for target in targets if draw(st.booleans())},
        unsupported=frozenset(barred),
        contention=slowed if contention and draw(st.booleans()) else {},
    )


@st.composite
def _moves(draw: st.DrawFn) -> Move:
    return Move(draw(_NUMBER), draw(st.sampled_from([0.0, 1.0, 2.0])))


@st.composite
def _nodes(draw: st.DrawFn, name: str, choices: list[str]) -> Node:
    costs = {choice: draw(_NUMBER) for choice in choices if draw(st.integers(0, 5))}
    memory = draw(st.sampled_from([0.0, 1.0, 2.0])) if draw(st.booleans()) else {choice: draw(_NUMBER) for choice in choices}
    return Node(id=name, costs=costs, memory_bytes=memory, colocation=draw(st.sampled_from([None, None, None, "a", "b"])))


def plans(problem: Problem) -> Iterator[Mapping[str, Place]]:
    """Yield every way to place the nodes."""
    counts = {each.name: each.count for each in problem.devices}
    places = {each.name: [Place(each.name, index) for index in range(counts[each.device])] for each in problem.choices}
    open_to = [[place for choice in node.costs for place in places[choice]] for node in problem.nodes]
    for spots in itertools.product(*open_to):
        yield {node.id: place for node, place in zip(problem.nodes, spots, strict=True)}


def optima(problem: Problem) -> dict[tuple[Goal, bool], float]:
    """Return the least that any allowed plan costs, by goal and by whether it is contiguous; infinite where there is none."""
    goals: tuple[Goal, ...] = ("latency", "throughput")
    best = dict.fromkeys(itertools.product(goals, (False, True)), math.inf)
    for assignment in plans(problem):
        found = evaluate(problem, assignment)
        if found.broken:
            continue
        for goal, contiguous in best:
            if found.contiguous or not contiguous:
                best[goal, contiguous] = min(best[goal, contiguous], found.objective(goal))
    return best


def dense(seed: int, size: int = 5) -> Problem:
    """Return a graph with many skips and tensors of many readers on three kinds of devices, where sharing pays and memory often binds."""
    random = np.random.default_rng(seed)
    names, counts = ["a", "b", "c"], [1, 2, 1]
    nodes = [
        Node(
            id=str(index),
            costs={name: float(random.integers(2, 12)) for name in names if random.random() < 0.9},
            memory_bytes=float(random.integers(0, 3)),
        )
        for index in range(size)
    ]
    pairs = [pair for pair in itertools.combinations(range(size), 2) if random.random() < 0.6]
    sizes = random.integers(0, 4, size).tolist()
    to = {name: float(random.integers(0, 3)) for name in names}
    by_pair = seed % 2
    return Problem(
        devices=[PlacedDevice(name=name, count=count, memory_bytes=4.0) for name, count in zip(names, counts, strict=True)],
        choices=[Choice(name=name, target=name, device=name) for name in names],
        nodes=nodes,
        edges=[Edge(source=str(one), reader=str(other), bytes=sizes[one]) for one, other in pairs],
        transfers={
            (one, other): Move(to[other] + by_pair * float(random.integers(0, 3)), 0.5) for one, other in itertools.product(names, names)
        },
        exports={name: Move(0.0, 1.0) for name in names[1:]},
    )


def constrained(seed: int, size: int = 5) -> Problem:
    """Return a graph with all that can be in the way at once: contention, tight memory, colocation, nodes and pairs not supported."""
    random = np.random.default_rng(seed)
    names = ["a", "b", "c"]
    nodes = [
        Node(
            id=str(index),
            costs={name: float(random.integers(0, 9)) for name in names if random.random() < 0.8},
            memory_bytes=float(random.integers(0, 3)),
            colocation="pair" if index in (1, size - 1) else None,
        )
        for index in range(size)
    ]
    pairs = [pair for pair in itertools.combinations(range(size - 1), 2) if random.random() < 0.5]  # the last node is alone
    moves = {(one, other): Move(float(random.integers(0, 3)), 1.0) for one, other in itertools.permutations(names, 2)}
    barred = ("a", "b") if seed % 2 else ("c", "a")
    return Problem(
        devices=[PlacedDevice(name=name, memory_bytes=float(random.integers(3, 6))) for name in names],
        choices=[Choice(name=name, target=name, device=name) for name in names],
        nodes=nodes,
        edges=[Edge(source=str(one), reader=str(other), bytes=float(one % 2)) for one, other in pairs],
        transfers={pair: move for pair, move in moves.items() if pair != barred},
        unsupported=frozenset({barred}),
        contention={pair: float(random.choice([1.0, 1.5, 2.5])) for pair in itertools.permutations(names, 2)},
    )


def relaxations(problem: Problem) -> dict[str, Problem]:
    """Return the problem without each of the things in its way, by name: no optimum is worse there."""
    free = {pair: Move() for pair in problem.unsupported}
    return {
        "contention": replace(problem, contention={}),
        "memory": replace(problem, devices=[replace(each, memory_bytes=math.inf) for each in problem.devices]),
        "colocation": replace(problem, nodes=[replace(each, colocation=None) for each in problem.nodes]),
        "pairs": replace(problem, transfers={**problem.transfers, **free}, unsupported=frozenset()),
        "edges": replace(problem, edges=[]),
    }


def chain(*costs: Mapping[str, float], boundary: float = 1.0, **limits: float) -> Problem:
    """Return nodes "0", "1", ... in a row; a choice is a device and a target of its own, and moving a tensor costs `boundary`."""
    names = sorted({name for each in costs for name in each})
    return Problem(
        devices=[PlacedDevice(name=name, memory_bytes=limits.get(name, math.inf)) for name in names],
        choices=[Choice(name=name, target=name, device=name) for name in names],
        nodes=[Node(id=str(index), costs=each, memory_bytes=1.0) for index, each in enumerate(costs)],
        edges=[Edge(source=str(index), reader=str(index + 1)) for index in range(len(costs) - 1)],
        transfers={(one, other): Move(boundary) for one in names for other in names},
    )


def published(name: str) -> Path:
    """Return the file of a published instance; skip the test where there is none."""
    found = [parent / "shared" / "planner_instances" / f"throughput_{name}.json" for parent in _HERE.parents]
    path = next((each for each in found if each.exists()), None)
    if path is None:
        pytest.skip("../shared/planner_instances is not here: it is not part of the repository")
    return path
