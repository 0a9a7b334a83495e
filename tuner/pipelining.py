"""Pipelined plans for throughput: placed with what stages cost each other, which is measured in place for the pairs that a plan uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from aivmm.planner.candidates import Draft, Piece
from aivmm.planner.partition import BYTES_PER_S, CUT_S, ChainEvidence
from aivmm.planner.pipeline import Pair, Pipeline, Replicas, Room, Run, hoped_pipeline, in_one_stage, look_at_pipelines
from aivmm.planner.placement import block_bytes
from aivmm.planner.problem import Move
from aivmm.runtime.config import Config
from aivmm.tuner.depths import deep
from aivmm.tuner.together import Together
from aivmm.tuner.tried import Tried
from aivmm.tuner.verdict import describe
from aivmm.tuner.work import Work

NAME = "pipelined plan"
DEPTH = 2  # until `tuner.depths` has looked at others: one request is computed, one is waiting
_SIZES = (1 << 10, 1 << 20)  # from which the line of a hand-over's cost is drawn
_WORTH = 0.97  # of the best uncut plan's time per sample: what promises less is not proven


@dataclass(slots=True)
class Pipeliner:
    """Finds the pipelined plan worth proving. `evidence` says what blocks take, `configs` how each target is compiled.

    `memory_bytes` is the room on each target, infinite where it is not named; `replicas` how many a stage may have there. `wholes` are the
    seconds of the whole model with `configs` where those are not the ones of the evidence, as on a part of a processor. Plans are
    `forced` where the model has to be cut; none is measured once `stop` says so. `tried` has what came of it.
    """

    work: Work
    evidence: ChainEvidence
    configs: Mapping[str, Config]
    together: Together
    memory_bytes: Mapping[str, float] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)
    wholes: Mapping[str, float] = field(default_factory=dict)
    forced: bool = False
    stop: Callable[[], bool] = lambda: False
    found: Pipeline | None = None
    tried: Tried | None = None
    _asked: bool = False  # for measurements

    def drafts(self, *, uncut_s: float | None) -> list[Draft]:
        """Return the pipelined plan, if one promises to beat `uncut_s`, the time per request of the best plan known; or if it is forced."""
        names = [name for name in self.configs if self._costs(name) is not None]
        blocks = self.evidence.structure.blocks
        if len(names) < 2 or len(blocks) < 2:
            return []
        costs = {name: costs for name in names if (costs := self._costs(name)) is not None}
        sizes = [self._crossing(index) for index in range(1, len(blocks))]
        moves = {(a, b): self._move(a, b) for a in names for b in names if a != b}
        held = block_bytes(self.evidence.structure)
        room = Room(block_bytes=held, memory_bytes=self.memory_bytes, most_replicas=self.replicas)
        looks = look_at_pipelines(costs, sizes, moves, self._measure, room=room, forced=self.forced, stop=self.stop)
        if not looks:
            hoped = hoped_pipeline(costs, sizes, moves, room)
            if hoped is not None:
                lost = self._tried(self.draft(NAME, hoped.runs, hoped.replicas), hoped, hoped=True)
                self.tried = replace(lost, unmeasurable=self._asked)
            return []
        self.found, rival_s = looks[0], uncut_s if uncut_s is not None else in_one_stage(costs, room)
        draft = self.draft(NAME, self.found.runs, self.found.replicas)
        worth = self.forced or self.found.load_s <= _WORTH * rival_s
        self.tried = self._tried(draft, self.found, entrant=NAME if worth else "")
        return [draft] if worth else []

    @staticmethod
    def _tried(draft: Draft, found: Pipeline, *, hoped: bool = False, entrant: str = "") -> Tried:
        rate = draft.batch / found.load_s
        return Tried(kind="pipeline", text=describe(draft), promised_per_s=rate, hoped=hoped, factors=found.factors, entrant=entrant)

    def _costs(self, name: str) -> list[float | None] | None:
        """Return what each block takes on a target, in proportion to what it takes alone and in sum what the whole model takes."""
        last = len(self.evidence.structure.blocks) - 1
        alone = [self.evidence.segment(index, index, name) for index in range(last + 1)]
        if all(each is None for each in alone):
            return None
        whole = self.evidence.segment(0, last, name)
        seconds = self.wholes.get(name, whole.seconds if whole is not None else None)
        total = sum(each.seconds for each in alone if each is not None)
        share = seconds / total if seconds is not None and total > 0 else 1.0
        return [None if each is None else each.seconds * share for each in alone]

    def _crossing(self, block: int) -> int:
        first = self.evidence.structure.blocks[block].first
        return next((cut.bytes or 0 for cut in self.evidence.structure.cut_points if cut.position == first), 0)

    def _move(self, source: str, destination: str) -> Move:
        found = [self.evidence.handover_s(source, destination, size) for size in _SIZES]
        if found[0] is None or found[1] is None:
            return Move(fixed=CUT_S, per_byte=1 / BYTES_PER_S)
        per_byte = max(0.0, (found[1] - found[0]) / (_SIZES[1] - _SIZES[0]))
        return Move(fixed=CUT_S + max(0.0, found[0] - per_byte * _SIZES[0]), per_byte=per_byte)

    def draft(self, name: str, runs: Sequence[Run], replicas: Replicas) -> Draft:
        """Return a pipelined draft of runs of blocks, double-buffered: each stage and replica has two requests in flight."""
        by_name = {str(target): target for target in self.work.targets}
        pieces = tuple(
            Piece(target=by_name[each], config=self.configs[each], first=first, last=last, replicas=replicas.get(each, 1))
            for first, last, each in runs
        )
        return deep(Draft(name=name, pieces=pieces, batch=self.work.subject.base_batch, mode="pipelined"), DEPTH)

    def _measure(self, runs: Sequence[Run], replicas: Replicas) -> dict[Pair, float]:
        self._asked = True
        return self.together.factors(self.draft("the pipelined plan", runs, replicas), [[name] for _, _, name in runs])
