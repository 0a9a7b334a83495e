"""Pipelined plans for throughput: placed with what stages cost each other, which is measured in place for the pairs that a plan uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from aivmm.errors import AivmmError
from aivmm.planner.candidates import Draft, Piece
from aivmm.planner.partition import BYTES_PER_S, CUT_S, ChainEvidence
from aivmm.planner.pipeline import Pair, Pipeline, Run, place_pipeline
from aivmm.planner.problem import Move
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.compare import cautions
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.records import Measured, ProbeKey, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.tuner.measure import Counts
from aivmm.tuner.work import Work

DEPTH = 2  # requests in flight for each stage: double-buffered
_SECONDS = 0.4  # for each stage beside each other one
_SIZES = (1 << 10, 1 << 20)  # from which the line of a hand-over's cost is drawn
_WORTH = 0.97  # of the best uncut plan's time per sample: what promises less is not proven


@dataclass(slots=True)
class Pipeliner:
    """Finds the pipelined plan worth proving. `evidence` says what blocks take, `configs` how each target is compiled."""

    work: Work
    evidence: ChainEvidence
    configs: Mapping[str, Config]
    counts: Counts
    measure_new: bool = True
    found: Pipeline | None = None
    _number: int = 0
    _seen: dict[Pair, float] = field(default_factory=dict)

    def drafts(self, *, uncut_s: float | None) -> list[Draft]:
        """Return the pipelined plan, if one promises to beat `uncut_s`, the time per request of the best plan known."""
        names = [name for name in self.configs if self._costs(name) is not None]
        if len(names) < 2 or len(self.evidence.structure.blocks) < 2:
            return []
        costs = {name: costs for name in names if (costs := self._costs(name)) is not None}
        sizes = [self._crossing(index) for index in range(1, len(self.evidence.structure.blocks))]
        moves = {(a, b): self._move(a, b) for a in names for b in names if a != b}
        self.found = place_pipeline(costs, sizes, moves, self._measure)
        if self._seen:
            said = ", ".join(f"{a} takes {factor:.2f} times as long beside {b}" for (a, b), factor in self._seen.items())
            self.work.note(f"stages at once, in their place: {said}")
        if self.found is None or (uncut_s is not None and self.found.load_s > _WORTH * uncut_s):
            return []
        return [self._draft("pipelined plan", self.found.runs, pipelined=True)]

    def _costs(self, name: str) -> list[float | None] | None:
        """Return what each block takes on a target, in proportion to what it takes alone and in sum what the whole model takes."""
        last = len(self.evidence.structure.blocks) - 1
        alone = [self.evidence.segment(index, index, name) for index in range(last + 1)]
        if all(each is None for each in alone):
            return None
        whole = self.evidence.segment(0, last, name)
        total = sum(each.seconds for each in alone if each is not None)
        share = whole.seconds / total if whole is not None and total > 0 else 1.0
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

    def _draft(self, name: str, runs: Sequence[Run], *, pipelined: bool) -> Draft:
        by_name = {str(target): target for target in self.work.targets}
        pieces = tuple(Piece(target=by_name[each], config=self.configs[each], first=first, last=last) for first, last, each in runs)
        draft = Draft(name=name, pieces=pieces, batch=self.work.subject.base_batch)
        return replace(draft, mode="pipelined", callers=DEPTH * len(pieces)) if pipelined else draft

    # --- how much stages slow each other

    def _measure(self, runs: Sequence[Run]) -> dict[Pair, float]:
        """Return the factors of a plan's stages, from the database or by measuring them in place; {} where neither is possible."""
        draft = self._draft("stages at once", runs, pipelined=False)
        structures = [self.work.emitter(draft.batch).segment(each.first, each.last).structure for each in draft.pieces]
        pairs = [(a, b) for a in range(len(runs)) for b in range(len(runs)) if a != b]
        keys = {pair: self._keys(draft, structures, *pair) for pair in pairs}
        known = {} if self.work.options.fresh else self.work.database.find_many([key for each in keys.values() for key in each])
        samples = {key: each.samples for key, each in known.items() if isinstance(each, Measured)}
        if all(key in samples for each in keys.values() for key in each):
            self.counts.reused += len(samples)
            self.work.database.link(self.work.run_id, list(samples))
        elif self.measure_new:
            samples = self._probe(draft, keys)
        else:
            return {}
        factors: dict[Pair, float] = {}
        for (a, b), (alone, together) in keys.items():
            if alone not in samples or together not in samples:
                return {}
            factors[runs[a][2], runs[b][2]] = samples[together].median_s / samples[alone].median_s
        self._seen |= factors
        return factors

    def _probe(self, draft: Draft, keys: Mapping[tuple[int, int], tuple[ProbeKey, ProbeKey]]) -> dict[ProbeKey, Samples]:
        bundle = self.work.folder / f"at-once-{self._number}.aivmm"
        self._number += 1
        self.work.emitter(draft.batch).write(draft, bundle, objective=self.work.options.objective)
        for pid in self.work.lab.pids():
            wait_until_quiet(pid)
        worker = Worker("stages at once")
        try:
            with measuring():
                answer = worker.call(
                    "contention",
                    limit_s=compile_limit_s(),
                    run_limit_s=run_limit_s(),
                    bundle=str(bundle),
                    inputs=str(self.work.subject.at(draft.batch).samples[0]),
                    seconds=_SECONDS,
                )
        except (AivmmError, WorkerDied) as error:
            why = error.reason if isinstance(error, WorkerDied) else error.message
            self.work.note(f"how much stages slow each other could not be measured: {why}")
            return {}
        finally:
            worker.close()
        samples: dict[ProbeKey, Samples] = {}
        for each in answer["pairs"]:
            alone, together = keys[each["slowed"], each["beside"]]
            samples[alone] = Samples(timed_s=tuple(each["alone"]))
            samples[together] = Samples(timed_s=tuple(each["together"]))
        outcomes = [Measured(key=key, samples=each, cautions=cautions(each)) for key, each in samples.items()]
        self.work.database.add_many(outcomes, run_id=self.work.run_id)
        self.counts.measured += len(outcomes)
        return samples

    def _keys(self, draft: Draft, structures: Sequence[str], slowed: int, beside: int) -> tuple[ProbeKey, ProbeKey]:
        """Return what the two measurements of a pair are known by: both carry the neighbour, since they were taken in turn."""
        piece, other = draft.pieces[slowed], draft.pieces[beside]
        neighbour = f"{structures[beside]}@{environment_of(other.target).fingerprint}.{other.config.digest()}"

        def key(how: str) -> ProbeKey:
            return ProbeKey(
                kind="segment",
                subject=f"{structures[slowed]} {how} {neighbour}",
                target=str(piece.target),
                environment=environment_of(piece.target).fingerprint,
                config=piece.config,
                batch=draft.batch,
            )

        return key("in turn with"), key("beside")
