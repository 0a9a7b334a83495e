"""Replicated plans for throughput: the whole model in several places at once, each with the part of the requests that its rate allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from aivmm.planner.candidates import Candidate, Copy, Draft, Piece
from aivmm.planner.copies import Copies, Counts, Pair, Way, place_copies
from aivmm.planner.placement import block_bytes
from aivmm.tuner.together import Together
from aivmm.tuner.work import Work

_WORTH = 0.97  # of the best plan's time per sample so far: what promises less is not proven
_NOISE = 0.03  # relative, of one race beside another
_COPY_ADDS = 0.05  # relative: a copy that promises to add less is left out
_MOST_CALLERS = 1024  # as a plan may have
_HOPELESS = 50.0  # a target this many times slower than the best adds less than anybody can see


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A candidate of the search, and seconds of one call of it, kept busy by its callers, where the reference takes what it took then."""

    candidate: Candidate
    seconds: float
    memory_bytes: float = 0.0  # that it was seen to hold on its device; 0 where that is not counted


def can_be_copied(candidate: Candidate) -> bool:
    """Say whether a candidate is a whole model in one place, which may be run in others beside it. AUTO may be anywhere."""
    return candidate.policy is None and candidate.replicas == 1 and candidate.target.name != "AUTO"


@dataclass(slots=True)
class Copier:
    """Finds the replicated plan worth proving. `memory_bytes` is the room on each device, `replicas` how many copies a target may have."""

    work: Work
    together: Together
    devices: Mapping[str, str]  # target -> the device that it runs on
    memory_bytes: Mapping[str, float] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)
    found: Copies | None = None

    def drafts(self, known: Sequence[Known], *, best_s: float | None) -> list[Draft]:
        """Return the plan of copies at the batch where they promise most, if it promises to beat `best_s` per sample."""
        by_batch: dict[int, dict[str, Known]] = {}
        for each in known:
            mine = by_batch.setdefault(each.candidate.batch, {})
            name = str(each.candidate.target)
            if name not in mine or self._better(each, mine[name]):
                mine[name] = each
        if not by_batch:
            return []
        batch = max(sorted(by_batch), key=lambda batch: self._hope(batch, by_batch[batch]))
        best = by_batch[batch]
        self.found = place_copies(
            self._ways(batch, best), lambda counts: self._measure(best, counts), capacity=self.memory_bytes, tolerance=_COPY_ADDS
        )
        if self.found is None or (best_s is not None and 1 / (self.found.rate_per_s * batch) > _WORTH * best_s):
            return []
        return [self._draft("replicated plan", best, self.found.counts, self.found.shares)]

    @staticmethod
    def _better(one: Known, other: Known) -> bool:
        """Say whether one is faster by more than noise, or as fast with fewer requests in flight."""
        if one.candidate.callers < other.candidate.callers:
            return one.seconds <= other.seconds * (1 + _NOISE)
        return one.seconds * (1 + _NOISE * (one.candidate.callers > other.candidate.callers)) < other.seconds

    def _hope(self, batch: int, best: Mapping[str, Known]) -> float:
        """Return the samples a second that copies would answer if they left each other alone."""
        return batch * math.fsum(self.replicas.get(name, 1) / each.seconds for name, each in best.items())

    def _ways(self, batch: int, best: Mapping[str, Known]) -> list[Way]:
        least = min(each.seconds for each in best.values())
        model_bytes = math.fsum(block_bytes(self.work.subject.structure_at(batch)))
        return [
            Way(
                name=name,
                device=self.devices[name],
                seconds=each.seconds,
                memory_bytes=max(each.memory_bytes, model_bytes),
                most=self.replicas.get(name, 1),
            )
            for name, each in best.items()
            if each.seconds <= _HOPELESS * least
        ]

    def _draft(self, name: str, best: Mapping[str, Known], counts: Counts, shares: Mapping[str, float]) -> Draft:
        """Return a draft; the target that answers most comes first, and is who a reader takes for the plan's."""
        order = sorted(counts, key=lambda each: -shares.get(each, 0.0))
        copies = [
            Copy(
                target=best[each].candidate.target,
                config=best[each].candidate.config,
                replicas=counts[each],
                weight=float(best[each].candidate.callers),
                share=shares.get(each),
            )
            for each in order
        ]
        batch = next(iter(best.values())).candidate.batch
        # Blocks of another batch may be numbered differently: the whole is the whole.
        first, last = copies[0], len(self.work.subject.structure_at(batch).blocks) - 1
        piece = Piece(
            target=first.target,
            config=first.config,
            first=0,
            last=last,
            replicas=first.replicas,
            weight=first.weight,
            share=first.share,
            copies=tuple(copies[1:]),
        )
        callers = sum(counts[each] * best[each].candidate.callers for each in order)
        draft = Draft(name=name, pieces=(piece,), batch=batch)
        return replace(draft, callers=min(_MOST_CALLERS, callers))

    def _measure(self, best: Mapping[str, Known], counts: Counts) -> dict[Pair, float]:
        draft = self._draft("the replicated plan", best, counts, {})
        return self.together.factors(draft, [list(counts)])
