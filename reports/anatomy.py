"""The plan over the model's blocks: stages, the strip of blocks, and how many bytes are alive where the graph can be cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aivmm.models.records import Block, Structure
from aivmm.models.repeats import Repeat
from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData, number, stage_target

MOST_CELLS = 240  # more blocks than this are drawn in groups of neighbours


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, ready to be shown."""

    number: int
    target: str
    slot: int
    precision: str
    settings: tuple[tuple[str, str], ...]
    first: int | None
    last: int | None
    nodes: int | None
    flops_share: float | None
    weights: int
    arriving: int | None  # bytes over the cut before it; None for the first stage
    replicas: int

    @property
    def blocks(self) -> str:
        """`0–34`, or `all`."""
        if self.first is None:
            return "all"
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A column of the block pictures: neighbouring blocks (mostly one), with its place in percent of the width."""

    first: int
    last: int
    x: float
    width: float
    title: str
    stage: int | None = None  # number of the stage
    slot: int | None = None
    lowered: bool = False  # in another precision than fp32

    @property
    def name(self) -> str:
        """`block 3`, or `blocks 3–5`."""
        return f"block {self.first}" if self.first == self.last else f"blocks {self.first}–{self.last}"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A place between two cells: how many bytes cross, and whether the plan cuts there."""

    x: float
    height: float  # percent of the largest
    bytes: int
    title: str
    used: bool


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The plan section."""

    stages: tuple[Stage, ...] = ()
    cells: tuple[Cell, ...] = ()
    cuts: tuple[Cut, ...] = ()
    largest_cut: int = 0
    grouped: int = 1  # blocks in one cell
    alike: tuple[str, ...] = ()  # "blocks 3 to 14 are 12 × the same block"


def dissect(data: ReportData, colours: Mapping[str, int]) -> Anatomy:
    """Lay the plan's stages over the model's blocks. Without a structure there are stages but no picture, without a plan the reverse."""
    stages = tuple(_stage(data, index, colours) for index in range(len(data.stages)))
    if data.structure is None or not data.structure.blocks:
        return Anatomy(stages=stages)
    blocks = data.structure.blocks
    step = -(-len(blocks) // MOST_CELLS)
    groups = [blocks[start : start + step] for start in range(0, len(blocks), step)]
    cells = tuple(_cell(group, index, len(groups), stages) for index, group in enumerate(groups))
    cuts = _cuts(data.structure, cells, stages)
    return Anatomy(
        stages=stages,
        cells=cells,
        cuts=cuts,
        largest_cut=max((cut.bytes for cut in cuts), default=0),
        grouped=step,
        alike=tuple(map(_alike, data.structure.repeats)),
    )


def _alike(repeat: Repeat) -> str:
    what = "block" if repeat.period == 1 else f"{repeat.period} blocks"
    return f"blocks {repeat.first} to {repeat.end - 1} are {repeat.count} × the same {what}"


def operators_of(block: Block, limit: int = 4) -> str:
    """Return a block's operators, most frequent first: `Conv ×3, Relu ×3`."""
    ranked = sorted(block.op_types.items(), key=lambda item: (-item[1], item[0]))
    return fmt.listing([f"{fmt.shorten(name, 40)} ×{times}" if times > 1 else fmt.shorten(name, 40) for name, times in ranked], limit)


def config_of(source: Any) -> tuple[tuple[tuple[str, str], ...], str]:
    """Return (settings, precision) of a stored config, whichever way it was written."""
    if isinstance(source, Mapping):
        inner = source.get("settings", source)
        if isinstance(inner, Mapping):
            pairs = tuple((str(name), str(value)) for name, value in sorted(inner.items()) if name != "precision")
            return pairs, str(source.get("precision") or "")
        if isinstance(inner, (list, tuple)):
            return tuple((str(pair[0]), str(pair[1])) for pair in inner if isinstance(pair, (list, tuple)) and len(pair) == 2), str(
                source.get("precision") or ""
            )
    return ((("config", str(source)),) if source else ()), ""


def _stage(data: ReportData, index: int, colours: Mapping[str, int]) -> Stage:
    raw = data.stages[index]
    settings, precision = config_of(raw.get("config"))
    first, last = _range(raw)
    blocks = _between(data.structure, first, last) if data.structure else ()
    known = [block.flops for block in blocks if block.flops is not None]
    whole = data.structure.flops if data.structure else None
    return Stage(
        number=index + 1,
        target=stage_target(raw),
        slot=colours.get(stage_target(raw), 0),
        precision=_asked(raw.get("precision") or precision),
        settings=settings,
        first=first,
        last=last,
        nodes=sum(block.last - block.first + 1 for block in blocks) if blocks else None,
        flops_share=sum(known) / whole if known and whole else None,
        weights=sum(block.weight_bytes for block in blocks),
        arriving=_arriving(data.structure, first) if index and data.structure else None,
        replicas=int(number(raw.get("replicas")) or 1),
    )


def _asked(precision: Any) -> str:
    """Return the precision asked for; empty when it was left to the runtime."""
    return "" if precision in (None, "default") else str(precision)


def _range(stage: Mapping[str, Any]) -> tuple[int | None, int | None]:
    blocks = stage.get("blocks")
    if isinstance(blocks, (list, tuple)) and len(blocks) == 2:
        first, last = number(blocks[0]), number(blocks[1])
        if first is not None and last is not None:
            return int(first), int(last)
    return None, None


def _between(structure: Structure, first: int | None, last: int | None) -> tuple[Block, ...]:
    if first is None or last is None:
        return structure.blocks
    return tuple(block for block in structure.blocks if first <= block.index <= last)


def _arriving(structure: Structure, first: int | None) -> int | None:
    """Return the bytes alive at the cut before block `first`."""
    block = next((block for block in structure.blocks if block.index == first), None)
    if block is None:
        return None
    cut = next((cut for cut in structure.cut_points if cut.position == block.first), None)
    if cut is not None and cut.bytes is not None:
        return cut.bytes
    sizes = [tensor.nbytes for tensor in block.inputs]
    return sum(size for size in sizes if size is not None) if sizes and None not in sizes else None


def _cell(group: tuple[Block, ...], index: int, total: int, stages: tuple[Stage, ...]) -> Cell:
    first, last = group[0], group[-1]
    stage = next((each for each in stages if each.first is None or each.first <= first.index <= (each.last or 0)), None)
    name = f"Block {first.index}" if len(group) == 1 else f"Blocks {first.index}–{last.index}"
    placed = f", stage {stage.number} on {stage.target}" if stage else ""
    return Cell(
        first=first.index,
        last=last.index,
        x=round(100 * index / total, 3),
        width=round(100 / total, 3),
        title=f"{name}{placed}: {fmt.shorten(operators_of(first), 120)}",
        stage=stage.number if stage else None,
        slot=stage.slot if stage else None,
        lowered=stage is not None and stage.precision not in ("", "fp32", "f32"),
    )


def _cuts(structure: Structure, cells: tuple[Cell, ...], stages: tuple[Stage, ...]) -> tuple[Cut, ...]:
    used = {stage.first for stage in stages[1:]}
    found = [(cell, size) for cell in cells[1:] if (size := _arriving(structure, cell.first)) is not None]
    largest = max((size for _, size in found), default=0)
    return tuple(
        Cut(
            x=cell.x,
            height=round(100 * size / largest, 2) if largest else 0.0,
            bytes=size,
            title=f"Before block {cell.first}: {fmt.size(size)} alive" + (", the plan cuts here" if cell.first in used else ""),
            used=cell.first in used,
        )
        for cell, size in found
    )
