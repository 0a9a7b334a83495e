"""The ways to run one model on a part of the machine: its best settings on each target with one thread, two threads, and so on."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from aivmm.planner.candidates import Candidate, Draft, Score
from aivmm.planner.workload import Option, thread_ladder
from aivmm.runtime.plan import Number
from aivmm.runtime.target import Target
from aivmm.tuner.explore import Explorer
from aivmm.tuner.narrow import threads_of, with_threads
from aivmm.tuner.verdict import describe
from aivmm.tuner.work import Work

_BUDGET_S = 8.0  # for racing what the search has not met
_HOPELESS = 4.0  # a target this many times slower than the best one is no help to share with


@dataclass(slots=True)
class Ladder:
    """Measures the options of one model within its tuning, and writes a bundle for each. `look` is what a session calls."""

    name: str
    folder: Path
    replicas: Sequence[int] = (1,)
    options: list[Option] = field(default_factory=list)
    bundles: dict[str, Path] = field(default_factory=dict)  # by option; replicas of one share a bundle
    texts: dict[str, str] = field(default_factory=dict)  # by option: what people are told
    units: dict[str, int] = field(default_factory=dict)  # of the devices that were met
    proven_s: float = math.inf  # the shortest call that the proof of its tuning timed
    sample: Path = Path()
    reference: Path = Path()

    @property
    def least_s(self) -> float:
        """The shortest call that was ever timed: of any option in a race, or in the proof; 0 where nobody knows of an option."""
        return min(self.proven_s, min((each.least_s for each in self.options), default=0.0))

    def look(self, work: Work, explorer: Explorer) -> None:
        """Measure what is not known yet, and write bundles."""
        known = {candidate.key: score for candidate, score in explorer.search.best(1 << 20)}
        known |= {candidate.key: score for candidate, score in explorer.known.values() if isinstance(score, Score)}
        wanted = [(each, threads) for target in work.targets for each, threads in self._candidates(work, explorer, target)]
        missing = [candidate for candidate, _ in wanted if candidate.key not in known]
        if missing and not work.asked():
            work.progress.phase("measuring parts of the machine")
            found = explorer.measurer.measure(missing, budget_s=_BUDGET_S, tell=work.tell_race, keep=missing)
            known |= {key: score for key, score in found.items() if isinstance(score, Score)}
            explorer.measurer.release()
        scored = [(candidate, threads, known[candidate.key]) for candidate, threads in wanted if candidate.key in known]
        best = min((score.ratio for _, _, score in scored), default=0.0)
        for candidate, threads, score in scored:
            if score.ratio <= _HOPELESS * best * threads_of(candidate.target) / threads:
                self._add(work, explorer, candidate, threads, score)
        self._keep_samples(work)

    def _candidates(self, work: Work, explorer: Explorer, target: Target) -> list[tuple[Candidate, int]]:
        """Return the target's best known settings with each number of threads; on other devices than processors as they are."""
        base = work.subject.base_batch
        alone = [each for each, _ in explorer.search.best(1 << 20) if each.target == target and (each.batch, each.callers) == (base, 1)]
        ran = [each for _, each in explorer.baselines if each.target == target and each.callers == 1]
        best = next(iter([*alone, *ran]), None)
        if best is None:
            return []
        if target.device.kind != "cpu":
            return [(best, 1)]
        knobs = work.lab.knobs(target)
        rungs = [(with_threads(best.config, knobs, threads), threads) for threads in thread_ladder(threads_of(target))]
        return [(replace(best, config=config), threads) for config, threads in rungs if config is not None] or [(best, 1)]

    def _add(self, work: Work, explorer: Explorer, candidate: Candidate, threads: int, score: Score) -> None:
        device = "cpu" if candidate.target.device.kind == "cpu" else candidate.target.device.uid or str(candidate.target)
        units = self.units.setdefault(device, threads_of(candidate.target) if device == "cpu" else 1)
        path = self.folder / f"{len(self.bundles)}.aivmm"
        draft = Draft.whole(self.name, candidate, len(work.subject.structure.blocks))
        expected = {"median_s": Number(value=score.median_s, source="measured")}
        work.emitter(candidate.batch).write(draft, path, objective="latency", expected=expected)
        text, least_s = text_of(draft, explorer.default_precision(candidate.target)), explorer.measurer.least_s(candidate)
        for replicas in self.replicas:
            if threads * replicas > units:
                continue
            option = Option(
                name=f"{candidate.key} x{replicas}",
                model=self.name,
                device=device,
                threads=threads,
                service_s=score.median_s,
                replicas=replicas,
                least_s=least_s,
            )
            self.options.append(option)
            self.bundles[option.name] = path
            self.texts[option.name] = text + (f", {replicas} replicas" if replicas > 1 else "")

    def _keep_samples(self, work: Work) -> None:
        prepared = work.subject.at(work.subject.base_batch)
        self.sample, self.reference = self.folder / "sample.npz", self.folder / "reference.npz"
        shutil.copyfile(prepared.samples[0], self.sample)
        shutil.copyfile(prepared.references[0], self.reference)


def text_of(draft: Draft, default: str | None) -> str:
    """Say what a draft runs, and what its target computes in by default, where nobody asked for a precision and that is not fp32."""
    silent = draft.pieces[0].config.precision is None and default not in (None, "fp32")
    return describe(draft) + (f", {default} by default" if silent else "")
