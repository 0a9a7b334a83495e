"""The plan over the model's blocks: stages, the strip of blocks, and how many bytes are alive where the graph can be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aivmm.models.records import Block, Structure
from aivmm.models.repeats import Repeat
from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData, dig, number, places_of, stage_target

MOST_CELLS = 240  # more blocks than this are drawn in groups of neighbours
_MOST_BANDS = 8  # executables of one stage that are drawn each by itself
_HEIGHT, _BAND = 44, 18  # pixels of the strip of blocks, and of each of several bands of it at least


@dataclass(frozen=True, kw_only=True)
class Place:
    """What runs a stage: its own target, or that of a copy. `share` is its part of the requests, all its replicas together."""

    target: str
    slot: int
    precision: str  # as asked for; empty when it was left to the runtime
    settings: tuple[tuple[str, str], ...]
    replicas: int = 1
    share: float | None = None

    @property
    def lowered(self) -> bool:
        """True in another precision than fp32."""
        return self.precision not in ("", "fp32", "f32")

    @property
    def load(self) -> str:
        """`2 replicas, 40 % of the requests`; empty for one that takes every request."""
        several = [fmt.count(self.replicas, "replica")] if self.replicas > 1 else []
        return ", ".join([*several, *([f"{fmt.percent(self.share)} of the requests"] if self.share is not None else [])])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, ready to be shown. Each request goes through one of its `places`, of which the stage's own target is the first."""

    number: int
    places: tuple[Place, ...]
    first: int | None
    last: int | None
    nodes: int | None
    flops_share: float | None
    weights: int
    arriving: int | None  # bytes over the cut before it; None for the first stage

    @property
    def blocks(self) -> str:
        """`0–34`, or `all`."""
        if self.first is None:
            return "all"
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"

    @property
    def where(self) -> str:
        """`openvino:CPU (2 replicas) beside onnxruntime:CPU`."""
        named = [
            fmt.shorten(each.target, 60) + (f" ({fmt.count(each.replicas, 'replica')})" if each.replicas > 1 else "")
            for each in self.places[:3]
        ]
        return " beside ".join([*named, *([f"{len(self.places) - 3} more"] if len(self.places) > 3 else [])])

    @property
    def drawn(self) -> tuple[Place, ...]:
        """What the strip shows of it, from above: each executable as long as there are few, else each place once."""
        if self.executables > _MOST_BANDS:
            return self.places[:_MOST_BANDS]
        return tuple(place for place in self.places for _ in range(place.replicas))

    @property
    def executables(self) -> int:
        """How many there are of it, replicas and copies counted."""
        return sum(each.replicas for each in self.places)


@dataclass(frozen=True, kw_only=True)
class Band:
    """A part of a cell: what runs these blocks beside what is above and below it. In percent of the strip's height."""

    y: float
    height: float
    slot: int
    lowered: bool  # in another precision than fp32


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A column of the block pictures: neighbouring blocks (mostly one), with its place in percent of the width."""

    first: int
    last: int
    x: float
    width: float
    title: str
    stage: int | None = None  # number of the stage
    bands: tuple[Band, ...] = ()  # one for each executable of the stage; none without a plan

    @property
    def lowered(self) -> bool:
        """True when any of its bands is in another precision than fp32."""
        return any(each.lowered for each in self.bands)

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
    load: str = ""  # how requests go through the stages, where several are under way at once

    @property
    def height(self) -> int:
        """The height of the strip in pixels."""
        return max(_HEIGHT, _BAND * max((len(cell.bands) for cell in self.cells), default=1))

    @property
    def beside(self) -> str:
        """Say what bands of a block are; empty where no stage is in several places."""
        if all(stage.executables == 1 for stage in self.stages):
            return ""
        said = "Bands above each other run the same blocks side by side, and a request goes through one of them"
        every = all(stage.executables <= _MOST_BANDS for stage in self.stages)
        return f"{said}." if every else f"{said}; where there are more than {_MOST_BANDS}, replicas of one are drawn once."


def dissect(data: ReportData, colours: Mapping[str, int]) -> Anatomy:
    """Lay the plan's stages over the model's blocks. Without a structure there are stages but no picture, without a plan the reverse."""
    stages = tuple(_stage(data, index, colours) for index in range(len(data.stages)))
    if data.structure is None or not data.structure.blocks:
        return Anatomy(stages=stages, load=_load(data))
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
        load=_load(data),
    )


def _load(data: ReportData) -> str:
    """Say how many requests are under way, and whether each stage works on another one; empty for one request at a time."""
    plan = data.plan or data.run.summary.get("plan")
    mode = dig(plan, "execution", "mode") or dig(plan, "mode")
    callers = int(number(dig(plan, "callers")) or 1)
    if callers < 2:
        return ""
    how = ", and all stages work at once, each on another one" if mode == "pipelined" else ""
    return f"{fmt.count(callers, 'request')} are under way at once{how}."


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
    first, last = _range(raw)
    blocks = _between(data.structure, first, last) if data.structure else ()
    known = [block.flops for block in blocks if block.flops is not None]
    whole = data.structure.flops if data.structure else None
    return Stage(
        number=index + 1,
        places=tuple(_place(each, colours) for each in places_of(raw)),
        first=first,
        last=last,
        nodes=sum(block.last - block.first + 1 for block in blocks) if blocks else None,
        flops_share=sum(known) / whole if known and whole else None,
        weights=sum(block.weight_bytes for block in blocks),
        arriving=_arriving(data.structure, first) if index and data.structure else None,
    )


def _place(raw: Mapping[str, Any], colours: Mapping[str, int]) -> Place:
    settings, precision = config_of(raw.get("config"))
    return Place(
        target=stage_target(raw),
        slot=colours.get(stage_target(raw), 0),
        precision=_asked(raw.get("precision") or precision),
        settings=settings,
        replicas=max(1, int(number(raw.get("replicas")) or 1)),
        share=number(raw.get("share")),
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
    placed = f", stage {stage.number} on {stage.where}" if stage else ""
    return Cell(
        first=first.index,
        last=last.index,
        x=round(100 * index / total, 3),
        width=round(100 / total, 3),
        title=f"{name}{placed}: {fmt.shorten(operators_of(first), 120)}",
        stage=stage.number if stage else None,
        bands=_bands(stage.drawn) if stage else (),
    )


def _bands(drawn: Sequence[Place]) -> tuple[Band, ...]:
    tall = 100 / len(drawn)
    return tuple(
        Band(y=round(index * tall, 3), height=round(tall, 3), slot=each.slot, lowered=each.lowered) for index, each in enumerate(drawn)
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
