"""Cut plans: which runs of blocks go to which target, from what is known of blocks, of whole models and of segments in their place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from aivmm.errors import Infeasible, UsageError
from aivmm.models.records import Structure
from aivmm.planner.evidence import Estimate
from aivmm.planner.lazy import TOLERANCE, Chain, Look, Measure, look
from aivmm.planner.placement import block_bytes, edges_of, problem_of, runs_of
from aivmm.planner.segments import Segments
from aivmm.planner.solve import solve
from aivmm.runtime.target import Target

Handover = Callable[[str, str, int], float | None]  # source, destination, bytes -> seconds

# What a cut costs on host memory, modelled: the floor of an extra bound call, and writing plus reading the tensors that cross it where
# handing over has not been measured.
CUT_S = 15e-6
BYTES_PER_S = 4e9
_GRAPH_S = 1.0  # for the placement by the graph
PROMISE = 0.97  # an unforced cut has to be predicted at least this far below the best uncut plan to be worth proving


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """What placing came to. `worth_proving` are cut plans by name; `looked` is the search that the certificate speaks of.

    `looked` is also there where no cut is worth it: then it says how far below the best uncut plan any other one could be.
    """

    looked: Look | None = None
    worth_proving: tuple[tuple[str, Look], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainEvidence:
    """Evidence (the protocol) about the runs of blocks of one model, by target."""

    structure: Structure
    beliefs: Mapping[str, Segments]
    handover_s: Handover = lambda source, destination, size_bytes: None
    memory_bytes: Mapping[str, float] = field(default_factory=dict)  # the room for one segment, by target; infinite where it is not named
    _caps: dict[tuple[int, str, str], float] = field(default_factory=dict)  # (block, source, destination) -> seconds at most
    _prices: npt.NDArray[np.float64] = field(init=False, repr=False, compare=False)  # [boundary, from, to], seconds; `cap` lowers them

    def __post_init__(self) -> None:
        names, sizes = list(self.beliefs), _crossing_bytes(self.structure)
        prices = np.array([[[self.crossing_s(a, b, size) for b in names] for a in names] for size in sizes], dtype=np.float64)
        object.__setattr__(self, "_prices", prices.reshape(len(sizes), len(names), len(names)))

    def segment(self, first: int, last: int, choice: str) -> Estimate | None:
        """Return the cost of the blocks [first, last] as one segment; None where the choice does not run them."""
        return self.beliefs[choice].segment(first, last)

    def crossing(self, block: int, source: str, destination: str) -> Estimate | None:
        """Return the price of the boundary before a block between two choices: what a call costs, and the hand-over of what crosses."""
        size = _crossing_bytes(self.structure)[block - 1]
        seconds = min(self.crossing_s(source, destination, size), self._caps.get((block, source, destination), np.inf))
        if self.handover_s(source, destination, size) is None:
            return Estimate(seconds=seconds, sigma=0.5, source="modelled", because="the bandwidth of memory")
        return Estimate(seconds=seconds, sigma=0.3, source="interpolated", because="the fit of measured hand-overs")

    def crossing_s(self, source: str, destination: str, size_bytes: int) -> float:
        """Return the price of a boundary that so many bytes cross, in seconds."""
        known = self.handover_s(source, destination, size_bytes)
        return CUT_S + (size_bytes / BYTES_PER_S if known is None else known)

    def cap(self, block: int, source: str, destination: str, seconds: float) -> None:
        """Let the boundary before a block between two choices cost no more than this, also in chains that were returned before."""
        names = list(self.beliefs)
        where = block - 1, names.index(source), names.index(destination)
        self._prices[where] = self._caps[block, source, destination] = min(float(self._prices[where]), seconds)

    def chain(self, *, min_segments: int = 1) -> Chain:
        """Return the chain to be placed."""
        forbidden = self._without_room(list(self.beliefs))
        return Chain(beliefs=self.beliefs, prices=self._prices, min_segments=min_segments, forbidden=forbidden)

    def _without_room(self, names: Sequence[str]) -> npt.NDArray[np.bool_] | None:
        """Return which segments [first, last, choice] take more memory than there is; None where all have room."""
        if not any(np.isfinite(self.memory_bytes.get(name, np.inf)) for name in names):
            return None
        up_to = np.concatenate([[0.0], np.cumsum(block_bytes(self.structure))])
        held = up_to[None, 1:] - up_to[:-1, None]
        room: npt.NDArray[np.bool_] = held[:, :, None] > np.array([self.memory_bytes.get(name, np.inf) for name in names])
        return room


def place_cuts(
    evidence: ChainEvidence,
    measure: Measure,
    *,
    targets: Sequence[Target] = (),
    min_segments: int,
    most: int = 0,
    stop: Callable[[], bool] = lambda: False,
    unseen: Collection[int] = (),
) -> Cuts:
    """Find the cut plans worth proving, measuring what they rest on.

    Args:
        targets: those of the evidence; with them, an unforced search also tries what is best by the graph of the blocks.
        min_segments: the fewest segments asked for; above 1 the best cut is returned whatever it promises, and where it stays on one target
            also the best that does not: which one wins is for the proof to say.
        most: so many plans may be measured, for each of the two.
        unseen: blocks that some target was not asked for: where they run is not known, and nobody said that they do not.

    Raises:
        UsageError: cuts were asked for, and there is no such plan.
    """
    blocks, forced = evidence.structure.blocks, min_segments > 1
    if forced and len(blocks) < min_segments:
        raise UsageError(
            f"the model has {len(blocks)} blocks, so it cannot be cut into {min_segments} segments", advice="lower --min-segments"
        )
    nowhere = [block.index for block in blocks if all(each.segment(block.index, block.index) is None for each in evidence.beliefs.values())]
    if nowhere and forced and set(nowhere) <= set(unseen):
        which = f"block {nowhere[0]} was" if len(nowhere) == 1 else f"{len(nowhere)} of {len(blocks)} blocks were"
        raise UsageError(
            f"{which} not measured on every target before the budget ended, so no cut plan can be made", advice="raise --budget"
        )
    if nowhere and forced:
        raise UsageError(f"no target is known to run block {nowhere[0]} right, so no cut plan can be made", advice="drop --min-segments")
    if nowhere or len(blocks) < 2:
        return Cuts()
    chain = evidence.chain(min_segments=min_segments)
    if not forced and most and len(targets) > 1:
        _try_the_graph(evidence, targets, measure)
    # An uncut plan is given up only for what promises more than noise: what may promise less is not looked for.
    tolerance = TOLERANCE if forced else 1 / PROMISE - 1
    try:
        looked = look(chain, measure, most=most, stop=stop, tolerance=tolerance)
    except Infeasible as error:
        if not forced:
            return Cuts()  # no block has room in the memory that the constraints leave: the verdict names them
        raise UsageError(
            f"the model cannot be cut into {min_segments} segments here: {error.message}", advice="lower --min-segments"
        ) from error
    if not forced:
        uncut_s = _uncut_s(evidence)
        worth = len(looked.plan.segments) > 1 and (uncut_s is None or looked.plan.cost_s <= PROMISE * uncut_s)
        return Cuts(looked=looked, worth_proving=(("cut plan", looked),) if worth else ())
    found = [("cut plan", looked)]
    if len({name for _, _, name in looked.plan.segments}) == 1:
        # Without cuts within one target, each segment is on another one than the last.
        hybrid = replace(chain, cut_within=False)
        with suppress(Infeasible):
            found.append(("hybrid plan", look(hybrid, measure, most=most, stop=stop)))
    return Cuts(looked=looked, worth_proving=tuple(found))


def _try_the_graph(evidence: ChainEvidence, targets: Sequence[Target], measure: Measure) -> None:
    """Learn what the best placement by the graph of the blocks takes, where it promises more than noise and is not known."""
    problem = problem_of(evidence.structure, targets, evidence.beliefs, evidence.crossing_s)
    try:
        found = solve(problem, "latency", time_limit_s=_GRAPH_S)
    except (Infeasible, UsageError):
        return  # the chain says what is in the way
    spans = runs_of(evidence.structure, found.assignment)
    uncut_s = _uncut_s(evidence)
    known = all((first, last) in evidence.beliefs[name].measured for first, last, name in spans)
    if len(spans) > 1 and not known and (uncut_s is None or found.objective <= PROMISE * uncut_s):
        for (first, last, name), learnt in measure(spans).items():
            evidence.beliefs[name].observe(first, last, learnt)


def _uncut_s(evidence: ChainEvidence) -> float | None:
    """Return what the best uncut plan takes, or None when none was measured."""
    last = len(evidence.structure.blocks) - 1
    wholes = [each.measured.get((0, last)) for each in evidence.beliefs.values()]
    return min((each.seconds for each in wholes if each is not None), default=None)


def beliefs_of(
    structure: Structure, targets: Sequence[str], alone: Mapping[tuple[int, str], Estimate], wholes: Mapping[str, Estimate]
) -> dict[str, Segments]:
    """Return what is believed of each target's segments, from (block, target) -> the block alone, and target -> the whole model."""
    found = {}
    for target in targets:
        found[target] = Segments([alone.get((block.index, target)) for block in structure.blocks])
        if target in wholes:
            found[target].observe(0, len(structure.blocks) - 1, wholes[target])
    return found


def _crossing_bytes(structure: Structure) -> list[int]:
    """Return for each block but the first the bytes that it reads from the one before it; what is not known before the run counts as 0.

    Blocks further before may be on either side, so that what they hand over is at least nothing: a price that is too low is put right by
    what is measured in its place, one that is too high hides a plan.
    """
    sizes = [0] * (len(structure.blocks) - 1)
    for edge in edges_of(structure):
        if int(edge.reader) == int(edge.source) + 1:
            sizes[int(edge.source)] += int(edge.bytes)
    return sizes
