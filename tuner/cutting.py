"""Cut plans: placed exactly, then measured segment by segment in their place, and placed again, until the plan rests on measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aivmm.planner.candidates import Draft
from aivmm.planner.partition import crossing_s, cut_drafts
from aivmm.probes.compare import cautions
from aivmm.probes.records import Measured
from aivmm.probes.transfers import TransferFit
from aivmm.runtime.config import Config
from aivmm.tuner.anatomy import Anatomist, medians
from aivmm.tuner.inplace import InPlace, Span, probe_in_place
from aivmm.tuner.measure import Counts
from aivmm.tuner.work import Work

_MOST_LOOKS = 4  # so often the measured segments may change the plan


class Cutter:
    """Finds the cut plans worth proving. Only segments that its best plans use are ever measured."""

    def __init__(
        self, work: Work, anatomist: Anatomist, handovers: Mapping[tuple[str, str], TransferFit], counts: Counts, *, measure_new: bool
    ) -> None:
        self._work, self._anatomist, self._handovers, self._counts = work, anatomist, handovers, counts
        self._measure_new = measure_new
        self._segment_s: dict[Span, float] = {}  # in its place, less what the boundary before it is priced at
        self._seen: dict[str, list[InPlace]] = {}  # by the draft's chain
        self._number = 0

    def drafts(self, *, configs: Mapping[str, Config], wholes: Mapping[str, float]) -> list[tuple[Draft, float]]:
        """Return the cut plans worth proving with their predicted seconds; `configs` and `wholes` are by target, as for `cut_drafts`.

        Raises:
            UsageError: cuts were asked for, and there is no such plan.
        """
        found = self._placed(configs, wholes)
        tried = [each for each in found if len(each[0].pieces) > 1]
        for _ in range(_MOST_LOOKS):
            fresh = [draft for draft, _ in found if len(draft.pieces) > 1 and _chain(draft) not in self._seen]
            if not fresh or self._work.asked():
                break
            for draft in fresh:
                self._look_at(draft)
            found = self._placed(configs, wholes)
            tried += [(draft, predicted) for draft, predicted in found if len(draft.pieces) > 1]
        found = self._measured(found, tried)
        for draft, _ in found:
            for each in self._seen.get(_chain(draft), []):
                self._work.note(f"{draft.name}, {each}")
        return found

    def _measured(self, found: list[tuple[Draft, float]], tried: Sequence[tuple[Draft, float]]) -> list[tuple[Draft, float]]:
        """Return `found`, with what was never measured in its place replaced by the best of its name that was.

        Estimates are optimistic, so that the placement runs from what is known to be slow to what is not known yet, as long as it may look.
        """
        kept = []
        for draft, predicted in found:
            rivals = [each for each, _ in tried if each.name == draft.name and self._seen.get(_chain(each))]
            if len(draft.pieces) > 1 and not self._seen.get(_chain(draft)) and rivals:
                draft = min(rivals, key=self._total_s)
                predicted = self._total_s(draft)
            kept.append((draft, predicted))
        return kept

    def _total_s(self, draft: Draft) -> float:
        return sum(each.placed.median_s for each in self._seen[_chain(draft)])

    def _placed(self, configs: Mapping[str, Config], wholes: Mapping[str, float]) -> list[tuple[Draft, float]]:
        work = self._work
        return cut_drafts(
            work.subject.structure,
            work.targets,
            medians(self._anatomist.found, self._anatomist.wrong),
            configs=configs,
            wholes=wholes,
            min_segments=work.options.min_segments,
            uncut_s=min(wholes.values(), default=None),
            batch=work.subject.base_batch,
            handover_s=self._handover_s,
            segment_s=self._segment_s,
        )

    def _handover_s(self, source: str, destination: str, size_bytes: int) -> float | None:
        fit = self._handovers.get((source, destination))
        return None if fit is None else fit.seconds(size_bytes)

    def _look_at(self, draft: Draft) -> None:
        """Learn what the segments of a draft take in their place, from the database or by measuring."""
        work = self._work
        structures = [work.emitter(draft.batch).segment(each.first, each.last).structure for each in draft.pieces]
        found = self._recalled(draft, structures)
        if not found and self._measure_new:
            bundle = work.folder / f"in-place-{self._number}.aivmm"
            self._number += 1
            work.emitter(draft.batch).write(draft, bundle, objective=work.options.objective)
            sample = work.subject.at(draft.batch).samples[0]
            answer = probe_in_place(draft, bundle, sample=sample, others=work.lab.pids())
            if isinstance(answer, str):
                work.note(f"the segments of {draft.name} could not be timed in their place: {answer}")
            else:
                found = answer
                self._store(draft, structures, found)
        self._seen[_chain(draft)] = found
        for before, each in zip([None, *found], found, strict=False):
            price = self._price(before, each) if before else 0.0
            self._segment_s[each.span] = max(0.0, each.placed.median_s - price)

    def _price(self, before: InPlace, each: InPlace) -> float:
        source, destination = str(before.piece.target), str(each.piece.target)
        return crossing_s(self._work.subject.structure, each.piece.first, source, destination, self._handover_s)

    def _store(self, draft: Draft, structures: Sequence[str], found: Sequence[InPlace]) -> None:
        outcomes = []
        for index, each in enumerate(found):
            for key, samples in zip(InPlace.keys(index, draft, structures), (each.alone, each.placed), strict=True):
                outcomes.append(Measured(key=key, samples=samples, cautions=cautions(samples)))
        self._work.database.add_many(outcomes, run_id=self._work.run_id)
        self._counts.measured += len(outcomes)

    def _recalled(self, draft: Draft, structures: Sequence[str]) -> list[InPlace]:
        """Return what the database knows of all segments of a draft in this very chain; nothing when one is missing."""
        if self._work.options.fresh:
            return []
        keys = [InPlace.keys(index, draft, structures) for index in range(len(draft.pieces))]
        known = self._work.database.find_many([key for pair in keys for key in pair])
        samples = {key: each.samples for key, each in known.items() if isinstance(each, Measured)}
        if any(key not in samples for pair in keys for key in pair):
            return []
        self._work.database.link(self._work.run_id, list(samples))
        self._counts.reused += len(samples)
        return [
            InPlace(piece=piece, alone=samples[alone], placed=samples[placed])
            for piece, (alone, placed) in zip(draft.pieces, keys, strict=True)
        ]


def _chain(draft: Draft) -> str:
    return " ".join(f"{each.first}-{each.last}@{each.target}:{each.config.digest()}" for each in draft.pieces)
