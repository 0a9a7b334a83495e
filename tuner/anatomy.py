"""Where time goes: every block and every unique operator of the model, on every target, alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aivmm.db.database import Database
from aivmm.errors import AivmmError
from aivmm.models.records import Block
from aivmm.probes import wire
from aivmm.probes.client import WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.compare import cautions
from aivmm.probes.lab import Lab
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.operations import load_arrays, save_arrays
from aivmm.probes.records import Failed, Measured, Outcome, ProbeKey, Refused, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.target import Target
from aivmm.tuner.emit import Emitter
from aivmm.tuner.measure import Counts
from aivmm.tuner.operators import OperatorProber
from aivmm.tuner.subject import Subject

_BLOCK_S = 0.03
_TOLERANCE = 1e-2  # relative L2 of a block against the reference chain: beyond it the runtime computes something else
Tell = Callable[[str, int, int], None]


@dataclass(slots=True)
class Anatomist:
    """Probes the parts of one prepared model at its base batch."""

    lab: Lab
    subject: Subject
    database: Database
    run_id: str | None  # None: what is measured belongs to no run
    targets: Sequence[Target]
    emitter: Emitter
    folder: Path
    counts: Counts
    fresh: bool = False
    retry_failed: bool = False
    measure_new: bool = True  # False: only recall what the database has
    stop: Callable[[], bool] = lambda: False  # True: what is not known yet is skipped
    skipped: int = 0
    _waited: float = 0.0  # for the machine-wide lock: no part of the budget
    _used: list[ProbeKey] = field(default_factory=list)
    found: dict[tuple[int, str], Outcome] = field(default_factory=dict)  # (block, target) -> how it came out
    wrong: dict[tuple[int, str], str] = field(default_factory=dict)  # (block, target) -> what is wrong with its numbers

    def blocks(self, *, budget_s: float, tell: Tell) -> None:
        """Probe each block on each target, until done or out of budget; what came out is in `found` and `wrong`."""
        found = self.found
        wanted = [(block, target, self._block_key(block, target)) for block in self.subject.structure.blocks for target in self.targets]
        known = self._recall(key for _, _, key in wanted)
        edges: list[tuple[Path, Path]] | None = None
        started, self._waited = time.perf_counter(), 0.0
        for number, (block, target, key) in enumerate(wanted):
            tell("blocks", number, len(wanted))
            if key in known:
                found[block.index, str(target)] = self._reuse(known[key])
                continue
            if not self.measure_new or self.stop() or time.perf_counter() - started - self._waited > budget_s:
                self.skipped += 1
                continue
            edges = edges or self._edges()
            if block.index >= len(edges):
                self.skipped += 1  # the reference target refuses a block before this one, so nothing is known to feed it with
                continue
            inputs, reference = edges[block.index]
            model = self.emitter.segment(block.index, block.index).path
            outcome = self._probe(key, target, model, inputs=inputs, reference=reference, seconds=_BLOCK_S)
            found[block.index, str(target)] = outcome
            known[key] = outcome
            self._keep(outcome)
        self._link_reused()
        for (index, name), outcome in list(found.items()):
            problem = self._wrong(outcome)
            if problem:
                self.wrong[index, name] = problem

    def operators(self, *, budget_s: float, tell: Tell) -> None:
        """Probe each unique operator on each target in each native precision, the heaviest first, until done or out of budget."""
        prober = OperatorProber(
            lab=self.lab,
            subject=self.subject,
            database=self.database,
            run_id=self.run_id,
            targets=self.targets,
            folder=self.folder,
            counts=self.counts,
            fresh=self.fresh,
            retry_failed=self.retry_failed,
            measure_new=self.measure_new,
            stop=self.stop,
        )
        prober.run(budget_s=budget_s, tell=tell)
        self.skipped += prober.skipped

    def _edges(self) -> list[tuple[Path, Path]]:
        """Return for each block files with its inputs and its reference outputs, from the chain run on the reference target."""
        prepared = self.subject.at(self.subject.base_batch)
        values: dict[str, Any] = dict(load_arrays(str(prepared.samples[0])))
        name = self.subject.reference_name.partition(" ")[0]
        target = self.subject.target_named(name)
        edges = []
        for block in self.subject.structure.blocks:
            segment = self.emitter.segment(block.index, block.index)
            inputs = self.folder / f"block-{block.index}-inputs.npz"
            outputs = self.folder / f"block-{block.index}-outputs.npz"
            save_arrays(inputs, {each.name: values[each.name] for each in segment.inputs})
            try:
                loaded = self.lab.load(segment.path, target, Config(precision="fp32"), inputs=inputs)
                self.lab.outputs(loaded.contestant, inputs, outputs)
                self.lab.unload(loaded.contestant)
            except (AivmmError, WorkerDied):
                break
            values |= load_arrays(str(outputs))
            edges.append((inputs, outputs))
        return edges

    def _probe(
        self, key: ProbeKey, target: Target, model: Path, *, inputs: Path | None = None, reference: Path | None = None, seconds: float
    ) -> Outcome:
        worker = self.lab.worker(target.runtime)
        for other in self.lab.pids():
            if other != worker.pid:
                wait_until_quiet(other)
        with measuring() as waited:
            self._waited += waited
            try:
                answer = worker.call(
                    "probe",
                    limit_s=compile_limit_s(),
                    run_limit_s=run_limit_s(),
                    model=str(model),
                    target=wire.target_out(target),
                    config=wire.config_out(key.config),
                    inputs=str(inputs or ""),
                    reference=str(reference or ""),
                    seconds=seconds,
                )
            except AivmmError as error:
                return Refused(key=key, reason=error.message)
            except WorkerDied as died:
                return Failed(key=key, reason=died.reason, output=died.output)
        samples = Samples(timed_s=tuple(answer["durations"]))
        metrics = {"compile_s": answer["compile_s"], "first_inference_s": answer["first_inference_s"]}
        judged = self.subject.judged
        metrics |= {f"{name}@{judged}": value for name, value in answer.get("accuracy", {}).items()}
        if answer.get("problem"):
            metrics[f"unusable@{judged}"] = 1.0
        return Measured(
            key=key,
            samples=samples,
            metrics=metrics,
            cautions=cautions(samples),
            effective_config=answer["effective_config"],
            placement=answer["nodes"],
        )

    def _wrong(self, outcome: Outcome) -> str:
        if not isinstance(outcome, Measured):
            return outcome.reason
        if f"unusable@{self.subject.judged}" in outcome.metrics:
            return "its outputs are unusable"
        error = outcome.metrics.get(f"relative_l2@{self.subject.judged}")
        # A block shared with another model was judged on other weights; the proof judges the whole again.
        return f"its outputs differ by {error:.2g}" if error is not None and error > _TOLERANCE else ""

    def _block_key(self, block: Block, target: Target) -> ProbeKey:
        return self._key("segment", f"{block.content}@{self.subject.judged}" if block.data_dependent else block.structure, target)

    def _key(self, kind: Any, subject: str, target: Target) -> ProbeKey:
        return ProbeKey(
            kind=kind,
            subject=subject,
            target=str(target),
            environment=environment_of(target).fingerprint,
            config=Config(precision="fp32"),
            batch=self.subject.base_batch,
        )

    def _recall(self, keys: Iterable[ProbeKey]) -> dict[ProbeKey, Outcome]:
        if self.fresh:
            return {}
        found = self.database.find_many(keys)
        return {key: outcome for key, outcome in found.items() if not (self.retry_failed and isinstance(outcome, Failed))}

    def _reuse(self, outcome: Outcome) -> Outcome:
        self.counts.add(outcome, reused=True)
        self._used.append(outcome.key)
        return outcome

    def _link_reused(self) -> None:
        if self.run_id is not None:
            self.database.link(self.run_id, self._used)
        self._used.clear()

    def _keep(self, outcome: Outcome) -> None:
        self.counts.add(outcome, reused=False)
        self.database.add(outcome, run_id=self.run_id)


def medians(outcomes: Mapping[tuple[int, str], Outcome], wrong: Mapping[tuple[int, str], str]) -> dict[tuple[int, str], float]:
    """Return the median seconds of each block on each target that may run it."""
    return {where: each.samples.median_s for where, each in outcomes.items() if isinstance(each, Measured) and where not in wrong}
