"""A prepared model in memory, in the one topological order that analysis, hashing and slicing share.

The order decides what is alive where, so it is made here and nowhere else. Two candidates are tried, and the one with more places where at
most one tensor is alive wins (then the one with fewer tensors alive in sum, then the first):

1. depth-first from the model's outputs, so that a node comes right before what needs it; `Shape` and `Size` come right after what they
   measure, so that they do not keep a large tensor alive for the sake of a small one;
2. the order of the file.

What nodes far apart share (an attention mask, an encoder's answer) and the first of them had to wait for is then moved ahead, right behind
what it needs, if that makes more of the model repeat: the first layer is then like the others, which share what it had to have made.

The first does not depend on names nor on the file's order. Nodes that no output needs are in neither. Where sets of nodes are asked to
stand together, the better of the two is rearranged no further than that takes (`aivmm.models.contract`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir

from aivmm.errors import ModelError
from aivmm.models.contract import arrange, ring
from aivmm.models.repeats import stretches
from aivmm.tensors import TensorSpec

Reads = Callable[[ir.Node], Sequence[ir.Value]]

_FAR = 8  # readers an eighth of the model apart do not share by being neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """What crosses the edge of a run of nodes. Initializers are those the run reads, in the order of first use, subgraphs included."""

    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    initializers: tuple[ir.Value, ...]


class PreparedGraph:
    """A prepared model file, loaded once; external data stays on disk and is mapped when it is read.

    `nodes` is the shared topological order; positions everywhere in `models` are indices into it. `outputs` leaves out those that are
    inputs: no runtime writes them (`aivmm.models.intake_plain`).

    `pieces` asks for another order: disjoint sets of nodes, by name, each of which is to be a run. `runs` are then the first and last
    positions of these and of the runs of other nodes between them, in order; without, it is empty.

    Raises:
        ModelError: the graph is cyclic, or a node reads what nothing produces.
        ValueError: the pieces overlap, name a node that does not exist, or cannot all be runs of one order.
    """

    def __init__(self, path: Path, *, pieces: Sequence[Collection[str]] = ()) -> None:
        self.path = path
        self.model = ir.load(path)
        self.graph = self.model.graph
        self._reads: dict[ir.Node, tuple[ir.Value, ...]] = {}
        self.inputs = tuple(value for value in self.graph.inputs if not value.is_initializer())
        self.outputs = tuple(value for value in dict.fromkeys(self.graph.outputs) if value not in self.inputs)
        self.nodes = _best_order(self.outputs, tuple(self.graph), self.reads)
        self.runs: tuple[tuple[int, int], ...] = ()
        if pieces:
            self.nodes, self.runs = _with_runs(self.nodes, pieces, self.reads)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self._last_read: dict[ir.Value, int] = {}
        for index, node in enumerate(self.nodes):
            for value in self.reads(node):
                self._check_defined(node, value)
                self._last_read[value] = index

    def reads(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """Return each value of the main graph that `node` reads, once: its inputs, then what its subgraphs capture."""
        if node not in self._reads:
            self._reads[node] = tuple(dict.fromkeys(value for value in (*node.inputs, *captures(node)) if value is not None))
        return self._reads[node]

    def last_read(self, value: ir.Value) -> int:
        """Return the position of the last node that reads `value`, -1 when none does."""
        return self._last_read.get(value, -1)

    def live(self) -> Iterator[tuple[int, tuple[ir.Value, ...]]]:
        """Yield, for each position but the first, the values produced before it and read at or after it, in the order they are produced."""
        alive: dict[ir.Value, None] = {}
        for position, node in enumerate(self.nodes[:-1]):
            for value in node.outputs:
                if self.last_read(value) > position:
                    alive[value] = None
            for value in self.reads(node):
                if self.last_read(value) == position:
                    alive.pop(value, None)
            yield position + 1, tuple(alive)

    def boundary(self, first: int, last: int) -> Boundary:
        """Return what crosses the edge of the nodes [first, last]; the whole graph keeps its declared inputs and outputs, in their order.

        Outputs of the model that are constants of it belong to the run that starts at node 0.
        """
        inside = self.nodes[first : last + 1]
        read = dict.fromkeys(value for node in inside for value in self.reads(node))
        passed = [value for value in self.outputs if value.producer() is None] if first == 0 else []
        initializers = dict.fromkeys(value for value in (*read, *passed) if value.is_initializer())
        if first == 0 and last == len(self.nodes) - 1:
            return Boundary(inputs=self.inputs, outputs=self.outputs, initializers=tuple(initializers))
        made = dict.fromkeys(value for node in inside for value in node.outputs)
        declared = set(self.outputs)
        return Boundary(
            inputs=tuple(value for value in read if value not in made and not value.is_initializer()),
            outputs=(*(value for value in made if value in declared or self.last_read(value) > last), *passed),
            initializers=tuple(initializers),
        )

    @property
    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """The names of the nodes of each of `runs`: what gives this order again when it is asked for."""
        return tuple(tuple(str(node.name) for node in self.nodes[first : last + 1]) for first, last in self.runs)

    def close(self) -> None:
        """Let go of mapped external data, so that the file can be removed (Windows keeps a mapped file)."""
        for value in self.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.release()

    def _check_defined(self, node: ir.Node, value: ir.Value) -> None:
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
            raise ModelError(
                f"node {node.name!r} ({node.op_type}) reads {value.name!r}, which nothing produces",
                advice="export the model again, or check it with onnx.checker",
            )


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs among the attributes of `node` (the bodies of If, Loop, Scan)."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def captures(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values of the enclosing scopes that the subgraphs of `node` read, at any depth; one may come more than once."""
    for body in subgraphs(node):
        yield from _captured(body, {body})


