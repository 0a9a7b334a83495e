"""Where time goes: blocks and operators by target, and who wins what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aivmm.models.records import Block, Operator
from aivmm.probes.records import Measured, Outcome, ProbeKind
from aivmm.reports import format as fmt
from aivmm.reports.anatomy import Cell, config_of, operators_of
from aivmm.reports.data import ReportData, dig, number, places_of, stage_target
from aivmm.reports.intervals import apart

MOST_OPERATORS = 10
MOST_BLOCKS = 10
_FEW = 5  # a lane with less than a fifth of what the best known one has compares nothing


@dataclass(frozen=True, order=True)
class Lane:
    """One row of a comparison: a target, in the precision asked for ("" is the runtime's default)."""

    target: str
    precision: str = ""

    def __str__(self) -> str:
        return f"{self.target} · {self.precision}" if self.precision else self.target


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one subject costs on one lane. `outcome` is None when it was never probed."""

    outcome: Outcome | None
    total_s: float | None = None
    share: float | None = None  # of the lane's sum
    bar: float = 0.0  # percent of the longest bar in the table
    flop_rate: str = ""
    byte_rate: str = ""

    @property
    def state(self) -> str:
        """`measured`, `refused`, `failed`, or `not measured`."""
        return type(self.outcome).__name__.lower() if self.outcome else "not measured"


@dataclass(frozen=True, kw_only=True)
class Row:
    """An operator or a block, with its cost on each lane and the winner among them."""

    title: str
    detail: str
    count: int
    costs: tuple[Cost, ...]
    winner: int | None  # index of the lane; None when nothing is decided
    verdict: str


@dataclass(frozen=True, kw_only=True)
class HeatRow:
    """A lane of the heat map: for each cell (time or None, opacity, what to say)."""

    lane: Lane
    slot: int
    cells: tuple[tuple[float | None, float, str], ...]


@dataclass(frozen=True, kw_only=True)
class Sum:
    """What a lane's parts add up to, beside the whole."""

    lane: Lane
    slot: int
    whole_s: float | None
    blocks_s: float | None
    operators_s: float | None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The section `where time goes`."""

    block_lanes: tuple[Lane, ...] = ()
    heat: tuple[HeatRow, ...] = ()
    heat_most_s: float = 0.0
    winners: tuple[tuple[int | None, str], ...] = ()  # for each cell: colour slot or None, what to say
    blocks: tuple[Row, ...] = ()
    block_count: int = 0
    operator_lanes: tuple[Lane, ...] = ()
    operators: tuple[Row, ...] = ()
    operator_count: int = 0
    tally: tuple[str, ...] = ()  # sentences: who wins how many operators
    sums: tuple[Sum, ...] = ()
    batch: int = 1


def account(data: ReportData, cells: Sequence[Cell], colours: Mapping[str, int]) -> Costs:
    """Compare the lanes over blocks and operators. Without a structure or probes the parts are empty."""
    if data.structure is None:
        return Costs()
    blocks, operators = _Table(data, "segment"), _Table(data, "operator")
    block_rows = [_block_row(block, blocks, data) for block in data.structure.blocks]
    operator_rows = [_operator_row(operator, operators) for operator in data.structure.operators]
    return Costs(
        block_lanes=blocks.lanes,
        heat=_heat(data, blocks, cells, colours),
        heat_most_s=_hottest(data, blocks, cells),
        winners=_winners(block_rows, blocks.lanes, cells, colours),
        blocks=_largest(block_rows, MOST_BLOCKS),
        block_count=len(block_rows),
        operator_lanes=operators.lanes,
        operators=_largest(operator_rows, MOST_OPERATORS),
        operator_count=len(operator_rows),
        tally=_tally(operator_rows, operators.lanes),
        sums=_sums(data, blocks, operators, colours),
        batch=blocks.batch,
    )


class _Table:
    """The outcomes of one kind that may be compared: one batch, one caller, one config for each subject and lane."""

    def __init__(self, data: ReportData, kind: ProbeKind) -> None:
        of_kind = [
            outcome
            for outcome in data.outcomes
            if outcome.key.kind == kind and outcome.key.callers == 1 and not outcome.key.subject.startswith("ceiling:")
        ]
        self.batch = _batch(data, of_kind)
        places = [place for stage in data.stages for place in places_of(stage)]
        self._wanted = {stage_target(each): config_of(each.get("config"))[0] for each in reversed(places)}
        self._found: dict[tuple[str, Lane], Outcome] = {}
        for outcome in of_kind:
            if outcome.key.batch == self.batch:
                # What depends on data is keyed by more than its hash: by the input too.
                place = (outcome.key.subject.partition("@")[0], _lane(outcome))
                if place not in self._found or self._rank(outcome) < self._rank(self._found[place]):
                    self._found[place] = outcome
        parts = _parts(data, kind)  # a segment of several blocks is none of them
        counts = Counter(lane for (subject, lane), outcome in self._found.items() if subject in parts and isinstance(outcome, Measured))
        measured = {lane for lane, count in counts.items() if count * _FEW >= max(counts.values())}
        order = {target: index for index, target in enumerate(data.targets)}
        self.lanes = tuple(sorted(measured, key=lambda lane: (order.get(lane.target, len(order)), lane)))

    def get(self, subjects: Sequence[str], lane: Lane) -> Outcome | None:
        """Return the outcome of the first of `subjects` (structure, content) known on `lane`."""
        return next((self._found[subject, lane] for subject in subjects if (subject, lane) in self._found), None)

    def median(self, subjects: Sequence[str], lane: Lane) -> float | None:
        """Return its median in seconds when it was measured."""
        outcome = self.get(subjects, lane)
        return outcome.samples.median_s if isinstance(outcome, Measured) else None

    def _rank(self, outcome: Outcome) -> tuple[bool, bool, bool, float]:
        """Prefer what was measured, then the plan's own config, then the defaults, then the faster."""
        settings = tuple((name, str(value)) for name, value in outcome.key.config.settings)
        time = outcome.samples.median_s if isinstance(outcome, Measured) else 0.0
        return not isinstance(outcome, Measured), settings != self._wanted.get(outcome.key.target), bool(settings), time


def _parts(data: ReportData, kind: ProbeKind) -> set[str]:
    """Return the subjects that a table of this kind has rows for."""
    assert data.structure is not None
    structure = data.structure
    if kind == "segment":
        return {subject for block in structure.blocks for subject in _subjects(block)}
    return {operator.signature for operator in structure.operators} if kind == "operator" else {structure.structure, structure.content}


def _lane(outcome: Outcome) -> Lane:
    return Lane(outcome.key.target, outcome.key.config.precision or "")


def _batch(data: ReportData, outcomes: Sequence[Outcome]) -> int:
    """Return the plan's batch where its parts were measured at it, else the model's."""
    known = {outcome.key.batch for outcome in outcomes}
    planned = int(number(dig(data.run.summary, "plan", "batch")) or number(dig(data.plan, "batch")) or data.run.model.batch)
    return planned if planned in known else data.run.model.batch


def _subjects(block: Block) -> tuple[str, str]:
    return block.structure, block.content


def _block_row(block: Block, table: _Table, data: ReportData) -> Row:
    outcomes = [table.get(_subjects(block), lane) for lane in table.lanes]
    costs = _costs(outcomes, 1, block.flops, None)
    winner, verdict = _winner(outcomes, table.lanes)
    nodes = block.last - block.first + 1
    detail = f"{operators_of(block, 3)} · {fmt.count(nodes, 'node')}"
    if block.flops is not None:
        detail += f" · {fmt.flops(block.flops)}"
    return Row(title=f"Block {block.index}", detail=detail, count=1, costs=costs, winner=winner, verdict=verdict)


def _operator_row(operator: Operator, table: _Table) -> Row:
    outcomes = [table.get((operator.signature,), lane) for lane in table.lanes]
    costs = _costs(outcomes, operator.count, operator.flops, operator.bytes)
    winner, verdict = _winner(outcomes, table.lanes)
    return Row(title=operator.op_type, detail=operator.description, count=operator.count, costs=costs, winner=winner, verdict=verdict)


def _costs(outcomes: Sequence[Outcome | None], count: int, flops: float | None, moved: int | None) -> tuple[Cost, ...]:
    def cost(outcome: Outcome | None) -> Cost:
        if not isinstance(outcome, Measured):
            return Cost(outcome=outcome)
        median = outcome.samples.median_s
        flop_rate = fmt.rate(flops / median, "flop") if flops else ""
        return Cost(
            outcome=outcome, total_s=median * count, flop_rate=flop_rate, byte_rate=fmt.rate(moved / median, "byte") if moved else ""
        )

    return tuple(cost(outcome) for outcome in outcomes)


def _winner(outcomes: Sequence[Outcome | None], lanes: Sequence[Lane]) -> tuple[int | None, str]:
    """Name the fastest lane, unless its interval overlaps the runner-up's."""
    timed = sorted((outcome.samples.median_s, index) for index, outcome in enumerate(outcomes) if isinstance(outcome, Measured))
    if not timed:
        return None, "not measured"
    first = timed[0][1]
    if len(timed) == 1:
        return (first, "only one that ran it") if len(lanes) > 1 else (first, "")
    best, second = outcomes[first], outcomes[timed[1][1]]
    if isinstance(best, Measured) and isinstance(second, Measured) and not apart(best.samples, second.samples):
        return None, "same within noise"
    return first, f"{fmt.ratio(timed[1][0] / timed[0][0])} faster"


def _largest(rows: Sequence[Row], limit: int) -> tuple[Row, ...]:
    """Fill in shares of each lane's sum and bar lengths, and keep the rows that cost most anywhere."""
    if not rows or not rows[0].costs:
        return ()
    sums = [sum(row.costs[lane].total_s or 0.0 for row in rows) for lane in range(len(rows[0].costs))]
    most = max((cost.total_s or 0.0 for row in rows for cost in row.costs), default=0.0)

    def filled(cost: Cost, whole: float) -> Cost:
        if cost.total_s is None or not whole or not most:
            return cost
        return Cost(
            outcome=cost.outcome,
            total_s=cost.total_s,
            share=cost.total_s / whole,
            bar=round(100 * cost.total_s / most, 1),
            flop_rate=cost.flop_rate,
            byte_rate=cost.byte_rate,
        )

    ranked = sorted(rows, key=lambda row: -max((cost.total_s or 0.0 for cost in row.costs), default=0.0))
    return tuple(
        Row(
            title=row.title,
            detail=row.detail,
            count=row.count,
            costs=tuple(filled(cost, whole) for cost, whole in zip(row.costs, sums, strict=True)),
            winner=row.winner,
            verdict=row.verdict,
        )
        for row in ranked[:limit]
    )


def _tally(rows: Sequence[Row], lanes: Sequence[Lane]) -> tuple[str, ...]:
    """Say for each lane how many operators it wins, and what share of the fastest lane's time for each they are."""
    if len(lanes) < 2:
        return ()
    best = [min((cost.total_s for cost in row.costs if cost.total_s is not None), default=0.0) for row in rows]
    whole = sum(best) or 1.0
    said = []
    for index, lane in enumerate(lanes):
        mine = [time for row, time in zip(rows, best, strict=True) if row.winner == index]
        if mine:
            said.append(f"{lane} wins {fmt.count(len(mine), 'operator')} ({fmt.percent(sum(mine) / whole)} of the time)")
    ties = [time for row, time in zip(rows, best, strict=True) if row.verdict == "same within noise"]
    if ties:
        verb = "is" if len(ties) == 1 else "are"
        said.append(f"{fmt.count(len(ties), 'operator')} {verb} the same within noise ({fmt.percent(sum(ties) / whole)})")
    return tuple(said)


def _cell_times(data: ReportData, table: _Table, cells: Sequence[Cell], lane: Lane) -> list[float | None]:
    """Return each cell's time on a lane; a group with any unmeasured block has none."""
    assert data.structure is not None
    times = {block.index: table.median(_subjects(block), lane) for block in data.structure.blocks}
    sums: list[float | None] = []
    for cell in cells:
        known = [times.get(index) for index in range(cell.first, cell.last + 1)]
        sums.append(None if None in known else sum(time for time in known if time is not None))
    return sums


def _hottest(data: ReportData, table: _Table, cells: Sequence[Cell]) -> float:
    return max((time or 0.0 for lane in table.lanes for time in _cell_times(data, table, cells, lane)), default=0.0)


def _heat(data: ReportData, table: _Table, cells: Sequence[Cell], colours: Mapping[str, int]) -> tuple[HeatRow, ...]:
    most = _hottest(data, table, cells)
    rows = []
    for lane in table.lanes:
        shown: list[tuple[float | None, float, str]] = []
        for cell, time in zip(cells, _cell_times(data, table, cells, lane), strict=True):
            if time is None:
                shown.append((None, 0.0, f"{lane}, {cell.name}: not measured"))
            else:  # the power below 1 keeps short blocks visible beside long ones
                shown.append((time, round(0.05 + 0.95 * (time / most) ** 0.75, 3), f"{lane}, {cell.name}: {fmt.seconds(time)}"))
        rows.append(HeatRow(lane=lane, slot=colours.get(lane.target, 0), cells=tuple(shown)))
    return tuple(rows)


def _winners(
    rows: Sequence[Row], lanes: Sequence[Lane], cells: Sequence[Cell], colours: Mapping[str, int]
) -> tuple[tuple[int | None, str], ...]:
    if len(lanes) < 2:
        return ()
    by_index = dict(enumerate(rows))
    shown: list[tuple[int | None, str]] = []
    for cell in cells:
        row = by_index.get(cell.first)
        if cell.first != cell.last or row is None:
            shown.append((None, f"{cell.name}: several blocks"))
        elif row.winner is None:
            shown.append((None, f"{cell.name}: {row.verdict}"))
        else:
            lane = lanes[row.winner]
            shown.append((colours.get(lane.target, 0), f"{cell.name}: {lane}, {row.verdict}"))
    return tuple(shown)


def _sums(data: ReportData, blocks: _Table, operators: _Table, colours: Mapping[str, int]) -> tuple[Sum, ...]:
    """Set the whole model beside the sum of its parts, for each lane on which all parts were measured."""
    assert data.structure is not None
    structure = data.structure
    whole = _Table(data, "model")
    lanes = tuple(dict.fromkeys((*whole.lanes, *blocks.lanes, *operators.lanes)))

    def total(table: _Table, parts: Sequence[tuple[tuple[str, ...], int]], lane: Lane) -> float | None:
        times = [(table.median(subjects, lane), count) for subjects, count in parts]
        if not times or any(time is None for time, _ in times):
            return None
        return sum((time or 0.0) * count for time, count in times)

    block_parts: list[tuple[tuple[str, ...], int]] = [(_subjects(block), 1) for block in structure.blocks]
    operator_parts: list[tuple[tuple[str, ...], int]] = [((operator.signature,), operator.count) for operator in structure.operators]
    rows = [
        Sum(
            lane=lane,
            slot=colours.get(lane.target, 0),
            whole_s=whole.median((structure.structure, structure.content), lane) if whole.batch == blocks.batch else None,
            blocks_s=total(blocks, block_parts, lane),
            operators_s=total(operators, operator_parts, lane),
        )
        for lane in lanes
    ]
    return tuple(row for row in rows if row.blocks_s is not None or row.operators_s is not None)
