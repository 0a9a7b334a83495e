"""Plans whose parts run at once, for throughput: pipelines and copies, each with what it promises. Only their proof accepts them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aivmm.planner.candidates import Draft
from aivmm.planner.evidence import Estimate
from aivmm.planner.partition import ChainEvidence
from aivmm.planner.placement import device_of
from aivmm.runtime.config import Config
from aivmm.tuner.copying import Copier, Known
from aivmm.tuner.depths import DepthSearch
from aivmm.tuner.measure import Measurer
from aivmm.tuner.pipelining import Pipeliner
from aivmm.tuner.room import memory_of, most_replicas
from aivmm.tuner.together import Together
from aivmm.tuner.work import Work

_PIPELINE_SIGMA, _COPIES_SIGMA = 0.2, 0.1  # relative: blocks in proportion to the whole, or the whole itself, and factors of pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class AtOnce:
    """A draft whose parts run at once. `expected` is the time from one answered request to the next."""

    draft: Draft
    expected: Estimate


def at_once(
    work: Work,
    measurer: Measurer,
    *,
    evidence: ChainEvidence | None,
    configs: Mapping[str, Config],
    known: Sequence[Known],
    reference_s: float | None,
    measure_new: bool,
) -> list[AtOnce]:
    """Return the pipelined and the replicated plan that promise to beat all that is known, as far as there are such plans.

    `configs` are what stages of a cut model are compiled with; `known` what the search knows of whole models, kept busy, where a call of
    the reference takes `reference_s`. Memory is that of the devices, and of the user's own limits: what has no room is not considered.
    """
    together = Together(work=work, counts=measurer.counts, measure_new=measure_new)
    room = memory_of(work)
    replicas = {str(target): most_replicas(target) for target in work.targets}
    best_s = min((each.seconds / each.candidate.batch for each in known), default=None)
    found = []
    devices = {str(target): device_of(target) for target in work.targets}
    copier = Copier(work=work, together=together, devices=devices, memory_bytes=room, replicas=replicas)
    for draft in copier.drafts(known, best_s=best_s):
        assert copier.found is not None
        because = "what each copy takes alone, and what the copies cost each other, measured in place"
        seconds = 1.0 / copier.found.rate_per_s
        found.append(AtOnce(draft=draft, expected=Estimate(seconds=seconds, sigma=_COPIES_SIGMA, source="modelled", because=because)))
        best_s = min(math.inf if best_s is None else best_s, seconds / draft.batch)
    if evidence is not None:
        base = work.subject.base_batch
        by_target = {name: room[devices[name]] for name in configs}
        pipeliner = Pipeliner(work=work, evidence=evidence, configs=configs, together=together, memory_bytes=by_target, replicas=replicas)
        for draft in pipeliner.drafts(uncut_s=None if best_s is None else best_s * base):
            assert pipeliner.found is not None
            because = "blocks in proportion to the whole, and what the stages cost each other, measured in place"
            expected = Estimate(seconds=pipeliner.found.load_s, sigma=_PIPELINE_SIGMA, source="modelled", because=because)
            deep, score = DepthSearch(work=work, measurer=measurer, measure_new=measure_new).best(draft)
            if score is not None and reference_s is not None:
                seconds = score.ratio * reference_s * draft.batch / measurer.reference.batch
                sigma = math.log(score.high / score.low) / (2 * 1.96) if 0 < score.low <= score.high else 0.0
                expected = Estimate(seconds=seconds, sigma=sigma, source="measured", because="the whole pipeline")
            found.append(AtOnce(draft=deep, expected=expected))
    together.say()
    return found
