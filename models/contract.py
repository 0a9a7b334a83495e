"""Orders of a graph in which given sets of nodes stand together: pure arithmetic on positions.

A set of nodes can be a run of some topological order exactly when it is convex: no path leaves it and comes back. Several disjoint sets can
all be runs of one order exactly when the graph in which each set is one node has no cycle. So cutting out any convex set needs no slicer of
its own: it is a run of nodes in an order made for it.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

Needs = Sequence[Collection[int]]  # for each node the nodes that it reads from


def arrange(needs: Needs, group: Sequence[int]) -> list[int] | None:
    """Return the nodes in an order in which each group is a run and each node comes after what it needs; None when there is none.

    Nodes keep the order of their numbers, which has to be topological, as far as that allows: of the groups that are ready the one whose
    first node comes first is taken. Inside a group nodes are in their order.
    """
    members: dict[int, list[int]] = {}
    for node, owner in enumerate(group):
        members.setdefault(owner, []).append(node)
    before = _between(needs, group)
    after: dict[int, list[int]] = {}
    for owner, needed in before.items():
        for each in needed:
            after.setdefault(each, []).append(owner)
    waiting = {owner: len(needed) for owner, needed in before.items()}
    ready = [(nodes[0], owner) for owner, nodes in members.items() if not waiting[owner]]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, owner = heapq.heappop(ready)
        order += members[owner]
        for later in after.get(owner, ()):
            waiting[later] -= 1
            if not waiting[later]:
                heapq.heappush(ready, (members[later][0], later))
    return order if len(order) == len(group) else None


def ring(needs: Needs, group: Sequence[int]) -> list[int]:
    """Return groups each of which needs the next, the last one the first; empty when the groups can be arranged."""
    before = _between(needs, group)
    entered: dict[int, int] = {}  # group -> its place on the path; len(before) when done with
    done = len(before)
    for start in before:
        path, rest = [start], [iter(sorted(before[start]))]
        if start in entered:
            continue
        entered[start] = 0
        while path:
            step = next(rest[-1], None)
            if step is None:
                entered[path.pop()] = done
                rest.pop()
            elif step not in entered:
                entered[step] = len(path)
                path.append(step)
                rest.append(iter(sorted(before[step])))
            elif entered[step] != done:
                return path[entered[step] :]
    return []


def closed(needs: Needs, group: Sequence[int]) -> list[int]:
    """Return the finest grouping that can be arranged and keeps together what `group` does; a group is named by one of its own."""
    merged = list(group)
    while cycle := ring(needs, merged):
        inside = set(cycle)
        merged = [cycle[0] if owner in inside else owner for owner in merged]
    return merged


def levels(needs: Needs, group: Sequence[int], odd: Collection[int]) -> tuple[list[int], list[int]]:
    """Return for each node the earliest and the latest level at which it can stand when each level holds only odd groups or only others.

    Levels are numbered from 0; odd groups stand at odd levels, so that level 0 may be empty. What a node needs is at its level or below it.
    The number of levels is the least possible: it is that of the changes on a path from one kind to the other. The groups must be such that
    they can be arranged.
    """
    order = arrange(needs, group)
    if order is None:
        raise ValueError("the groups need each other in a ring")
    parity = {owner: int(owner in odd) for owner in group}
    before = _between(needs, group)
    owners = list(dict.fromkeys(group[node] for node in order))
    early: dict[int, int] = {}
    for owner in owners:
        early[owner] = max((_fitting(early[each], parity[owner], 1) for each in before[owner]), default=parity[owner])
    most = max(early.values(), default=0)
    late = {owner: _fitting(most, parity[owner], -1) for owner in owners}
    for owner in reversed(owners):
        for each in before[owner]:
            late[each] = min(late[each], _fitting(late[owner], parity[each], -1))
    return [early[owner] for owner in group], [late[owner] for owner in group]


def _fitting(level: int, parity: int, step: int) -> int:
    """The level itself, or the next one in that direction of the other parity."""
    return level if level % 2 == parity else level + step


def _between(needs: Needs, group: Sequence[int]) -> dict[int, set[int]]:
    """Return for each group the other groups that it needs."""
    found: dict[int, set[int]] = {owner: set() for owner in group}
    for node, needed in enumerate(needs):
        found[group[node]].update(group[each] for each in needed)
    for owner, others in found.items():
        others.discard(owner)
    return found
