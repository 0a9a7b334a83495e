"""A problem as arrays, with the nodes that have to stay together merged into groups. What the solvers work on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from aivmm.planner.problem import Node, Place, Problem, topological_order

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tensor:
    """What one group makes and other groups read, with its prices: `export` [choices] and `move` [choices, choices], inf: unsupported."""

    source: int
    readers: tuple[int, ...]
    export: Array
    move: Array


@dataclass(frozen=True, kw_only=True)
class Compact:
    """Groups [g], choices [c], devices [d]. `cost` is infinite where a choice does not support a group."""

    members: tuple[tuple[int, ...], ...]  # nodes of each group, by their position in the problem
    cost: Array  # [g, c]
    memory: Array  # [g, c] bytes
    tensors: tuple[Tensor, ...]
    device: Ints  # [c]
    count: Ints  # [d]
    capacity: Array  # [d] bytes, of each of the identical devices
    slowed: Array  # [d, d]: factor - 1 of the first beside the second

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Every (choice, number of the device among the identical ones)."""
        return [(choice, index) for choice, device in enumerate(self.device) for index in range(self.count[device])]

    @cached_property
    def edges(self) -> set[tuple[int, int]]:
        """Every (source, reader)."""
        return {(tensor.source, reader) for tensor in self.tensors for reader in tensor.readers}

    @cached_property
    def before(self) -> list[set[int]]:
        """For each group, the groups that it reads from."""
        found: list[set[int]] = [set() for _ in self.members]
        for source, reader in self.edges:
            found[reader].add(source)
        return found

    @cached_property
    def after(self) -> list[set[int]]:
        """For each group, the groups that read from it."""
        found: list[set[int]] = [set() for _ in self.members]
        for source, reader in self.edges:
            found[source].add(reader)
        return found

    @cached_property
    def cheapest(self) -> Array:
        """[g]: the least cost of each group anywhere."""
        least: Array = self.cost.min(axis=1)
        return least

    def is_paths(self) -> bool:
        """Whether no group has two neighbours on one side: the graph is one chain, or several."""
        return all(len(each) <= 1 for each in (*self.before, *self.after)) and len(chains_of(self)) + len(self.edges) == len(self.members)

    def is_chain(self) -> bool:
        """Whether the graph is one chain."""
        return self.is_paths() and len(self.edges) == len(self.members) - 1

    def scaled(self, count: Ints, factor: Array) -> Compact:
        """Return the problem with `count` devices [d], each slowed by `factor` [d] and by nothing else."""
        by_choice = factor[self.device]
        gone = count[self.device] == 0
        return replace(
            self,
            cost=np.where(gone, np.inf, self.cost * by_choice),
            tensors=tuple(replace(each, export=each.export * by_choice, move=each.move * by_choice) for each in self.tensors),
            count=np.maximum(count, 1),  # a device that is not there is one that supports nothing
            slowed=np.zeros_like(self.slowed),
        )


def compact(problem: Problem) -> Compact:
    """Return the arrays of a problem, its groups being the nodes and the classes of colocated nodes."""
    order = topological_order([node.id for node in problem.nodes], [(edge.source, edge.reader) for edge in problem.edges])
    at = {node.id: index for index, node in enumerate(problem.nodes)}
    labels: dict[object, int] = {}
    label = np.zeros(len(order), dtype=np.int64)
    for id in order:
        name = problem.nodes[at[id]].colocation
        label[at[id]] = labels.setdefault(("alone", id) if name is None else ("class", name), len(labels))
    return _merged(_ungrouped(problem), label)


def _ungrouped(problem: Problem) -> Compact:
    choices = [each.name for each in problem.choices]
    devices = {each.name: index for index, each in enumerate(problem.devices)}
    at = {node.id: index for index, node in enumerate(problem.nodes)}
    readers: dict[tuple[str, str, float], list[int]] = defaultdict(list)
    for edge in problem.edges:
        readers[edge.source, edge.tensor, edge.bytes].append(at[edge.reader])
    export = np.array([_linear(problem, (each.target,)) for each in problem.choices])
    move = np.array([[_linear(problem, (one.target, other.target)) for other in problem.choices] for one in problem.choices])
    slowed = np.zeros((len(devices), len(devices)))
    for (device, beside), factor in problem.contention.items():
        slowed[devices[device], devices[beside]] = factor - 1
    return Compact(
        members=tuple((index,) for index in range(len(problem.nodes))),
        cost=np.array([[node.costs.get(name, np.inf) for name in choices] for node in problem.nodes], dtype=np.float64),
        memory=np.array([_memory(node, choices) for node in problem.nodes], dtype=np.float64),
        tensors=tuple(
            Tensor(at[source], tuple(to), export[:, 0] + export[:, 1] * size, move[:, :, 0] + move[:, :, 1] * size)
            for (source, _, size), to in readers.items()
        ),
        device=np.array([devices[each.device] for each in problem.choices]),
        count=np.array([min(each.count, len(problem.nodes)) for each in problem.devices]),  # more than one a node have nothing to do
        capacity=np.array([each.memory_bytes for each in problem.devices], dtype=np.float64),
        slowed=slowed,
    )


