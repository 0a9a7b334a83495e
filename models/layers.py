"""Blocks that follow repeated structure: the layers of a transformer, the blocks of a stage are cut alike, so that one probe serves all.

1. Stretches of nodes that are one piece several times over are found by the nodes' signatures (`aivmm.models.repeats`); one counts when it
   holds at least a fair share of the work (total / most blocks).
2. Its pieces begin where all of them can be cut: of the phases with most pieces the one whose cuts are narrowest, then move fewest bytes.
   Their structure hashes decide whether they are alike.
3. Blocks are shared out by work. With more than one for each piece, a piece is cut by the rule of `aivmm.models.blocks` and all others as
   it; with fewer, a block holds as many pieces as it must. What stands between stretches is cut by that rule alone.

Where this makes more blocks than asked for, there are no such blocks, and the rule of `aivmm.models.blocks` cuts the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby

from aivmm.models.blocks import Place, partition
from aivmm.models.repeats import Repeat, stretches

Spans = list[tuple[int, int]]
HashOf = Callable[[int, int], str]  # (first, last) -> structure hash


def blocks_along_repeats(
    kinds: Sequence[str], work: Sequence[float], places: Mapping[int, Place], max_blocks: int, hash_of: HashOf
) -> Spans | None:
    """Return blocks as (first, last) positions, all nodes once, or None where nothing repeats or it would be more than `max_blocks`."""
    before = [0.0, *accumulate(work)]
    fair = before[-1] / max_blocks
    found = []
    for stretch in stretches(kinds, work):
        if before[stretch.reach] - before[stretch.first] >= fair > 0:
            phased = _alike(_phased(stretch, places, len(work)), hash_of)
            found += [phased] if phased is not None and before[phased.end] - before[phased.first] >= fair else []
    if not found:
        return None
    spans: Spans = []
    at = 0
    for repeat in found:
        spans += _between(at, repeat.first, work, places, fair)
        spans += _pieces(repeat, work, places, max(1, int((before[repeat.end] - before[repeat.first]) / fair)))
        at = repeat.end
    spans += _between(at, len(work), work, places, fair)
    spans = _joined(spans, before)
    return spans if len(spans) <= max_blocks else None


def _phased(stretch: Repeat, places: Mapping[int, Place], count: int) -> Repeat | None:
    """Let the pieces begin, and the last one end, at places; None when there are no two such pieces."""
    best: tuple[tuple[int, int, int, int], Repeat] | None = None
    for first in range(stretch.first, min(stretch.first + stretch.period, stretch.reach - 2 * stretch.period + 1)):
        pieces = (stretch.reach - first) // stretch.period
        edges = [first + number * stretch.period for number in range(pieces + 1)]
        inner = [places.get(edge) for edge in edges if edge not in (0, count)]
        if any(place is None for place in inner):
            continue
        level, size = max(((place.level, place.bytes) for place in inner if place is not None), default=(0, 0))
        rank = (-pieces, level, size, first)
        if best is None or rank < best[0]:
            best = rank, replace(stretch, first=first, count=pieces)
    return None if best is None else best[1]


def _alike(repeat: Repeat | None, hash_of: HashOf) -> Repeat | None:
    """The longest run of pieces that have one structure hash; None when no two have."""
    if repeat is None:
        return None
    starts = range(repeat.first, repeat.end, repeat.period)
    runs = [list(run) for _, run in groupby(starts, key=lambda start: hash_of(start, start + repeat.period - 1))]
    longest = max(runs, key=len)
    return replace(repeat, first=longest[0], count=len(longest)) if len(longest) > 1 else None


def _pieces(repeat: Repeat, work: Sequence[float], places: Mapping[int, Place], most: int) -> Spans:
    if most < repeat.count:
        group = next(
            (size for size in range(2, repeat.count + 1) if repeat.count % size == 0 and repeat.count // size <= most), repeat.count
        )
        if group > 2 * -(-repeat.count // most):  # no even division nearby: the last block holds fewer
            group = -(-repeat.count // most)
        length = group * repeat.period
        return [(first, min(first + length, repeat.end) - 1) for first in range(repeat.first, repeat.end, length)]
    starts = range(repeat.first, repeat.end, repeat.period)
    common = {
        offset: max((places[start + offset] for start in starts), key=lambda place: (place.level, place.bytes))
        for offset in range(1, repeat.period)
        if all(start + offset in places for start in starts)
    }
    inside = partition(work[repeat.first : repeat.first + repeat.period], common, most // repeat.count)
    return [(start + first, start + last) for start in starts for first, last in inside]


def _between(first: int, end: int, work: Sequence[float], places: Mapping[int, Place], fair: float) -> Spans:
    inside = work[first:end]
    mine = {position - first: place for position, place in places.items() if first < position < end}
    return [(first + start, first + last) for start, last in partition(inside, mine, max(1, int(sum(inside) / fair)))]


def _joined(spans: Spans, before: Sequence[float]) -> Spans:
    """Join a block without any work to the one before it (the first to the one after it)."""
    kept: Spans = []
    for first, last in spans:
        idle = before[last + 1] == before[first]
        if kept and (idle or before[kept[-1][1] + 1] == before[kept[-1][0]]):
            kept[-1] = (kept[-1][0], last)
        else:
            kept.append((first, last))
    return kept
