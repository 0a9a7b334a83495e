"""Plans whose parts run at once, for throughput: pipelines and copies, each with what it promises. Only their proof accepts them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from aivmm.planner.candidates import Candidate, Draft
from aivmm.planner.evidence import Estimate
from aivmm.planner.partition import ChainEvidence
from aivmm.planner.placement import device_of
from aivmm.runtime.config import Config
from aivmm.tuner.copying import WORTH, Copier, Known
from aivmm.tuner.depths import DepthSearch
from aivmm.tuner.measure import Measurer
from aivmm.tuner.narrow import narrowed, parts_of, with_threads
from aivmm.tuner.options import allowed_s
from aivmm.tuner.pipelining import Pipeliner
from aivmm.tuner.room import memory_of, most_replicas
from aivmm.tuner.together import Together
from aivmm.tuner.tried import Tried
from aivmm.tuner.verdict import describe
from aivmm.tuner.whole import Whole
from aivmm.tuner.work import Work

_PIPELINE_SIGMA, _COPIES_SIGMA = 0.2, 0.1  # relative: blocks in proportion to the whole, or the whole itself, and factors of pairs
_BEHIND = 3.0  # a processor's target this many times slower than the best is not measured on parts of it
_NO_STAGE = 10.0  # nor for a stage: a pipeline, or copies, with so slow a processor gain less than a tenth

Learn = Callable[[Sequence[Candidate]], Sequence[Known]]  # measures what is not known yet


@dataclass(frozen=True, slots=True, kw_only=True)
class AtOnce:
    """A draft whose parts run at once. `expected` is the time from one answered request to the next."""

    draft: Draft
    expected: Estimate


@dataclass(slots=True, kw_only=True)
class Finder:
    """Finds the pipelined and the replicated plan that promise to beat all that is known. `tried` says what came of both.

    `configs` are what stages of a cut model are compiled with; `known` what the search knows of whole models, kept busy, where a call of
    the reference takes `reference_s`; `best_s` is the time per sample of the best plan known, which need not be one that can be a part, and
    None where there is none; `learn` measures more of them. Memory is that of the devices, and of the user's own limits: what has
    no room there is not considered. Parts on one processor get a part of its cores each.
    """

    work: Work
    measurer: Measurer
    evidence: ChainEvidence | None
    configs: Mapping[str, Config]
    known: Sequence[Known]
    learn: Learn
    reference_s: float | None
    best_s: float | None
    measure_new: bool
    tried: list[Tried] = field(default_factory=list)
    _ends: float = math.inf

    def find(self) -> list[AtOnce]:
        """Return what is worth proving: at most one plan of each kind."""
        self._ends = time.perf_counter() + allowed_s(self.work.options.budget_s)
        together = Together(work=self.work, counts=self.measurer.counts, measure_new=self.measure_new)
        best_s = self.best_s
        parts = self.learn(self._parts())
        if self.measure_new:
            self.work.progress.phase("trying copies and pipelines, whose parts run at once")
        found = []
        forced = self.work.min_segments > 1
        if not forced:
            found += self._copies(together, [*self.known, *parts], best_s)
            best_s = min((each.expected.seconds / each.draft.batch for each in found), default=best_s)
        if self.evidence is not None:
            found += self._pipelines(together, self.evidence, parts, None if forced else best_s)
        together.say()
        return found

    def _stop(self) -> bool:
        return self.work.asked() or time.perf_counter() > self._ends

    def _parts(self) -> list[Candidate]:
        """Return candidates on parts of a processor: the best of each target there, and what stages are compiled with."""
        cpus = {str(target): target for target in self.work.targets if parts_of(target)}
        found: dict[str, Candidate] = {}
        least = min((each.seconds / each.candidate.batch for each in self.known), default=math.inf)
        for name, target in cpus.items():
            knobs = self.work.lab.knobs(target)
            mine = [each for each in self.known if each.candidate.target == target]
            best = min(mine, key=lambda each: each.seconds / each.candidate.batch, default=None)
            wanted = []
            if best is not None and best.seconds / best.candidate.batch <= _BEHIND * least and self.work.min_segments == 1:
                wanted += narrowed(best.candidate, knobs)
            near = best is None or best.seconds / best.candidate.batch <= _NO_STAGE * least
            if near and self.evidence is not None and len(cpus) > 1 and name in self.configs and len(self.evidence.structure.blocks) > 1:
                config = with_threads(self.configs[name], knobs, parts_of(target)[0])
                base = self.work.subject.base_batch
                wanted += [] if config is None else [Candidate(target=target, config=config, batch=base)]
            found |= {each.key: each for each in wanted}
        return list(found.values())

    def _copies(self, together: Together, known: Sequence[Known], best_s: float | None) -> list[AtOnce]:
        copier = Copier(
            work=self.work,
            together=together,
            devices={str(target): device_of(target) for target in self.work.targets},
            memory_bytes=memory_of(self.work),
            replicas={str(target): most_replicas(target) for target in self.work.targets},
            stop=self._stop,
        )
        drafts = copier.drafts(known, best_s=best_s)
        if copier.found is None or copier.tried is None:
            self._remember(copier.tried, best_s)
            return []
        because = "what each copy takes alone, and what the copies cost each other, measured in place"
        hoped = Estimate(seconds=1.0 / copier.found.rate_per_s, sigma=_COPIES_SIGMA, source="modelled", because=because)
        whole = Whole(work=self.work, measurer=self.measurer, reference_s=self.reference_s, measure_new=self.measure_new, stop=self._stop)
        found = []
        for draft in drafts:
            seen = whole.expected(draft)
            found += self._worth_proving(AtOnce(draft=draft, expected=seen or hoped), copier.tried, best_s, whole=seen is not None)
        return found

    def _worth_proving(self, found: AtOnce, tried: Tried, best_s: float | None, *, whole: bool) -> list[AtOnce]:
        """Return what was found, unless it was measured whole and is no better than what is known; remember what came of it."""
        seconds = found.expected.seconds / found.draft.batch
        lost = whole and self.work.min_segments == 1 and best_s is not None and seconds > WORTH * best_s
        shown = replace(tried, text=describe(found.draft), promised_per_s=1.0 / seconds, whole=whole)
        self._remember(replace(shown, entrant="") if lost else shown, best_s)
        return [] if lost else [found]

    def _pipelines(self, together: Together, evidence: ChainEvidence, parts: Sequence[Known], best_s: float | None) -> list[AtOnce]:
        """Return the best pipeline of the ways to use a processor: by one of its targets as a whole, or by several, each on its part."""
        base = self.work.subject.base_batch
        room = memory_of(self.work)
        devices = {str(target): device_of(target) for target in self.work.targets}
        found: list[tuple[AtOnce, Tried]] = []
        lost: list[Tried] = []
        for configs, wholes in self._ways(evidence, parts):
            cpus = {str(target) for target in self.work.targets if target.device.kind == "cpu"}
            pipeliner = Pipeliner(
                work=self.work,
                evidence=evidence,
                configs=configs,
                together=together,
                memory_bytes={name: room[devices[name]] for name in configs},
                # A stage has all the cores that it is to have.
                replicas={str(each): most_replicas(each) for each in self.work.targets if str(each) not in cpus},
                wholes=wholes,
                forced=self.work.min_segments > 1,
                stop=self._stop,
            )
            drafts = pipeliner.drafts(uncut_s=None if best_s is None else best_s * base)
            if pipeliner.tried is not None and not drafts:
                lost.append(pipeliner.tried)
            for draft in drafts:
                assert pipeliner.found is not None and pipeliner.tried is not None
                if len(draft.pieces) < self.work.min_segments:
                    continue
                because = "blocks in proportion to the whole, and what the stages cost each other, measured in place"
                expected = Estimate(seconds=pipeliner.found.load_s, sigma=_PIPELINE_SIGMA, source="modelled", because=because)
                found.append((AtOnce(draft=draft, expected=expected), pipeliner.tried))
        if found:
            best, tried = min(found, key=lambda each: each[0].expected.seconds)
            best = self._as_deep_as_is_best(best)
            return self._worth_proving(best, tried, best_s, whole=best.expected.source == "measured")
        self._remember(max(lost, key=lambda each: (not each.hoped, each.promised_per_s), default=None), best_s)
        return []

    def _as_deep_as_is_best(self, found: AtOnce) -> AtOnce:
        """Return the pipeline with as many requests in flight as is best, and what it takes then, where that was measured."""
        draft, score = DepthSearch(work=self.work, measurer=self.measurer, measure_new=self.measure_new, stop=self._stop).best(found.draft)
        if score is None or self.reference_s is None:
            return AtOnce(draft=draft, expected=found.expected)
        seconds = score.ratio * self.reference_s * draft.batch / self.measurer.reference.batch
        sigma = math.log(score.high / score.low) / (2 * 1.96) if 0 < score.low <= score.high else 0.0
        return AtOnce(draft=draft, expected=Estimate(seconds=seconds, sigma=sigma, source="measured", because="the whole pipeline"))

    def _ways(self, evidence: ChainEvidence, parts: Sequence[Known]) -> list[tuple[dict[str, Config], dict[str, float]]]:
        """Return which targets may take part with what configs, and what the whole model takes on a part of a processor."""
        cpus = [str(target) for target in self.work.targets if target.device.kind == "cpu" and str(target) in self.configs]
        if len(cpus) < 2:
            return [(dict(self.configs), {})]
        others = {name: config for name, config in self.configs.items() if name not in cpus}
        last = len(evidence.structure.blocks) - 1
        found: list[tuple[dict[str, Config], dict[str, float]]] = []
        if others:
            wholes = {name: whole.seconds for name in cpus if (whole := evidence.segment(0, last, name)) is not None}
            fastest = min(wholes, key=lambda each: wholes[each], default=cpus[0])
            found.append(({**others, fastest: self.configs[fastest]}, {}))
        narrow = {name: self._on_a_part(name, parts) for name in cpus}
        known = {name: each for name, each in narrow.items() if each is not None}
        if len(known) == len(cpus):
            configs = {name: each.candidate.config for name, each in known.items()}
            found.append(({**others, **configs}, {name: each.seconds for name, each in known.items()}))
        elif not others:  # as they are, where a target cannot be told its threads
            found.append((dict(self.configs), {}))
        return found

    def _on_a_part(self, name: str, parts: Sequence[Known]) -> Known | None:
        """Return the stages' config of a target on the largest part of its processor, as far as it is known."""
        target = next(each for each in self.work.targets if str(each) == name)
        if not parts_of(target):
            return None
        config = with_threads(self.configs[name], self.work.lab.knobs(target), parts_of(target)[0])
        base = self.work.subject.base_batch
        mine = (each for each in parts if each.candidate == Candidate(target=target, config=config or Config(), batch=base))
        return next(mine, None) if config is not None else None

    def _remember(self, tried: Tried | None, best_s: float | None) -> None:
        if tried is not None:
            self.tried.append(replace(tried, best_per_s=None if best_s is None else 1.0 / best_s))
