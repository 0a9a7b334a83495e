"""Plans whose parts run at once, measured whole before they are proven: on the engine, in one race with the search's reference.

What parts were seen to cost each other two by two is what a plan of them may be hoped to reach. What it reaches is measured here as its
proof will measure it, so that what is promised is what is proven, but for what the machine does in between.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from aivmm.errors import AivmmError
from aivmm.planner.candidates import Draft
from aivmm.planner.evidence import Estimate
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.compare import Comparison, cautions, compare
from aivmm.probes.race import Contestant, race
from aivmm.probes.records import Measured, ProbeKey
from aivmm.runtime.environment import environment_of
from aivmm.runtime.null import counts_itself
from aivmm.tuner.measure import Measurer, fresh
from aivmm.tuner.work import Work

_RACE_S = 4.0
_ROUNDS = 20


def load_engine(work: Work, draft: Draft, bundle: Path, workers: ExitStack, *, rate: bool) -> Contestant | None:
    """Write a draft and load it with the engine in a worker of its own, which ends with `workers`; None, and a note, where that fails."""
    work.emitter(draft.batch).write(draft, bundle, objective=work.options.objective)
    worker = Worker(draft.name)
    workers.callback(worker.close)
    sample = work.subject.at(draft.batch).samples[0]
    try:
        answer = worker.call(
            "load_bundle", limit_s=compile_limit_s(), run_limit_s=run_limit_s(), name="engine", bundle=str(bundle), inputs=str(sample)
        )
    except (WorkerDied, AivmmError) as error:
        work.note(f"{draft.name} could not be measured: {error.reason if isinstance(error, WorkerDied) else error.message}")
        return None
    return Contestant("engine", worker, batch=draft.batch, callers=draft.callers, expected_s=answer["first_inference_s"], rate=rate)


@dataclass(slots=True)
class Whole:
    """Measures a draft of one piece in several places. What an earlier run measured is reused; with `measure_new` False nothing else is."""

    work: Work
    measurer: Measurer
    reference_s: float | None  # what a call of the reference took in the search
    measure_new: bool = True
    stop: Callable[[], bool] = lambda: False

    def expected(self, draft: Draft) -> Estimate | None:
        """Return the seconds from one answered request of the draft to the next, where the reference takes what it took in the search.

        None where it was not measured: it does not load, there is no time, or its devices are made of arithmetic.
        """
        if counts_itself(draft.all_targets) or self.reference_s is None:
            return None
        seen = self._seen(draft)
        if seen is None:
            return None
        seconds = seen.ratio * self.reference_s * draft.batch / self.measurer.reference.batch
        sigma = math.log(seen.high / seen.low) / (2 * 1.96) if 0 < seen.low <= seen.high else 0.0
        return Estimate(seconds=seconds, sigma=sigma, source="measured", because="all copies at once")

    def _seen(self, draft: Draft) -> Comparison | None:
        mine, beside = self._keys(draft)
        known = {} if self.work.options.fresh else self.work.database.find_many([mine, beside])
        found = {key: each for key, each in known.items() if isinstance(each, Measured)}
        if len(found) == 2 and found[mine].race == found[beside].race:
            self.measurer.counts.reused += 2
            self.work.database.link(self.work.run_id, list(found))
        elif not self.measure_new or self.stop():
            return None
        else:
            found = self._raced(draft, mine, beside)
        if len(found) < 2:
            return None
        return compare(found[mine].samples, found[beside].samples, scale=self.measurer.reference.batch / draft.batch, by=self.measurer.by)

    def _raced(self, draft: Draft, mine: ProbeKey, beside: ProbeKey) -> dict[ProbeKey, Measured]:
        reference = self.measurer.load_reference()
        if reference is None:
            return {}
        self.work.progress.detail("measuring all copies at once")
        rival = fresh(reference, rate=self.measurer.rate)
        rival.keep = True
        with ExitStack() as workers:
            bundle = self.work.folder / f"whole-{mine.subject[-16:]}.aivmm"
            contestant = load_engine(self.work, draft, bundle, workers, rate=self.measurer.rate)
            if contestant is None:
                return {}
            contestant.keep = True
            # As many rounds as the proof has: this is to say what that will say.
            race([rival, contestant], budget_s=_RACE_S, seed=self.work.options.seed, stop=self.stop, enough=lambda done: done >= _ROUNDS)
        samples = {mine: contestant.samples(), beside: rival.samples()}
        name = f"{self.work.run_id} {mine.subject}"
        seen = {key: each for key, each in samples.items() if each is not None}
        found = {key: Measured(key=key, samples=each, cautions=cautions(each), race=name) for key, each in seen.items()}
        if len(found) < 2 or contestant.failed is not None or rival.failed is not None:
            return {}
        self.work.database.add_many(found.values(), run_id=self.work.run_id)
        self.measurer.counts.measured += len(found)
        return found

    def _keys(self, draft: Draft) -> tuple[ProbeKey, ProbeKey]:
        """Return what the draft, and the reference beside it, are known by."""
        (piece,) = draft.pieces
        places = [
            f"{environment_of(each.target).fingerprint} {each.config.digest()} x{each.replicas} of {each.weight:g}"
            for each in piece.everywhere()
        ]
        how = [
            *places,
            f"{draft.callers} callers",
            self.measurer.reference.key,
            f"{self.measurer.rate}",
            self.work.subject.subject_of(draft.lowered),
        ]
        digest = hashlib.sha256("\n".join(how).encode()).hexdigest()[:16]

        def key(what: str, callers: int) -> ProbeKey:
            return ProbeKey(
                kind="segment",
                subject=f"{what} {digest}",
                target=str(piece.target),
                environment=environment_of(piece.target).fingerprint,
                config=piece.config,
                batch=draft.batch,
                callers=callers,
            )

        return key("copies at once", draft.callers), key("beside copies", self.measurer.reference.callers)
