"""Cuts that follow the operators instead of the order: the fewest pieces in which a runtime takes all nodes or none that it is asked about.

`PreparedGraph(path, pieces=...)` puts the nodes in an order in which these pieces, or any others that are convex, are runs; analysing,
hashing and slicing then work on them as on any run of nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from aivmm.models.contract import closed, levels
from aivmm.models.order import PreparedGraph, can_cross, nbytes

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
