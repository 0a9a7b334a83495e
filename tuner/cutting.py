"""Cut plans: placed exactly, then measured segment by segment in their place, and placed again, until the plan rests on measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from aivmm.planner.candidates import Draft, Piece
from aivmm.planner.evidence import Estimate, total
from aivmm.planner.lazy import Look, Span
from aivmm.planner.partition import ChainEvidence, Cuts, beliefs_of, place_cuts
from aivmm.probes.compare import cautions
from aivmm.probes.records import Measured, ProbeKey
from aivmm.probes.transfers import TransferFit
from aivmm.runtime.config import Config
from aivmm.tuner.anatomy import Anatomist, estimates
from aivmm.tuner.guessing import modelled_blocks
from aivmm.tuner.inplace import InPlace, probe_in_place
from aivmm.tuner.measure import Measurer
from aivmm.tuner.narrow import resting
from aivmm.tuner.policies import PolicySearch
from aivmm.tuner.room import room_of
from aivmm.tuner.work import Work

_MOST_LOOKS, _FORCED_LOOKS = 4, 8  # so many plans are measured at most
_LOOKS_S, _FORCED_S = 6.0, 15.0  # and none is begun after so many seconds: what is measured here comes on top of the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPlan:
    """A cut plan worth proving, how it was found, and what its segments are expected to take."""

    draft: Draft
    look: Look
    parts: tuple[Estimate, ...]
    boundaries_s: float  # what the boundaries take beyond the parts: nothing where these were timed in this very chain
    believed_s: float | None = None  # what was believed of it before this very chain was timed; None where a segment of it was not known
    assembled: bool = False  # every segment was timed among other neighbours first, and `look` planned it from these

    @property
    def expected(self) -> Estimate:
        """One call, boundaries included. What was timed beside one reference errs together: their deviations add up as they are."""
        whole = total(self.parts)
        sigma = math.fsum(each.seconds * each.sigma for each in self.parts) / whole.seconds
        return replace(whole, seconds=whole.seconds + self.boundaries_s, sigma=sigma)


class Cutter:
    """Finds the cut plans worth proving. Only segments that could be in the best plan are ever measured.

    All seconds are those of a machine on which the reference takes `reference_s`, as it did in the search: times that were taken minutes
    apart are compared through the reference that was measured beside them.
    """

    def __init__(
        self,
        work: Work,
        anatomist: Anatomist,
        handovers: Mapping[tuple[str, str], TransferFit],
        measurer: Measurer,
        *,
        reference_s: float | None,
        measure_new: bool,
    ) -> None:
        self._work, self._anatomist, self._handovers, self._measurer = work, anatomist, handovers, measurer
        self._reference_s, self._measure_new = reference_s, measure_new
        self._seen: dict[str, list[list[InPlace]]] = {}  # by the draft's chain: what each measurement of it says of its segments
        self._stored: dict[str, list[tuple[list[InPlace], list[str]]]] = {}  # by chain: looks of the database that were not asked for yet
        self._believed: dict[str, float | None] = {}  # by chain: the sum of segments and boundaries before it was first timed
        self._after: dict[Span, str] = {}  # behind which target a segment was last measured
        self._number = 0
        self._configs: Mapping[str, Config] = {}
        self._resting: dict[str, Config] = {}  # the same for a target that shares its processor with other segments
        self.cuts = Cuts()
        self.evidence: ChainEvidence | None = None

    def plans(self, *, configs: Mapping[str, Config], wholes: Mapping[str, Estimate]) -> list[CutPlan]:
        """Return the cut plans worth proving; `configs` are the best known of each target, `wholes` the whole model there with them.

        Raises:
            UsageError: cuts were asked for, and there is no such plan.
        """
        work, structure = self._work, self._work.subject.structure
        if self._measure_new and len(work.targets) > 1:
            work.progress.phase("looking for cut plans worth proving")
        self._configs = configs
        self._resting = {
            str(each): resting(configs.get(str(each), Config(precision="fp32")), work.lab.knobs(each))
            for each in work.targets
            if each.device.kind == "cpu"
        }
        names = [str(target) for target in work.targets]
        # What was measured, wrong or refused is known; only what the budget left out is modelled.
        alone = self._modelled(names, wholes) | estimates(self._anatomist.found, self._anatomist.wrong)
        beliefs = beliefs_of(structure, names, alone, wholes)
        room = room_of(work)
        self.evidence = ChainEvidence(
            structure=structure, beliefs=beliefs, handover_s=self._handover_s, memory_bytes={name: room[name] for name in names}
        )
        forced = work.min_segments > 1
        began = time.perf_counter()
        if not forced and work.options.drive == "latency" and work.taken_whole and not work.asked():
            ends = began + _LOOKS_S / 2
            measure_new, reference_s = self._measure_new, self._reference_s
            PolicySearch(work, self.evidence, configs, self._measure, lambda: self._number, reference_s, ends, anew=measure_new).run()
        ends = began + (_FORCED_S if forced else _LOOKS_S)
        self.cuts = place_cuts(
            self.evidence,
            self._measure,
            targets=work.targets,
            min_segments=work.min_segments,
            most=_FORCED_LOOKS if forced else _MOST_LOOKS,
            stop=lambda: work.asked() or time.perf_counter() > ends,
            unseen={block.index for block in structure.blocks if any((block.index, name) not in self._anatomist.found for name in names)},
        )
        found = [self._plan(name, look) for name, look in self.cuts.worth_proving]
        for each in found:
            for segment in _together(self._seen.get(_chain(each.draft), [])):
                work.note(f"{each.draft.name}, {segment}")
        return found

    def _modelled(self, targets: Sequence[str], wholes: Mapping[str, Estimate]) -> dict[tuple[int, str], Estimate]:
        structure, anatomist = self._work.subject.structure, self._anatomist
        if not anatomist.ceilings or all((block.index, name) in anatomist.found for block in structure.blocks for name in targets):
            return {}
        return modelled_blocks(
            structure,
            self._work.emitter(self._work.subject.base_batch).node_names(),
            targets,
            blocks=anatomist.found,
            operators=anatomist.operators_found,
            ceilings=anatomist.ceilings,
            wholes=wholes,
        )

    @property
    def engine_s(self) -> float:
        """What a call of the engine takes beyond the segments, on this model's inputs and outputs; 0 where no plan was measured."""
        known = [found[0].engine_s for looks in self._seen.values() for found in looks]
        return median(known) if known else 0.0

    def _plan(self, name: str, look: Look) -> CutPlan:
        """Say what is expected of a cut plan, as it was timed; one that is put together from parts of others that were is timed now."""
        assert self.evidence is not None
        draft = self._draft(name, look.plan.segments)
        looks = self._seen.get(_chain(draft), [])
        assembled = not looks and all(span[:2] in self.evidence.beliefs[span[2]].measured for span in look.plan.segments)
        if not looks and len(draft.pieces) > 1 and not self._work.asked():
            self._look_at(draft)
            looks = self._seen[_chain(draft)]
        if looks:
            placed = _together(looks)
            parts = [Estimate(seconds=self._seconds(each), sigma=each.sigma, source="measured", because="in its place") for each in placed]
            believed_s = self._believed.get(_chain(draft))
            return CutPlan(draft=draft, look=look, parts=tuple(parts), boundaries_s=0.0, believed_s=believed_s, assembled=assembled)
        known = tuple(part for span in look.plan.segments if (part := self.evidence.segment(*span)) is not None)
        boundaries_s = max(0.0, look.plan.cost_s - math.fsum(each.seconds for each in known))
        return CutPlan(draft=draft, look=look, parts=known, boundaries_s=boundaries_s)

    def _draft(self, name: str, spans: Sequence[Span]) -> Draft:
        by_name = {str(target): target for target in self._work.targets}
        shared = sum(by_name[target].device.kind == "cpu" for _, _, target in spans) > 1
        pieces = tuple(
            Piece(target=by_name[target], config=self._config(target, shared=shared), first=first, last=last)
            for first, last, target in spans
        )
        return Draft(name=name, pieces=pieces, batch=self._work.subject.base_batch)

    def _config(self, target: str, *, shared: bool) -> Config:
        """Return what a segment is compiled with; `shared` says whether others run on the processor before or after it."""
        config = self._configs.get(target, Config(precision="fp32"))
        return self._resting.get(target, config) if shared else config

    def _handover_s(self, source: str, destination: str, size_bytes: int) -> float | None:
        fit = self._handovers.get((source, destination))
        return None if fit is None else fit.seconds(size_bytes)

    def _measure(self, spans: Sequence[Span]) -> dict[Span, Estimate]:
        """Learn what the segments of a plan take in their place, less what the boundary before each is priced at."""
        draft = self._draft("the cut plan that was tried", spans)
        found = self._look_at(draft)
        learnt = {}
        for before, each in zip([None, *found], found, strict=False):
            seconds = self._seconds(each)
            if before is not None:
                seconds -= self._paid_s(each.span, str(before.piece.target), seconds)
            learnt[each.span] = Estimate(seconds=seconds, sigma=each.sigma, source="measured", because="in its place")
        return learnt

    def _paid_s(self, span: Span, source: str, seconds: float) -> float:
        """Return what of the seconds of a segment in its place is in the price of the boundary before it, and so must not come twice.

        A segment keeps a tenth of its time, so a boundary is priced at no more than the rest; what was measured behind it at the old price
        had too much taken off.
        """
        assert self.evidence is not None
        first, _, destination = span
        price = self.evidence.crossing(first, source, destination)
        paid_s = 0.0 if price is None else min(price.seconds, 0.9 * seconds)
        if price is not None and paid_s < price.seconds:
            self.evidence.cap(first, source, destination, paid_s)
            for known in [each for each, before in self._after.items() if (each[0], before, each[2]) == (first, source, destination)]:
                self.evidence.beliefs[destination].amend(known[0], known[1], price.seconds - paid_s)
        self._after[span] = source
        return paid_s

    def _believed_s(self, draft: Draft) -> float | None:
        """Return the sum of what is believed of a draft's segments and boundaries now; None where something of it is not known."""
        assert self.evidence is not None
        pieces = draft.pieces
        parts = [self.evidence.segment(each.first, each.last, str(each.target)) for each in pieces]
        parts += [self.evidence.crossing(after.first, str(before.target), str(after.target)) for before, after in pairwise(pieces)]
        known = [each.seconds for each in parts if each is not None]
        return math.fsum(known) if len(known) == len(parts) else None

    def _seconds(self, each: InPlace) -> float:
        if each.ratio is None or self._reference_s is None:
            return each.placed.median_s
        return each.ratio * self._reference_s

    def _look_at(self, draft: Draft) -> list[InPlace]:
        """Return what the segments of a draft take in their place, from the database or by measuring; nothing where neither is possible.

        Who asks again in one run is unsure: what was recalled or measured before says no more than it did. So each look of the database is
        recalled once, in the order in which they were measured (a repeated run learns what the first one did, when it did), and then it is
        measured once more.
        """
        work, chain = self._work, _chain(draft)
        if chain not in self._seen:
            self._believed[chain] = self._believed_s(draft)
        looks = self._seen.setdefault(chain, [])
        structures = [work.emitter(draft.batch).segment(each.first, each.last).structure for each in draft.pieces]
        if chain not in self._stored:
            self._stored[chain] = self._recalled(draft, structures)
        if self._stored[chain]:
            known, rows = self._stored[chain].pop(0)
            work.database.link(work.run_id, rows)
            self._measurer.counts.reused += len(rows)
            looks.append(known)
            return known
        found: list[InPlace] = []
        if self._measure_new:
            bundle = work.folder / f"in-place-{self._number}.aivmm"
            self._number += 1
            work.progress.detail(f"cut plans: measuring segments in their place ({self._number})")
            work.emitter(draft.batch).write(draft, bundle, objective=work.options.objective)
            prepared = work.subject.at(draft.batch)
            answer = probe_in_place(
                draft,
                bundle,
                sample=prepared.samples[0],
                others=work.lab.pids(),
                reference=self._measurer.load_reference(),
                # Not every block of it need have been checked: what was modelled never ran.
                expected=prepared.references[0] if work.subject.deterministic and work.cosine_limit is not None else None,
                cosine_limit=work.cosine_limit,
            )
            if isinstance(answer, str):
                work.note(f"the segments of {draft.name} could not be timed in their place: {answer}")
            else:
                found = [replace(each, look=len(looks) + 1) for each in answer]
                self._store(draft, structures, found)
                looks.append(found)
        return found

    def _keys(self, index: int, draft: Draft, structures: Sequence[str]) -> tuple[ProbeKey, ProbeKey]:
        return InPlace.keys(index, draft, structures, self._measurer.reference.key)

    def _store(self, draft: Draft, structures: Sequence[str], found: Sequence[InPlace]) -> None:
        outcomes = []
        for index, each in enumerate(found):
            alone, placed = self._keys(index, draft, structures)
            outcomes.append(Measured(key=alone, samples=each.alone, cautions=cautions(each.alone)))
            outcomes.append(Measured(key=placed, samples=each.placed, metrics=each.metrics(), cautions=cautions(each.placed)))
        self._work.database.add_many(outcomes, run_id=self._work.run_id)
        self._measurer.counts.measured += len(outcomes)

    def _recalled(self, draft: Draft, structures: Sequence[str]) -> list[tuple[list[InPlace], list[str]]]:
        """Return what the database knows of all segments of a draft in this very chain, each look that belongs to the newest with the ids
        of its rows, the first look first; nothing when a segment is missing."""
        if self._work.options.fresh:
            return []
        keys = [self._keys(index, draft, structures) for index in range(len(draft.pieces))]
        rows: dict[ProbeKey, list[tuple[str, Measured]]] = {key: [] for pair in keys for key in pair}
        for entry in self._work.database.entries(kind="segment", subject=sorted({key.subject for key in rows}), all=True):
            if isinstance(entry.outcome, Measured) and entry.outcome.key in rows:
                rows[entry.outcome.key].append((entry.id, entry.outcome))
        # Equal segments of one chain have one key, and a row each in the order of the chain.
        alike = {pair: keys.count(pair) for pair in keys}
        newest = rows[keys[0][1]][-1:]
        count = max((int(each.metrics.get("look", 1)) for _, each in newest), default=0)
        count = min(count, *(len(rows[key]) // alike[pair] for pair in keys for key in pair))
        looks = []
        for number in range(count):
            found: list[InPlace] = []
            used: list[str] = []
            for index, (pair, piece) in enumerate(zip(keys, draft.pieces, strict=True)):
                place = (number - count) * alike[pair] + keys[:index].count(pair)
                (alone_id, alone), (placed_id, placed) = (rows[key][place] for key in pair)
                if "reference_ratio" in placed.metrics or "engine_s" not in placed.metrics:
                    return []  # an earlier version measured it in another way: it is measured anew
                used += [alone_id, placed_id]
                found.append(InPlace.recalled(piece, placed.samples, alone.samples, placed.metrics))
            looks.append((found, used))
        return looks


def _together(looks: Sequence[Sequence[InPlace]]) -> list[InPlace]:
    return [InPlace.of_looks(each) for each in zip(*looks, strict=True)]


def _chain(draft: Draft) -> str:
    return " ".join(f"{each.first}-{each.last}@{each.target}:{each.config.digest()}" for each in draft.pieces)
