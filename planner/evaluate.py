"""What an assignment costs and whether it is allowed, straight from the problem's definition.

Every plan of every solver passes through here last. It shares no code with the solvers, so that a mistake in their arithmetic shows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from aivmm.errors import UsageError
from aivmm.planner.problem import Choice, Edge, Goal, Place, PlacedDevice, Problem, topological_order

Device = tuple[str, int]  # a device's name and its number among the identical ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An assignment by the definition. `broken` lists the rules that it breaks, each in a sentence; empty: it is allowed."""

    loads: Mapping[Device, float]  # of the devices used, without contention
    slowed: Mapping[Device, float]  # with contention
    contiguous: bool
    broken: tuple[str, ...]

    def objective(self, goal: Goal) -> float:
        """Return latency (the sum) or throughput (the largest)."""
        return math.fsum(self.loads.values()) if goal == "latency" else max(self.slowed.values())


def evaluate(problem: Problem, assignment: Mapping[str, Place]) -> Evaluation:
    """Price and check an assignment of every node to a place."""
    devices = {each.name: each for each in problem.devices}
    choices = {each.name: each for each in problem.choices}
    broken = [*_unplaced(problem, assignment, devices, choices)]
    if broken:
        return Evaluation(loads={}, slowed={}, contiguous=False, broken=tuple(broken))
    on = {id: (choices[place.choice].device, place.number) for id, place in assignment.items()}
    broken += [*_over_memory(problem, assignment, on, devices), *_apart(problem, assignment)]
    parts: dict[Device, list[float]] = defaultdict(list)
    for node in problem.nodes:
        parts[on[node.id]].append(node.costs[assignment[node.id].choice])
    for edges in _tensors(problem):
        broken += _charge(problem, edges, assignment, choices, parts)
    loads = {device: math.fsum(values) for device, values in parts.items()}
    return Evaluation(
        loads=loads,
        slowed={device: load * _slowdown(problem, device, list(loads)) for device, load in loads.items()},
        contiguous=_is_contiguous(problem, assignment, on),
        broken=tuple(broken),
    )


def _unplaced(
    problem: Problem, assignment: Mapping[str, Place], devices: Mapping[str, PlacedDevice], choices: Mapping[str, Choice]
) -> list[str]:
    broken = [f"unknown node {id!r}" for id in assignment.keys() - {node.id for node in problem.nodes}]
    for node in problem.nodes:
        place = assignment.get(node.id)
        if place is None:
            broken.append(f"node {node.id!r} is not placed")
        elif place.choice not in node.costs:
            broken.append(f"{place.choice!r} does not support node {node.id!r}")
        elif not 0 <= place.number < devices[choices[place.choice].device].count:
            broken.append(f"there is no device {place.number} for {place.choice!r}, where node {node.id!r} is placed")
    return broken


def _over_memory(
    problem: Problem, assignment: Mapping[str, Place], on: Mapping[str, Device], devices: Mapping[str, PlacedDevice]
) -> list[str]:
    held: dict[Device, list[float]] = defaultdict(list)
    for node in problem.nodes:
        held[on[node.id]].append(node.memory_in(assignment[node.id].choice))
    return [
        f"{device[0]}:{device[1]} holds {math.fsum(values):.6g} of {devices[device[0]].memory_bytes:.6g} bytes"
        for device, values in held.items()
        if math.fsum(values) > devices[device[0]].memory_bytes
    ]


def _apart(problem: Problem, assignment: Mapping[str, Place]) -> list[str]:
    places: dict[str, set[Place]] = defaultdict(set)
    for node in problem.nodes:
        if node.colocation is not None:
            places[node.colocation].add(assignment[node.id])
    return [f"the nodes of class {name!r} are at {len(found)} places" for name, found in places.items() if len(found) > 1]


def _tensors(problem: Problem) -> list[list[Edge]]:
    """Return the edges, those of one tensor together."""
    found: dict[tuple[str, str], list[Edge]] = defaultdict(list)
    for edge in problem.edges:
        found[edge.source, edge.tensor].append(edge)
    return list(found.values())


def _charge(
    problem: Problem,
    edges: list[Edge],
    assignment: Mapping[str, Place],
    choices: Mapping[str, Choice],
    parts: dict[Device, list[float]],
) -> list[str]:
    """Add what one tensor costs to `parts`; return the unsupported pairs that it meets."""
    sender = assignment[edges[0].source]
    source = choices[sender.choice]
    broken = []
    elsewhere = {assignment[edge.reader] for edge in edges} - {sender}
    if elsewhere and source.target in problem.exports:
        parts[source.device, sender.number].append(problem.exports[source.target].cost(edges[0].bytes))
    for place in elsewhere:
        reader = choices[place.choice]
        pair = (source.target, reader.target)
        if pair in problem.transfers:
            parts[reader.device, place.number].append(problem.transfers[pair].cost(edges[0].bytes))
        else:
            broken.append(f"nothing moves from {pair[0]!r} to {pair[1]!r}, as node {edges[0].source!r} needs")
    return broken


def _slowdown(problem: Problem, device: Device, used: list[Device]) -> float:
    beside = [other for other in used if other != device]
    return 1.0 + math.fsum(problem.contention.get((device[0], other[0]), 1.0) - 1.0 for other in beside)


def _is_contiguous(problem: Problem, assignment: Mapping[str, Place], on: Mapping[str, Device]) -> bool:
    places = set(assignment.values())
    segments = sorted({f"{name} {index}" for name, index in on.values()})
    if len(places) > len(segments):
        return False
    crossing = {(on[edge.source], on[edge.reader]) for edge in problem.edges if on[edge.source] != on[edge.reader]}
    try:
        topological_order(segments, [(f"{one[0]} {one[1]}", f"{other[0]} {other[1]}") for one, other in crossing])
    except UsageError:
        return False
    return True