def _memory(node: Node, choices: list[str]) -> list[float]:
    if isinstance(node.memory_bytes, Mapping):
        return [node.memory_in(name) for name in choices]
    return [node.memory_bytes] * len(choices)  # without asking each choice: chains have thousands of blocks


def _linear(problem: Problem, key: tuple[str, ...]) -> tuple[float, float]:
    """Return (fixed, per byte) of an export or a transfer. A target without an export exports for free; a pair may be unsupported."""
    move = problem.exports.get(key[0]) if len(key) == 1 else problem.transfers.get((key[0], key[1]))
    if move is None:
        # A pair that is listed nowhere is one that never meets.
        return (np.inf, 0.0) if key in problem.unsupported else (0.0, 0.0)
    return (move.fixed, move.per_byte)


def _merged(whole: Compact, label: Ints) -> Compact:
    """Return the problem with the groups of one label as one; labels count from 0 without gaps."""
    size = int(label.max()) + 1
    members: list[list[int]] = [[] for _ in range(size)]
    cost, memory = np.zeros((size, whole.cost.shape[1])), np.zeros((size, whole.cost.shape[1]))
    for group, to in enumerate(label):
        members[to] += whole.members[group]
    np.add.at(cost, label, whole.cost)
    np.add.at(memory, label, whole.memory)
    tensors = []
    for each in whole.tensors:
        source = int(label[each.source])
        readers = tuple(sorted({int(label[reader]) for reader in each.readers} - {source}))
        if readers:
            tensors.append(replace(each, source=source, readers=readers))
    return replace(whole, members=tuple(map(tuple, members)), cost=cost, memory=memory, tensors=tuple(tensors))


def condensed(whole: Compact) -> Compact:
    """Return the problem with each cycle of groups as one group, and the groups in topological order.

    A contiguous placement cannot part a cycle: the pieces of its groups could not be put in order.
    """
    size = len(whole.members)
    edges = np.array(sorted(whole.edges), dtype=np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(size, size))
    found, label = connected_components(graph, directed=True, connection="strong")
    between = {(str(label[one]), str(label[other])) for one, other in edges if label[one] != label[other]}
    order = [int(each) for each in topological_order([str(each) for each in dict.fromkeys(label.tolist())], sorted(between))]
    position = np.zeros(found, dtype=np.int64)
    position[order] = np.arange(found)
    return _merged(whole, position[label])


def assignment_of(problem: Problem, merged: Compact, spots: Sequence[tuple[int, int]]) -> Mapping[str, Place]:
    """Return node id -> place, from the (choice, device number) of each group."""
    return {
        problem.nodes[member].id: Place(problem.choices[choice].name, int(index))
        for (choice, index), members in zip(spots, merged.members, strict=True)
        for member in members
    }


def spots_of(problem: Problem, merged: Compact, assignment: Mapping[str, Place]) -> list[tuple[int, int]]:
    """Return the (choice, device number) of each group; the inverse of `assignment_of`."""
    choices = {each.name: index for index, each in enumerate(problem.choices)}
    found = [assignment[problem.nodes[members[0]].id] for members in merged.members]
    return [(choices[place.choice], place.number) for place in found]


def chains_of(merged: Compact) -> list[list[int]]:
    """Return the groups in chains, each a path of the graph, so that a downset holds a prefix of each. Groups are in topological order."""
    taken: set[int] = set()
    chains = []
    for first in range(len(merged.members)):
        if first in taken:
            continue
        chain = [first]
        while following := merged.after[chain[-1]] - taken:
            chain.append(min(following))
            taken.add(chain[-1])
        chains.append(chain)
    return chains


def loads_of(merged: Compact, spots: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Return (device, number) -> load, by the prices of the arrays and without contention; 0 for devices that are not used."""
    loads = {(device, index): 0.0 for device, count in enumerate(merged.count.tolist()) for index in range(count)}
    for group, (choice, index) in enumerate(spots):
        loads[int(merged.device[choice]), index] += merged.cost[group, choice]
    for tensor in merged.tensors:
        choice, index = spots[tensor.source]
        elsewhere = {spots[reader] for reader in tensor.readers} - {(choice, index)}
        if elsewhere:
            loads[int(merged.device[choice]), index] += tensor.export[choice]
        for other, number in elsewhere:
            loads[int(merged.device[other]), number] += tensor.move[choice, other]
    return loads


def sweeps(merged: Compact) -> list[list[int]]:
    """Return a few different topological orders of the groups: depth first and breadth first, from the front and from the back."""
    found = []
    for before, after, backwards in ((merged.before, merged.after, False), (merged.after, merged.before, True)):
        for last in (True, False):
            waiting = [len(each) for each in before]
            ready = [group for group, count in enumerate(waiting) if not count]
            order: list[int] = []
            while ready:
                order.append(ready.pop(-1 if last else 0))
                for each in sorted(after[order[-1]]):
                    waiting[each] -= 1
                    if not waiting[each]:
                        ready.append(each)
            found.append(order[::-1] if backwards else order)
    return [list(order) for order in dict.fromkeys(map(tuple, found))]
