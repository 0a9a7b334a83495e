"""A placement problem: what is to be placed, where it can go, and what that costs. Pure data, checked at birth; it knows no model, no file.

The words are those of a plan. A *choice* is a target in a precision with a config, batch and replicas, folded into one name: whoever makes
the problem decides what a choice is, and folds replicas in (r of them: cost / r, memory x r). A *place* is a choice on one of the identical
devices it can run on. Costs are in one unit of time, whichever the maker likes (`unit` names it), per request.

**Load of a device**: the costs of its nodes, plus for each of its tensors that is read at another place the export of the target it is on
(once, however many read it), plus for each tensor that it reads from another place the transfer from there (once, however many of the
place's nodes read it). Times 1 + the sum of (factor - 1) over the other devices that are used, for throughput.

**Latency** is the sum of the loads without contention: one stage runs at a time. **Throughput** is the largest load: stages run at once,
each on a request of its own, and the slowest sets the pace. Both are minimised. Several models are one problem whose graph is not
connected.

**Contiguous**: each device runs at most one segment, in one choice, and the segments can be put in an order in which every edge stays or
goes forward. Otherwise any node may go anywhere, in as many pieces as that makes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from aivmm.errors import UsageError

Goal = Literal["latency", "throughput"]

_MOST = 1e80  # of any number: products of three of them, and sums of those over any graph, are still numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedDevice:
    """`count` identical devices under one name, each with its own memory."""

    name: str
    count: int = 1
    memory_bytes: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A way to run a node. Choices of one target differ in precision or config; targets of one device share its time and its memory."""

    name: str
    target: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What is placed whole: an operator, a block, a segment.

    `costs` has an entry for each choice that supports the node. `memory_bytes` counts against the device's limit, in all choices alike or
    per choice. Nodes that share a `colocation` go to the same place.
    """

    id: str
    costs: Mapping[str, float]
    memory_bytes: float | Mapping[str, float] = 0.0
    colocation: str | None = None

    def memory_in(self, choice: str) -> float:
        """Return the bytes that the node takes in a choice."""
        return self.memory_bytes.get(choice, 0.0) if isinstance(self.memory_bytes, Mapping) else self.memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A tensor from one node to another. Edges of one source with one `tensor` are the same tensor, and move once to each place."""

    source: str
    reader: str
    bytes: float = 0.0
    tensor: str = ""


@dataclass(frozen=True, slots=True)
class Move:
    """What moving a tensor costs: `fixed + per_byte * bytes`."""

    fixed: float = 0.0
    per_byte: float = 0.0

    def cost(self, size: float) -> float:
        """Return the time for `size` bytes."""
        return self.fixed + self.per_byte * size