def _captured(body: ir.Graph, inner: set[ir.Graph]) -> Iterator[ir.Value]:
    for node in body:
        yield from (value for value in node.inputs if value is not None and value.graph not in inner)
        for deeper in subgraphs(node):
            yield from _captured(deeper, inner | {deeper})
    yield from (value for value in body.outputs if value.graph is not None and value.graph not in inner)


def depth_first(roots: Iterable[ir.Value], reads: Reads, *, inside: Collection[ir.Node] | None = None) -> list[ir.Node]:
    """Return the nodes that `roots` need, those `inside` if given, depth-first: each after what it reads, in the order of `reads`.

    Raises:
        ModelError: the graph is cyclic.
    """
    order: dict[ir.Node, None] = {}
    entered: set[ir.Node] = set()

    def needed(value: ir.Value) -> ir.Node | None:
        producer = value.producer()
        return producer if producer is not None and (inside is None or producer in inside) else None

    for root in roots:
        start = needed(root)
        if start is None or start in entered:
            continue
        entered.add(start)
        stack = [(start, iter(reads(start)))]
        while stack:
            node, rest = stack[-1]
            below = next((producer for value in rest if (producer := needed(value)) is not None and producer not in order), None)
            if below is None:
                order[node] = None
                stack.pop()
            elif below in entered:
                raise ModelError(f"the graph is cyclic at node {below.name!r} ({below.op_type})", advice="export the model again")
            else:
                entered.add(below)
                stack.append((below, iter(reads(below))))
    return list(order)


def _measure_early(order: Sequence[ir.Node]) -> list[ir.Node]:
    """Move `Shape` and `Size` of a produced tensor right after its producer: they keep a few integers alive instead of the tensor."""
    early: dict[ir.Node, list[ir.Node]] = {}
    for node in order:
        if node.op_type in ("Shape", "Size") and not node.domain and node.inputs[0] is not None and (producer := node.inputs[0].producer()):
            early.setdefault(producer, []).append(node)
    moved = {node for group in early.values() for node in group}
    return [each for node in order if node not in moved for each in _with_followers(node, early)]


