"""Shapes as a user lists them: `--dim seq=32,128,512`, `--dim seq=32..512`, `--shape image=1x3x224x224,1x3x448x448`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from aivmm.errors import UsageError

MOST_BUCKETS = 16  # each is tuned and proven on its own
_MOST_EXTENT = 1 << 40

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One shape that a plan is wanted for. `name` says where it differs from the others; it is empty when there is only one."""

    name: str
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)


def parse_dim_lists(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the extents of each dimension, ascending, from `NAME=N`, `NAME=32,128` and `NAME=32..512` (32, 64, 128, 256, 512).

    Raises:
        UsageError: it does not read as such, or an extent is asked for twice.
    """
    dims: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, items = text.rpartition("=")
        option = f"--dim {text!r}"
        if not equals or not name or not items:
            raise UsageError(
                f"{option} does not read as NAME=N", advice="write it like --dim seq=128, --dim seq=32,128 or --dim seq=32..512"
            )
        if name in dims:
            raise UsageError(f"--dim {name} is given twice", advice=f"list its extents: --dim {name}=32,128")
        found: list[int] = []
        spans: list[tuple[int, int, str]] = []
        for item in items.split(","):
            first, last = _span(item.strip(), option)
            clash = next((said for low, high, said in spans if first <= high and low <= last), None)
            if clash is not None:
                raise UsageError(f"{option}: {item.strip()} overlaps {clash}", advice="give each extent once")
            spans.append((first, last, item.strip()))
            found += doublings(first, last)
        dims[name] = tuple(sorted(found))
    return dims


def parse_shape_lists(texts: Iterable[str]) -> dict[str, tuple[Shape, ...]]:
    """Return the shapes of each input from `NAME=1x3x224x224`, lists of those, and ranges that grow together: `NAME=1x3x64..256x64..256`.

    Raises:
        UsageError: it does not read as such, a shape is asked for twice, or the ranges of one shape have unlike numbers of steps.
    """
    shapes: dict[str, tuple[Shape, ...]] = {}
    for text in texts:
        name, equals, items = text.rpartition("=")
        option = f"--shape {text!r}"
        if not equals or not name:
            raise UsageError(f"{option} does not read as NAME=EXTENTS", advice="write it like --shape input=1x3x224x224")
        if name in shapes:
            raise UsageError(f"--shape {name} is given twice", advice=f"list its shapes: --shape {name}=1x3x224x224,1x3x448x448")
        found = [shape for item in items.split(",") for shape in _shapes(item.strip(), option)]
        twice = next((shape for index, shape in enumerate(found) if shape in found[:index]), None)
        if twice is not None:
            one = "x".join(items.split(","))  # commas are what arrays are written with elsewhere
            meant = f"; if that is one shape, write it as {name}={one}" if all(len(shape) == 1 for shape in found) else ""
            raise UsageError(f"{option}: {'x'.join(map(str, twice))} is there twice", advice=f"give each shape once{meant}")
        shapes[name] = tuple(found)
    return shapes


def wanted(shapes: Mapping[str, Sequence[Shape]], dims: Mapping[str, Sequence[int]]) -> tuple[Wanted, ...]:
    """Return each shape that a plan is wanted for: every extent of a dimension with every one of another, and shapes of inputs in step.

    Raises:
        UsageError: inputs have lists of unlike lengths, or there are more shapes than can be tuned.
    """
    steps = {name: len(each) for name, each in shapes.items() if len(each) > 1}
    if len(set(steps.values())) > 1:
        unlike = ", ".join(f"{count} for {name!r}" for name, count in steps.items())
        raise UsageError(f"--shape lists unlike numbers of shapes: {unlike}", advice="inputs change together: give each as many")
    count = next(iter(steps.values()), 1)
    moving = [name for name, each in dims.items() if len(each) > 1]
    found = []
    for step in range(count):
        bound = {name: tuple(each[step if len(each) > 1 else 0]) for name, each in shapes.items()}
        for extents in product(*dims.values()):
            given = dict(zip(dims, extents, strict=True))
            said = [f"{name}={'x'.join(map(str, bound[name]))}" for name in steps] + [f"{name}={given[name]}" for name in moving]
            found.append(Wanted(name=", ".join(said), shapes=bound, dims=given))
    if len(found) > MOST_BUCKETS:
        raise UsageError(
            f"{len(found)} shapes are more than the {MOST_BUCKETS} that one plan holds", advice="list fewer with --dim and --shape"
        )
    return tuple(found)


def doublings(first: int, last: int) -> Iterator[int]:
    """Yield `first`, its doubles below `last`, and `last`."""
    extent = first
    while extent < last:
        yield extent
        extent *= 2
    yield last


def _span(item: str, option: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,15})(?:\.\.(\d{1,15}))?", item)
    if not found:
        raise UsageError(f"{option}: {item!r} is no extent and no range", advice="write extents like 128 and ranges like 32..512")
    first, last = int(found[1]), int(found[2] or found[1])
    if found[2] and first >= last:
        raise UsageError(f"{option}: the range {item} does not go up", advice=f"write it like {min(first, last)}..{max(first, last) + 1}")
    if not 1 <= first <= last < _MOST_EXTENT:
        raise UsageError(f"{option}: an extent must be at least 1", advice="write it like --dim seq=128")
    return first, last


def _shapes(item: str, option: str) -> list[Shape]:
    if not item:
        return [()]
    spans = []
    for part in item.split("x"):
        if not re.fullmatch(r"\d{1,15}(\.\.\d{1,15})?", part):
            raise UsageError(f"{option} does not read as NAME=EXTENTS", advice="write it like --shape input=1x3x224x224")
        spans.append(_span(part, option) if ".." in part else (int(part), int(part)))
    axes = [list(doublings(*span)) for span in spans]
    steps = {len(axis) for axis in axes if len(axis) > 1}
    if len(steps) > 1:
        raise UsageError(f"{option}: the ranges of {item} have unlike numbers of steps", advice="list the shapes one by one, with commas")
    return [tuple(axis[min(step, len(axis) - 1)] for axis in axes) for step in range(max(steps, default=1))]
