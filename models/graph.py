"""Takes a prepared model apart: its unique operators, the places where it can be cut, and blocks of balanced work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

import onnx_ir as ir

from aivmm.models.blocks import Place, partition, useful
from aivmm.models.flops import VIEWS
from aivmm.models.hashing import Hasher, weight_bytes
from aivmm.models.layers import blocks_along_repeats
from aivmm.models.operators import find_operators
from aivmm.models.order import PreparedGraph, can_cross, nbytes, tensor_spec
from aivmm.models.records import Block, CutPoint, Operator, Structure

MAX_LIVE = 4  # tensors: a wider cut is a transfer problem, not a place to cut
_FLOPS_PER_BYTE = 8  # between the balance of a CPU (4) and of a GPU (15): what a byte costs in work

# Both runtimes fuse the second table into the heavy operator before it: a cut in between costs a pass over memory for nothing.
_HEAVY = frozenset(
    ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
)
_ARITHMETIC = frozenset(("Add", "Sub", "Mul", "Div", "Sum", "BatchNormalization", "Cast", "QuantizeLinear"))
_ACTIVATIONS = frozenset(("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Elu", "Selu"))
_FUSED = VIEWS | _ARITHMETIC | _ACTIVATIONS | frozenset(("Gelu", "QuickGelu", "FastGelu", "BiasGelu", "Mish", "Swish", "Softplus"))


def analyse(path: Path, *, max_blocks: int = 24, pieces: Sequence[Collection[str]] = ()) -> Structure:
    """Take the prepared model at `path` apart. Equal files give equal results; names do not matter to hashes, cuts or blocks.

    With `pieces` (convex sets of node names, see `PreparedGraph` and `aivmm.models.pieces`) the order is one in which each is a run, and no
    block reaches across the edge of one. Positions then count in that order: slice with a `PreparedGraph` of the same pieces.

    Raises:
        ModelError: the graph is cyclic, or a node reads what nothing produces.
        ValueError: `max_blocks` is not positive; the pieces are not convex; what cannot cross a cut crosses the edge of one.
    """
    return analyse_graph(PreparedGraph(path, pieces=pieces), max_blocks=max_blocks)


def analyse_graph(prepared: PreparedGraph, *, max_blocks: int = 24) -> Structure:
    """Do what `analyse` does with a model that is loaded already."""
    if max_blocks < 1:
        raise ValueError(f"max_blocks must be at least 1, not {max_blocks}")
    hasher = Hasher(prepared)
    operators = find_operators(prepared, hasher)
    kinds = [operators[hasher.signature(node)] for node in prepared.nodes]
    work = _work(kinds)
    cuts = _cut_points(prepared, work)
    fused = _fused_positions(prepared.nodes)
    places = {cut.position: _place(cut) for cut in cuts if cut.position not in fused}
    spans = _spans(prepared, hasher, work, places, max_blocks)
    whole = hasher.whole()
    return Structure(
        structure=whole.structure,
        content=whole.content,
        node_count=len(prepared.nodes),
        flops=_total_flops(kinds),
        weight_bytes=weight_bytes(prepared.boundary(0, len(prepared.nodes) - 1), prepared.nodes),
        operators=tuple(operators.values()),
        cut_points=cuts,
        blocks=tuple(_block(prepared, hasher, index, first, kinds[first : last + 1]) for index, (first, last) in enumerate(spans)),
        data_dependent=any(kind.data_dependent for kind in kinds),
        pieces=prepared.pieces,
    )


def cut_further(path: Path, structure: Structure, positions: Collection[int]) -> Structure:
    """Return `structure`, that of the prepared model at `path`, with its blocks also cut at `positions`, each one of its cut points.

    Raises:
        ValueError: a position is no cut point.
    """
    unknown = set(positions) - {cut.position for cut in structure.cut_points}
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no cut points")
    prepared = PreparedGraph(path, pieces=structure.pieces)
    try:
        hasher = Hasher(prepared)
        operators = find_operators(prepared, hasher)
        kinds = [operators[hasher.signature(node)] for node in prepared.nodes]
        starts = sorted({block.first for block in structure.blocks} | set(positions))
        spans = pairwise([*starts, len(prepared.nodes)])
        blocks = tuple(_block(prepared, hasher, index, first, kinds[first:end]) for index, (first, end) in enumerate(spans))
    finally:
        prepared.close()
    return replace(structure, blocks=blocks)


def _cut_points(prepared: PreparedGraph, work: Sequence[float]) -> tuple[CutPoint, ...]:
    """All places with at most `MAX_LIVE` tensors alive that can cross an edge, and with work on both sides; and the edges of pieces."""
    before = [0.0, *accumulate(work)]
    edges = {first for first, _ in prepared.runs}
    found = []
    for position, live in prepared.live():
        if position in edges and not all(map(can_cross, live)):
            raise ValueError(f"cannot cut through {next(value.name for value in live if not can_cross(value))!r}, at the edge of a piece")
        if position in edges or (len(live) <= MAX_LIVE and useful(position, before) and all(map(can_cross, live))):
            sizes = [nbytes(value) for value in live]
            known = [size for size in sizes if size is not None]
            total = sum(known) if len(known) == len(sizes) else None
            found.append(CutPoint(position=position, tensors=tuple(map(tensor_spec, live)), bytes=total))
    return tuple(found)


def _spans(
    prepared: PreparedGraph, hasher: Hasher, work: Sequence[float], places: Mapping[int, Place], max_blocks: int
) -> list[tuple[int, int]]:
    """The blocks, piece by piece where pieces are asked for: each has its share of them, by work, and at least one."""
    if not prepared.runs:
        kinds = [hasher.signature(node) for node in prepared.nodes]
        alike = blocks_along_repeats(kinds, work, places, max_blocks, lambda first, last: hasher.run(first, last).structure)
        return alike or partition(work, places, max_blocks)
    spans = []
    total = math.fsum(work) or 1.0
    for first, last in prepared.runs:
        inside = work[first : last + 1]
        share = max(1, round(max_blocks * math.fsum(inside) / total))
        mine = {position - first: place for position, place in places.items() if first < position <= last}
        spans += [(first + start, first + end) for start, end in partition(inside, mine, share)]
    return spans


def _place(cut: CutPoint) -> Place:
    """Few tensors first; a tensor of unknown shape is as unwelcome as `MAX_LIVE` more."""
    static = all(tensor.static for tensor in cut.tensors)
    return Place(level=max(1, len(cut.tensors)) + (0 if static else MAX_LIVE), bytes=cut.bytes or 0)


def _work(kinds: Sequence[Operator]) -> list[float]:
    """How heavy each node is, for balancing: its operations, or what it moves at 8 operations a byte if that is more.

    Views are free. What is unknown weighs as much as the median node that is known: enough not to vanish.
    """
    known = [_work_of(kind) for kind in kinds]
    usual = median([each for each in known if each] or [1.0])
    return [usual if each is None else each for each in known]


def _work_of(kind: Operator) -> float | None:
    if kind.op_type in VIEWS and not kind.domain:
        return 0.0
    return None if kind.flops is None or kind.bytes is None else max(kind.flops, _FLOPS_PER_BYTE * float(kind.bytes))


def _total_flops(kinds: Sequence[Operator]) -> float | None:
    """The operations of all, None when one of them is unknown."""
    known = [kind.flops for kind in kinds if kind.flops is not None]
    return math.fsum(known) if len(known) == len(kinds) else None


def _fused_positions(nodes: Sequence[ir.Node]) -> frozenset[int]:
    """Positions whose node belongs to a heavy node before it: it works on that node's result element by element.

    A view of a constant (a bias brought into shape) belongs with the node that comes after it.
    """
    anchored: set[ir.Node] = set()
    found = set()
    for position, node in enumerate(nodes):
        if node.op_type in _HEAVY:
            anchored.add(node)
        elif node.op_type in _FUSED and any(value is not None and value.producer() in anchored for value in node.inputs):
            anchored.add(node)
            found.add(position)
    for position in range(len(nodes) - 2, -1, -1):
        of_constants = all(value is None or value.is_initializer() for value in nodes[position].inputs)
        if position + 1 in found and of_constants and nodes[position].op_type in VIEWS:
            found.add(position)
    return frozenset(found)


def _block(prepared: PreparedGraph, hasher: Hasher, index: int, first: int, kinds: Sequence[Operator]) -> Block:
    last = first + len(kinds) - 1
    edge = prepared.boundary(first, last)
    hashes = hasher.run(first, last)
    return Block(
        index=index,
        first=first,
        last=last,
        structure=hashes.structure,
        content=hashes.content,
        inputs=tuple(map(tensor_spec, edge.inputs)),
        outputs=tuple(map(tensor_spec, edge.outputs)),
        op_types=dict(sorted(Counter(kind.op_type for kind in kinds).items())),
        flops=_total_flops(kinds),
        weight_bytes=weight_bytes(edge, prepared.nodes[first : last + 1]),
        data_dependent=any(kind.data_dependent for kind in kinds),
    )
