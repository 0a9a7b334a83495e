"""Replicated plans for throughput: the whole model in several places at once, each with the part of the requests that its rate allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from aivmm.planner.candidates import Candidate, Copy, Draft, Piece
from aivmm.planner.copies import Copies, Counts, Pair, Way, best_copies, place_copies, rates
from aivmm.planner.placement import block_bytes
from aivmm.tuner.narrow import cores_of, parts_of, threads_of
from aivmm.tuner.together import Together
from aivmm.tuner.tried import Tried
from aivmm.tuner.verdict import describe
from aivmm.tuner.work import Work

NAME = "replicated plan"
WORTH = 0.97  # of the best plan's time per sample so far: what promises less is not proven
_NOISE = 0.03  # relative, of one race beside another
_COPY_ADDS = 0.05  # relative: a copy that promises to add less is left out
_MOST_CALLERS = 1024  # as a plan may have
_HOPELESS = 50.0  # a target this many times slower than the best adds less than anybody can see
_MOST_MEASURED, _MOST_AT_ONE_BATCH = 6, 4  # plans: each takes seconds


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
    """Finds the replicated plan worth proving. `memory_bytes` is the room on each device, `replicas` how many copies a target may have.

    Batches are tried from the one on that promises most, and nothing is measured once `stop` says so. `found` is the best plan and `batch`
    its batch, `tried` what came of it all.
    """

    work: Work
    together: Together
    devices: Mapping[str, str]  # target -> the device that it runs on
    memory_bytes: Mapping[str, float] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)
    stop: Callable[[], bool] = lambda: False
    found: Copies | None = None
    batch: int = 1
    tried: Tried | None = None
    _measured: int = 0  # plans

    def drafts(self, known: Sequence[Known], *, best_s: float | None) -> list[Draft]:
        """Return the plan of copies that promises most, at the batch where it does, if it promises to beat `best_s` per sample."""
        batches = sorted({each.candidate.batch for each in known})
        places = {batch: self._places([each for each in known if each.candidate.batch == batch]) for batch in batches}
        ways = {batch: self._ways(places[batch]) for batch in batches}
        # No plan of several is above what copies would answer if they left each other alone.
        hoped = {batch: best_copies(ways[batch], self.memory_bytes, {}, cores=self._cores(places[batch]), least=2) for batch in batches}
        hopes = {batch: batch * math.fsum(rates(ways[batch], hoped[batch], {}).values()) for batch in batches}
        least = 0.0 if best_s is None else 1 / (WORTH * best_s)  # samples a second
        looks: dict[str, float] = {}  # what was measured, in words -> the samples a second that it promises
        for batch in sorted(batches, key=lambda each: -hopes[each]):
            left = _MOST_MEASURED - self._measured
            if hopes[batch] <= least or left < 1:
                break
            found = self._place(batch, ways[batch], places[batch], min(_MOST_AT_ONE_BATCH, left), looks)
            if found is not None and found.rate_per_s * batch > least:
                self.found, self.batch, least = found, batch, found.rate_per_s * batch
        if self.found is None:
            drafts = {batch: self._draft(NAME, places[batch], hoped[batch], {}) for batch in batches if hoped[batch]}
            self.tried = _lost(hopes, drafts, looks, asked=self._measured > 0)
            return []
        draft = self._draft(NAME, places[self.batch], self.found.counts, self.found.shares)
        self.tried = Tried(kind="copies", text=describe(draft), promised_per_s=least, factors=self.found.factors, entrant=NAME)
        return [draft]

    def _place(self, batch: int, ways: Sequence[Way], places: Mapping[str, Known], most: int, looks: dict[str, float]) -> Copies | None:
        """Return the best plan of several copies at a batch; remember in `looks` what was measured."""
        factors: dict[Pair, float] = {}
        asked: list[Counts] = []

        def measure(counts: Counts) -> Mapping[Pair, float]:
            self._measured += 1
            known = self.together.factors(self._draft("the replicated plan", places, counts, {}), [list(counts)])
            if known:
                factors.update({pair: max(1.0, factor) for pair, factor in known.items()})
                asked.append(counts)
            return known

        found = place_copies(
            ways, measure, capacity=self.memory_bytes, cores=self._cores(places), most=most, tolerance=_COPY_ADDS, stop=self.stop
        )
        for counts in asked:
            parts = rates(ways, counts, factors)
            whole = math.fsum(parts.values())
            shares = {name: each / whole for name, each in parts.items()}
            looks[describe(self._draft(NAME, places, counts, shares))] = batch * whole
        return found

    def _places(self, known: Sequence[Known]) -> dict[str, Known]:
        """Return what may be a copy: each target with its best settings, and on parts of its processor."""
        best: dict[str, Known] = {}
        parts: dict[str, Known] = {}
        for each in known:
            target = each.candidate.target
            name, cores = str(target), cores_of(each.candidate)
            if name not in best or self._better(each, best[name]):
                best[name] = each
            if cores and cores in parts_of(target):
                part = f"{name} on {cores} core{'' if cores == 1 else 's'}"
                if part not in parts or self._better(each, parts[part]):
                    parts[part] = each
        return best | {name: each for name, each in parts.items() if each is not best[str(each.candidate.target)]}

    @staticmethod
    def _better(one: Known, other: Known) -> bool:
        """Say whether one is faster by more than noise, or as fast with fewer requests in flight."""
        if one.candidate.callers < other.candidate.callers:
            return one.seconds <= other.seconds * (1 + _NOISE)
        return one.seconds * (1 + _NOISE * (one.candidate.callers > other.candidate.callers)) < other.seconds

    def _cores(self, places: Mapping[str, Known]) -> dict[str, float]:
        targets = [each.candidate.target for each in places.values() if cores_of(each.candidate)]
        return {self.devices[str(each)]: float(threads_of(each)) for each in targets}

    def _ways(self, places: Mapping[str, Known]) -> list[Way]:
        least = min(each.seconds for each in places.values())
        return [
            Way(
                name=name,
                device=self.devices[str(each.candidate.target)],
                seconds=each.seconds,
                memory_bytes=self._bytes(each),
                cores=float(cores_of(each.candidate)),
                most=self.replicas.get(str(each.candidate.target), 1),
            )
            for name, each in places.items()
            if each.seconds <= _HOPELESS * least
        ]

    def _bytes(self, known: Known) -> float:
        """Return what a copy takes of its device: as seen, and at least its weights, lowered where they are, and what blocks hand on."""
        batch, lowered = known.candidate.batch, known.candidate.config.lowered
        if self.memory_bytes.get(self.devices[str(known.candidate.target)], math.inf) == math.inf:
            return known.memory_bytes  # nothing hangs on it
        structure = self.work.subject.structure_at(batch)
        plain = math.fsum(block_bytes(structure))
        made = self.work.subject.size_bytes(lowered) if lowered is not None else None
        weights = sum(each.weight_bytes for each in structure.blocks)
        return max(known.memory_bytes, plain if made is None else plain - weights + made)

    def _draft(self, name: str, places: Mapping[str, Known], counts: Counts, shares: Mapping[str, float]) -> Draft:
        """Return a draft; the target that answers most comes first, and is who a reader takes for the plan's."""
        order = sorted(counts, key=lambda each: -shares.get(each, 0.0))
        copies = [
            Copy(
                target=places[each].candidate.target,
                config=places[each].candidate.config,
                replicas=counts[each],
                weight=float(places[each].candidate.callers),
                share=shares.get(each),
            )
            for each in order
        ]
        batch = next(iter(places.values())).candidate.batch
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
        callers = sum(counts[each] * places[each].candidate.callers for each in order)
        draft = Draft(name=name, pieces=(piece,), batch=batch)
        return replace(draft, callers=min(_MOST_CALLERS, callers))


def _lost(hopes: Mapping[int, float], hoped: Mapping[int, Draft], looks: Mapping[str, float], *, asked: bool) -> Tried | None:
    """Return what is said where no plan of copies promises enough: the best that was measured, else the best that could be hoped for.

    Measurements were `asked` for, or none was worth it.
    """
    if looks:
        best = max(looks, key=lambda each: looks[each])
        return Tried(kind="copies", text=best, promised_per_s=looks[best])
    if not hoped:
        return None
    batch = max(hoped, key=lambda each: hopes[each])
    return Tried(kind="copies", text=describe(hoped[batch]), promised_per_s=hopes[batch], hoped=True, unmeasurable=asked)