class Place(NamedTuple):
    """A choice on one of the identical devices that it can run on, by its number from 0. Written `choice:number`."""

    choice: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.choice}:{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """See the module's words. `transfers` is keyed by (target of the sender, target of the reader) and paid by the reader's device.

    A target also moves to itself: between its choices, and between its identical devices. Every ordered pair of targets that can meet is in
    `transfers` or in `unsupported`: silence is not free. `contention` is keyed by (device slowed, device beside it); where the two are one
    name, it is between the identical devices of that name.

    Raises:
        UsageError: an id is unknown or there twice, a number is NaN, negative or infinite, the graph has a cycle, a pair of targets is
        missing.
    """

    devices: Sequence[PlacedDevice]
    choices: Sequence[Choice]
    nodes: Sequence[Node]
    edges: Sequence[Edge] = ()
    transfers: Mapping[tuple[str, str], Move] = field(default_factory=dict)
    exports: Mapping[str, Move] = field(default_factory=dict)
    unsupported: frozenset[tuple[str, str]] = frozenset()
    contention: Mapping[tuple[str, str], float] = field(default_factory=dict)
    unit: str = "s"

    def __post_init__(self) -> None:
        _require_names(self)
        _require_numbers(self)
        _require_tensors(self)
        _require_pairs(self)
        topological_order([node.id for node in self.nodes], [(edge.source, edge.reader) for edge in self.edges])


def topological_order(ids: Sequence[str], edges: Iterable[tuple[str, str]]) -> list[str]:
    """Return the ids in an order in which every edge goes forward.

    Raises:
        UsageError: there is none; the message names a node on the cycle.
    """
    after: dict[str, list[str]] = {each: [] for each in ids}
    waiting = dict.fromkeys(ids, 0)
    for source, reader in edges:
        after[source].append(reader)
        waiting[reader] += 1
    ready = [each for each in reversed(ids) if not waiting[each]]
    order = []
    while ready:
        order.append(ready.pop())
        for reader in after[order[-1]]:
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    if len(order) < len(ids):
        raise UsageError(
            f"the graph has a cycle behind node {_on_cycle(after, waiting)!r}", advice="a graph to place has none: drop an edge"
        )
    return order


def _on_cycle(after: Mapping[str, Sequence[str]], waiting: Mapping[str, int]) -> str:
    """Return a node on a cycle: what a walk backwards over nodes that wait meets twice."""
    before = {reader: source for source, readers in after.items() if waiting[source] for reader in readers}
    here, seen = next(each for each, count in waiting.items() if count), set[str]()
    while here not in seen:
        seen.add(here)
        here = before[here]
    return here


def _require_names(problem: Problem) -> None:
    for kind, names in (
        ("device", [each.name for each in problem.devices]),
        ("choice", [each.name for each in problem.choices]),
        ("node", [each.id for each in problem.nodes]),
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UsageError(f"{kind} {twice[0]!r} is there twice", advice=f"give each {kind} a name of its own")
        if not names:
            raise UsageError(f"there is no {kind}", advice=f"name at least one {kind}")
    devices, choices = {each.name for each in problem.devices}, {each.name for each in problem.choices}
    targets, nodes = {each.target for each in problem.choices}, {each.id for each in problem.nodes}
    for choice in problem.choices:
        _require_known(choice.device, devices, f"choice {choice.name!r}", "device")
    for node in problem.nodes:
        for name in (*node.costs, *(node.memory_bytes if isinstance(node.memory_bytes, Mapping) else ())):
            _require_known(name, choices, f"node {node.id!r}", "choice")
    for edge in problem.edges:
        for name in (edge.source, edge.reader):
            _require_known(name, nodes, f"the edge from {edge.source!r} to {edge.reader!r}", "node")
    for pair in (*problem.transfers, *problem.unsupported):
        for name in pair:
            _require_known(name, targets, f"the transfer from {pair[0]!r} to {pair[1]!r}", "target")
    for name in problem.exports:
        _require_known(name, targets, "exports", "target")
    for pair in problem.contention:
        for name in pair:
            _require_known(name, devices, "contention", "device")


def _require_known(name: str, known: set[str], where: str, kind: str) -> None:
    if name not in known:
        some = ", ".join(repr(each) for each in sorted(known)[:5])
        raise UsageError(f"{where} names the unknown {kind} {name!r}", advice=f"known: {some}{', ...' if len(known) > 5 else ''}")


def _require_numbers(problem: Problem) -> None:
    for device in problem.devices:
        if device.count < 1:
            raise UsageError(f"device {device.name!r} has the count {device.count}", advice="give a count of 1 or more, or drop the device")
        if math.isnan(device.memory_bytes) or device.memory_bytes < 0:
            raise UsageError(f"device {device.name!r} has {device.memory_bytes} bytes of memory", advice="give 0 or more")
    for node in problem.nodes:
        for choice, cost in node.costs.items():
            _require_amount(cost, f"node {node.id!r} in {choice!r} costs")
        amounts = node.memory_bytes.values() if isinstance(node.memory_bytes, Mapping) else (node.memory_bytes,)
        for amount in amounts:
            _require_amount(amount, f"node {node.id!r} takes memory_bytes of")
    for edge in problem.edges:
        _require_amount(edge.bytes, f"the edge from {edge.source!r} to {edge.reader!r} has bytes of")
    for where, move in (*problem.transfers.items(), *problem.exports.items()):
        _require_amount(move.fixed, f"transfer {where} has a fixed cost of")
        _require_amount(move.per_byte, f"transfer {where} has a cost per byte of")
    for pair, factor in problem.contention.items():
        if not (1 <= factor <= _MOST):
            advice = f"a factor is 1 (no effect) to {_MOST:g}"
            raise UsageError(f"the contention of {pair[0]!r} beside {pair[1]!r} is {factor}", advice=advice)


def _require_amount(value: float, what: str) -> None:
    if not (0 <= value <= _MOST):
        raise UsageError(f"{what} {value}", advice=f"give a finite number from 0 to {_MOST:g}; leave away what is not supported")


def _require_tensors(problem: Problem) -> None:
    sizes: dict[tuple[str, str], float] = {}
    seen: set[tuple[str, str, str]] = set()
    for edge in problem.edges:
        if (edge.source, edge.reader, edge.tensor) in seen:
            raise UsageError(
                f"the edge from {edge.source!r} to {edge.reader!r} is there twice",
                advice="name the tensors if there are two, else drop one",
            )
        seen.add((edge.source, edge.reader, edge.tensor))
        if sizes.setdefault((edge.source, edge.tensor), edge.bytes) != edge.bytes:
            raise UsageError(
                f"one tensor of node {edge.source!r} has {sizes[edge.source, edge.tensor]} and {edge.bytes} bytes",
                advice="give its edges the same bytes, or different names under `tensor`",
            )


def _require_pairs(problem: Problem) -> None:
    if not problem.edges:
        return
    counts = {device.name: device.count for device in problem.devices}
    places = Counter[str]()
    for choice in problem.choices:
        places[choice.target] += counts[choice.device]
    for one in places:
        for other in places:
            listed = ((one, other) in problem.transfers) + ((one, other) in problem.unsupported)
            if listed > 1:
                raise UsageError(f"the transfer from {one!r} to {other!r} has a cost and is unsupported", advice="drop one of the two")
            if not listed and (one != other or places[one] > 1):
                raise UsageError(
                    f"nothing says what a transfer from {one!r} to {other!r} costs", advice="add it to transfers, or to unsupported_pairs"
                )