def _with_followers(node: ir.Node, followers: dict[ir.Node, list[ir.Node]]) -> Iterator[ir.Node]:
    yield node
    for follower in followers.get(node, ()):
        yield from _with_followers(follower, followers)


def _best_order(outputs: Sequence[ir.Value], as_filed: Sequence[ir.Node], reads: Reads) -> tuple[ir.Node, ...]:
    """Choose among the candidates of this module's docstring."""
    found = depth_first(outputs, reads)
    needed = set(found)
    candidates = [_measure_early(found), [node for node in as_filed if node in needed]]
    best: list[ir.Node] = max((order for order in candidates if _is_sorted(order, reads)), key=lambda order: _narrowness(order, reads))
    ahead = _shared_ahead(best, reads)
    return tuple(ahead if ahead != best and _repeated(ahead) > _repeated(best) else best)


def _shared_ahead(order: Sequence[ir.Node], reads: Reads) -> list[ir.Node]:
    """Move the run of nodes that make nothing but a value which nodes far apart read to where all that it needs is there."""
    found = list(order)
    readers: dict[ir.Value, list[int]] = {}
    for index, node in enumerate(found):
        for value in reads(node):
            readers.setdefault(value, []).append(index)
    far = max(1, len(found) // _FAR)
    for value, places in readers.items():
        producer = value.producer()
        if len(places) > 2 and places[-1] - places[0] >= far and producer is not None and producer.graph is found[0].graph:
            found = _moved_ahead(found, producer, reads)
    return found


def _moved_ahead(order: list[ir.Node], maker: ir.Node, reads: Reads) -> list[ir.Node]:
    end = order.index(maker)
    needed, start = set(reads(maker)), end
    while start and not needed.isdisjoint(order[start - 1].outputs):
        start -= 1
        needed |= set(reads(order[start]))
    made = {value: index + 1 for index, node in enumerate(order[:start]) for value in node.outputs}
    place = max((made.get(value, 0) for value in needed), default=0)
    return [*order[:place], *order[start : end + 1], *order[place:start], *order[end + 1 :]]


def _repeated(order: Sequence[ir.Node]) -> int:
    """Count the nodes in stretches of the same operators on the same shapes, several times over."""
    kinds = [(node.domain, node.op_type, tuple((each.dtype, str(each.shape)) for each in node.outputs)) for node in order]
    return sum(stretch.period * stretch.count for stretch in stretches(kinds, [1.0] * len(kinds)))


def _with_runs(
    nodes: Sequence[ir.Node], pieces: Sequence[Collection[str]], reads: Reads
) -> tuple[tuple[ir.Node, ...], tuple[tuple[int, int], ...]]:
    """Return the nodes in an order in which each piece is a run, and the runs: those, and what stands between them."""
    index = {node: number for number, node in enumerate(nodes)}
    owner = _owners(nodes, pieces)
    needs = [[index[maker] for value in reads(node) if (maker := value.producer()) is not None and maker in index] for node in nodes]
    group = [len(pieces) + number if piece is None else piece for number, piece in enumerate(owner)]
    order = arrange(needs, group)
    if order is None:
        raise ValueError(_why_not(ring(needs, group), nodes, len(pieces)))
    starts = [at for at in range(len(order)) if at == 0 or owner[order[at]] != owner[order[at - 1]]]
    return tuple(nodes[number] for number in order), tuple((first, end - 1) for first, end in pairwise([*starts, len(order)]))


def _owners(nodes: Sequence[ir.Node], pieces: Sequence[Collection[str]]) -> list[int | None]:
    """Return for each node the number of its piece, None for those of no piece."""
    found: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        for name in piece:
            if name in found:
                raise ValueError(f"node {name!r} is in two pieces")
            found[name] = number
    unknown = sorted(set(found) - {str(node.name) for node in nodes})
    if unknown:
        raise ValueError(f"the model has no node {unknown[0]!r}")
    return [found.get(str(node.name)) for node in nodes]


def _why_not(cycle: Sequence[int], nodes: Sequence[ir.Node], pieces: int) -> str:
    along = list(reversed(cycle))
    start = along.index(min(along))
    shown = [f"piece {owner}" if owner < pieces else f"node {nodes[owner - pieces].name!r}" for owner in along[start:] + along[:start]]
    return f"the pieces are not convex: {' -> '.join([*shown[:6], *(['...'] if len(shown) > 6 else []), shown[0]])}"


def _is_sorted(order: Sequence[ir.Node], reads: Reads) -> bool:
    position = {node: index for index, node in enumerate(order)}
    return all(
        position[producer] < index
        for index, node in enumerate(order)
        for value in reads(node)
        if (producer := value.producer()) is not None and producer in position
    )


def _narrowness(order: Sequence[ir.Node], reads: Reads) -> tuple[int, int]:
    """Return how many places have at most one tensor alive, and minus the sum of tensors alive over all places."""
    made = {value: index for index, node in enumerate(order) for value in node.outputs}
    last = {value: index for index, node in enumerate(order) for value in reads(node) if value in made}
    change = [0] * (len(order) + 1)
    for value, end in last.items():
        change[made[value] + 1] += 1
        change[end + 1] -= 1
    widths = list(accumulate(change))[1:-1]
    return sum(width <= 1 for width in widths), -sum(widths)


def shape_of(value: ir.Value) -> tuple[int | None, ...] | None:
    """Return the extents of `value`, None for each that is unknown, and None alone when not even the rank is known."""
    if value.shape is None:
        return None
    return tuple(extent if isinstance(extent, int) else None for extent in value.shape)


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the extents of `value` when all are known, else None."""
    shape = shape_of(value) if value is not None else None
    if shape is None or any(extent is None for extent in shape):
        return None
    return tuple(extent for extent in shape if extent is not None)


@cache
def dtype_name(dtype: ir.DataType | None) -> str:
    """Return NumPy's name of an element type; `string`, and `unknown` where the model does not say."""
    if dtype is None or dtype == ir.DataType.UNDEFINED:
        return "unknown"
    return "string" if dtype == ir.DataType.STRING else np.dtype(dtype.numpy()).name


def tensor_spec(value: ir.Value) -> TensorSpec:
    """Describe `value`. What is no tensor has its type in words for a dtype; an unknown rank is written as one unknown extent."""
    plain = value.type is None or isinstance(value.type, ir.TensorType)
    shape = shape_of(value) if plain else None
    return TensorSpec(
        name=value.name or "",
        dtype=dtype_name(value.dtype) if plain else str(value.type),
        shape=(None,) if shape is None else shape,
    )


def can_cross(value: ir.Value) -> bool:
    """Say whether `value` can be handed from one segment to another: a dense tensor of known rank, of strings or what NumPy has a type for.

    Neither runtime hands out bfloat16, 8-bit floats or 4-bit integers as arrays.
    """
    return isinstance(value.type, ir.TensorType) and value.shape is not None and _handed_out(value.dtype)


@cache
def _handed_out(dtype: ir.DataType | None) -> bool:
    if dtype is None or dtype == ir.DataType.UNDEFINED:
        return False
    return dtype == ir.DataType.STRING or np.dtype(dtype.numpy()).kind in "biufc"


def elements(shape: Sequence[int]) -> int:
    """Return how many elements a tensor of `shape` has."""
    return math.prod(shape)


def nbytes(value: ir.Value) -> int | None:
    """Return the size of `value` in bytes, None when its shape or its elements' size is unknown."""
    shape = static_shape(value)
    if shape is None or value.dtype is None or value.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return None
    return int((elements(shape) * value.dtype.bitwidth + 7) // 8)
