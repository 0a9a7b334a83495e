"""Cuts that follow the operators instead of the order: the fewest pieces in which a runtime takes all nodes or none that it is asked about.

`PreparedGraph(path, pieces=...)` puts the nodes in an order in which these pieces, or any others that are convex, are runs; analysing,
hashing and slicing then work on them as on any run of nodes.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Sequence
from pathlib import Path

from aivmm.models.contract import closed, levels
from aivmm.models.graph import analyse, cut_further
from aivmm.models.order import PreparedGraph, can_cross, nbytes
from aivmm.models.records import Structure

Pieces = tuple[tuple[str, ...], ...]


def split_around(prepared: PreparedGraph, refused: Collection[str]) -> Pieces:
    """Return the fewest pieces, in an order in which they can run, such that each holds only nodes named in `refused`, or none of them.

    A piece need not be connected. What only a sequence, an optional or a value of unknown type joins stays together, and with a refused
    node counts as refused. Where there is a choice of piece, that of two rules (as early as possible, as late as possible) is taken whose
    cuts move fewer bytes. The names are those of the prepared model's nodes.

    Raises:
        ValueError: no node has such a name.
    """
    nodes = prepared.nodes
    index = {node: number for number, node in enumerate(nodes)}
    numbers = {str(node.name): number for number, node in enumerate(nodes)}
    unknown = sorted(set(refused) - set(numbers))
    if unknown:
        raise ValueError(f"the model has no node {unknown[0]!r}")
    needs = [
        [index[maker] for value in prepared.reads(node) if (maker := value.producer()) is not None and maker in index] for node in nodes
    ]
    group = closed(needs, _kept_together(prepared))
    odd = {group[numbers[name]] for name in refused}
    found = [kept for kind in (odd, set(group) - odd) for kept in levels(needs, group, kind)]
    best = min(found, key=lambda level: (len(set(level)), _moved_bytes(prepared, level)))
    return tuple(tuple(str(node.name) for node, mine in zip(nodes, best, strict=True) if mine == level) for level in sorted(set(best)))


def _kept_together(prepared: PreparedGraph) -> list[int]:
    """Group the nodes that hand each other what cannot cross the edge of a segment; all others are alone."""
    group = list(range(len(prepared.nodes)))
    index = {node: number for number, node in enumerate(prepared.nodes)}
    for number, node in enumerate(prepared.nodes):
        for value in prepared.reads(node):
            maker = value.producer()
            if maker is not None and maker in index and not can_cross(value):
                mine, theirs = group[number], group[index[maker]]
                group = [mine if owner == theirs else owner for owner in group]
    return group


def _moved_bytes(prepared: PreparedGraph, level: Sequence[int]) -> int:
    """Bytes that cross from one level to a later one, each tensor once for each level that reads it; unknown sizes count as nothing."""
    index = {node: number for number, node in enumerate(prepared.nodes)}
    crossing = {
        (value, level[number])
        for number, node in enumerate(prepared.nodes)
        for value in prepared.reads(node)
        if (maker := value.producer()) is not None and maker in index and level[index[maker]] != level[number]
    }
    return sum(nbytes(value) or 0 for value, _ in crossing)


def cut_around(path: Path, structure: Structure, apart: Collection[str]) -> Structure:
    """Return `structure`, that of the prepared model at `path`, with blocks each of which holds only nodes named in `apart`, or none.

    Where cuts in the order that it has are as few as pieces would be, and move no more bytes, its blocks are cut there. Otherwise the model
    is taken apart anew, in an order in which the pieces are runs; what was kept apart before stays so.

    Raises:
        ValueError: no node has such a name.
    """
    prepared = PreparedGraph(path, pieces=structure.pieces)
    try:
        return _cut_around(prepared, structure, split_around(prepared, apart), set(apart))
    finally:
        prepared.close()


def _cut_around(prepared: PreparedGraph, structure: Structure, pieces: Pieces, apart: set[str]) -> Structure:
    """Choose between cuts in the order at hand and `pieces`, and make them."""
    names = [str(node.name) for node in prepared.nodes]
    level = {name: number for number, piece in enumerate(pieces) for name in piece}
    odd = {name for piece in pieces if apart & set(piece) for name in piece}
    part = {name: number for number, piece in enumerate(structure.pieces) for name in piece}
    edges = {at for at in range(1, len(names)) if (names[at - 1] in odd) != (names[at] in odd)}
    starts = edges | {first for first, _ in prepared.runs[1:]}
    ascending = sorted(starts)
    in_order = [bisect(ascending, at) for at in range(len(names))]
    # No node has a lower part or level than one that it reads from: nodes with equal pairs are pieces, which run in the order of the pairs.
    pairs = [(part.get(name, 0), level[name]) for name in names]
    rank = {pair: number for number, pair in enumerate(sorted(set(pairs)))}
    anew = [rank[pair] for pair in pairs]
    usable = edges <= {cut.position for cut in structure.cut_points}
    if usable and (max(in_order), _moved_bytes(prepared, in_order)) <= (max(anew), _moved_bytes(prepared, anew)):
        return cut_further(prepared.path, structure, edges)
    return analyse(
        prepared.path,
        pieces=[[name for name, mine in zip(names, anew, strict=True) if mine == number] for number in range(max(anew) + 1)],
    )
