"""What parts of a plan cost each other when they run at once: from the database, or measured in place with the plan's own bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aivmm.errors import AivmmError
from aivmm.planner.candidates import Copy, Draft
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.compare import cautions
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.records import Measured, ProbeKey, Samples
from aivmm.runtime.environment import environment_of
from aivmm.tuner.measure import Counts
from aivmm.tuner.work import Work

Pair = tuple[str, str]
# How factors are made of samples, in their keys: others are not theirs. It was by medians, then by means of twins alone.
FACTORS = "by means of windows"
_SECONDS = 0.8  # for each part beside each other one


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stage of a draft on one of its targets: what can be slowed, and slow others. `label` is what planners know it by."""

    label: str
    stage: int
    executable: int  # the first of its replicas, among the stage's executables
    copy: Copy
    lanes: int  # requests inside it at once


@dataclass(slots=True)
class Together:
    """Learns factors: how many times as long one part takes beside another. `seen` has all that were learnt, for people."""

    work: Work
    counts: Counts
    measure_new: bool = True
    seen: dict[Pair, float] = field(default_factory=dict)
    _number: int = 0

    def factors(self, draft: Draft, labels: Sequence[Sequence[str]]) -> dict[Pair, float]:
        """Return the factors of a draft's parts beside each other; {} where they are not known and cannot be measured.

        `labels` has for each piece the names of all places that run it. A part of several replicas is also beside itself.
        """
        parts = parts_of(draft, labels)
        pairs = [(a, b) for a in parts for b in parts if a is not b or a.copy.replicas > 1]
        structures = [self._structure(draft, piece.first, piece.last) for piece in draft.pieces]
        keys = {(a.label, b.label): self._keys(draft, structures, a, b) for a, b in pairs}
        known = {} if self.work.options.fresh else self.work.database.find_many([key for each in keys.values() for key in each])
        samples = {key: each.samples for key, each in known.items() if isinstance(each, Measured)}
        if all(key in samples for each in keys.values() for key in each):
            self.counts.reused += len(samples)
            self.work.database.link(self.work.run_id, list(samples))
        elif self.measure_new:
            samples = self._probe(draft, parts, [(parts.index(a), parts.index(b)) for a, b in pairs], list(keys.values()))
        else:
            return {}
        found: dict[Pair, float] = {}
        for pair, (alone, together) in keys.items():
            if alone not in samples or together not in samples:
                return {}
            found[pair] = samples[together].median_s / samples[alone].median_s
        self.seen |= found
        return found

    def say(self) -> None:
        """Note what was learnt."""
        if self.seen:
            said = (
                f"{a} takes {factor:.2f} times as long beside {'another copy of it' if a == b else b}"
                for (a, b), factor in self.seen.items()
            )
            self.work.note(f"at once, in their place: {', '.join(said)}")

    def _structure(self, draft: Draft, first: int, last: int) -> str:
        if len(draft.pieces) == 1:  # blocks of another batch may be numbered differently; the whole is the whole
            last = len(self.work.subject.structure_at(draft.batch).blocks) - 1
        return self.work.emitter(draft.batch).segment(first, last).structure

    def _probe(
        self, draft: Draft, parts: Sequence[Part], pairs: Sequence[tuple[int, int]], keys: Sequence[tuple[ProbeKey, ProbeKey]]
    ) -> dict[ProbeKey, Samples]:
        bundle = self.work.folder / f"at-once-{self._number}-{draft.mode}-{draft.batch}.aivmm"
        self._number += 1
        self.work.progress.detail(f"loading and timing the parts of {draft.name} alone and beside each other ({self._number})")
        self.work.emitter(draft.batch).write(draft, bundle, objective=self.work.options.objective)
        for pid in self.work.lab.pids():
            wait_until_quiet(pid)
        worker = Worker("parts at once")
        try:
            with measuring():
                answer = worker.call(
                    "contention",
                    limit_s=compile_limit_s(),
                    run_limit_s=run_limit_s() + _SECONDS * len(pairs),
                    bundle=str(bundle),
                    inputs=str(self.work.subject.at(draft.batch).samples[0]),
                    seconds=_SECONDS,
                    # A part beside itself is one of its replicas beside the next.
                    actors=[[each.stage, each.executable + more] for each in parts for more in range(min(2, each.copy.replicas))],
                    pairs=_as_actors(parts, pairs),
                )
        except (AivmmError, WorkerDied) as error:
            why = error.reason if isinstance(error, WorkerDied) else error.message
            self.work.note(f"how much the parts of {draft.name} slow each other could not be measured: {why}")
            return {}
        finally:
            worker.close()
        samples: dict[ProbeKey, Samples] = {}
        for (alone, together), each in zip(keys, answer["pairs"], strict=True):
            samples[alone] = Samples(timed_s=tuple(each["alone"]))
            samples[together] = Samples(timed_s=tuple(each["together"]))
        outcomes = [Measured(key=key, samples=each, cautions=cautions(each)) for key, each in samples.items()]
        self.work.database.add_many(outcomes, run_id=self.work.run_id)
        self.counts.measured += len(outcomes)
        return samples

    def _keys(self, draft: Draft, structures: Sequence[str], slowed: Part, beside: Part) -> tuple[ProbeKey, ProbeKey]:
        """Return what the two measurements of a pair are known by: both carry the neighbour, since they were taken in turn."""
        other = beside.copy
        neighbour = f"{structures[beside.stage]}@{environment_of(other.target).fingerprint}.{other.config.digest()}x{beside.lanes}"

        def key(how: str) -> ProbeKey:
            return ProbeKey(
                kind="segment",
                subject=f"{structures[slowed.stage]} {how} {neighbour}",
                target=str(slowed.copy.target),
                environment=environment_of(slowed.copy.target).fingerprint,
                config=slowed.copy.config,
                batch=draft.batch,
                callers=slowed.lanes,
            )

        return key(f"{FACTORS} in turn with"), key(f"{FACTORS} beside")


def parts_of(draft: Draft, labels: Sequence[Sequence[str]]) -> list[Part]:
    """Return the parts of a draft, in the order of the engine's stages and their executables."""
    found = []
    for stage, (piece, names) in enumerate(zip(draft.pieces, labels, strict=True)):
        first = 0
        for label, copy in zip(names, piece.everywhere(), strict=True):
            lanes = 1 if draft.mode == "pipelined" else max(1, round(copy.weight))
            found.append(Part(label=label, stage=stage, executable=first, copy=copy, lanes=lanes))
            first += copy.replicas
    return found


def _as_actors(parts: Sequence[Part], pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return pairs of parts as pairs of actors, of which a part of several replicas has two."""
    first = [sum(min(2, each.copy.replicas) for each in parts[:index]) for index in range(len(parts))]
    return [[first[a], first[b] + (a == b)] for a, b in pairs]
