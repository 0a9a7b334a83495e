"""Every unique operator of the model, alone, on every target in its native precisions; and the ceilings they are held against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aivmm.db.database import Database
from aivmm.errors import AivmmError, Unsupported
from aivmm.models.records import Operator
from aivmm.probes import wire
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.ceilings import Ceiling, Ceilings, call_ceiling, copy_ceilings, grows, matmul_ceiling, rates
from aivmm.probes.client import WorkerDied, WorkerLate
from aivmm.probes.compare import cautions
from aivmm.probes.lab import Lab
from aivmm.probes.machine import measuring
from aivmm.probes.records import Failed, Measured, Outcome, ProbeKey, Refused, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.target import Target
from aivmm.tuner.measure import Counts
from aivmm.tuner.subject import Subject

if TYPE_CHECKING:
    from aivmm.models.operators import OperatorModels

OPERATOR_S = 0.005  # how long one is timed, after its warm-up
_LIMIT_S = 120.0  # for one operator; a batch that takes as long is tried again one by one
_MARGIN_S = 10.0  # beyond the budget: what was begun within it may still compile, and one that is slow run once
_BATCH = 32  # operators a request: enough that round trips, waits for threads that spin and commits do not matter, few enough to lose
_BATCH_BYTES = 256 << 20  # what their tensors may take together,
_BATCH_FLOPS = 8e9  # and what they may compute in a run: each runs ten times or so, and a budget is looked at between batches
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One operator to be probed: where, how, and what is known of its work."""

    key: ProbeKey
    target: Target
    path: Path
    values: Path | None = None
    flops: float | None = None
    bytes: float | None = None


@dataclass(slots=True)
class OperatorProber:
    """Probes the operators of one prepared model at its base batch. Everything is stored at once in small batches, and found again."""

    lab: Lab
    subject: Subject
    database: Database
    run_id: str | None
    targets: Sequence[Target]
    folder: Path
    counts: Counts
    fresh: bool = False
    retry_failed: bool = False
    measure_new: bool = True  # False: only recall what the database has
    stop: Callable[[], bool] = lambda: False  # True: what is not known yet is skipped
    skipped: int = 0
    found: dict[tuple[str, str, str], Outcome] = field(default_factory=dict)  # (signature, target, precision) -> how it came out
    ceilings: dict[tuple[str, str], Ceilings] = field(default_factory=dict)  # (target, precision) -> its limits
    _known: dict[ProbeKey, Outcome] = field(default_factory=dict)
    _used: list[ProbeKey] = field(default_factory=list)
    _ends: float = math.inf
    _values: dict[str, Any] | None = None

    def run(self, *, budget_s: float, tell: Tell) -> None:
        """Probe until done or out of budget: the first precision of each target before further ones, in each the heaviest operators first.

        Ceilings come before the operators that are held against them.
        """
        self._ends = time.perf_counter() + budget_s
        operators = sorted(self.subject.structure.operators, key=lambda each: -(each.flops or 0.0) * each.count)
        passes = [
            [(target, target.precisions[rank]) for target in self.targets if rank < len(target.precisions)]
            for rank in range(max((len(target.precisions) for target in self.targets), default=0))
        ]
        self._recall(operators, [place for places in passes for place in places])
        models: OperatorModels | None = None
        done, total = 0, len(operators) * sum(map(len, passes))
        try:
            for places in passes:
                for target, precision in places:
                    self._measure_ceilings(target, precision)
                for batch in _batches(operators):
                    tell("operators", done, total)
                    done += len(batch) * len(places)
                    new = self._new(batch, places)
                    if not new:
                        continue
                    if not self._may_measure():
                        self.skipped += len(new)
                        continue
                    models = models or _operator_models(self.subject.path)
                    self._probe_batch(models, batch, new)
        finally:
            if models is not None:
                models.close()
            self._link_reused()

    # --- what is known, and what is not

    def _recall(self, operators: Sequence[Operator], places: Sequence[tuple[Target, str]]) -> None:
        wanted = {
            self._operator_key(operator, target, precision): (operator.signature, str(target), precision)
            for operator in operators
            for target, precision in places
        }
        if not self.fresh:
            found = self.database.find_many([*wanted, *(key for place in places for key in self._ceiling_keys(*place))])
            self._known = {key: each for key, each in found.items() if not (self.retry_failed and isinstance(each, Failed))}
        for key, where in wanted.items():
            if key in self._known:
                self.found[where] = self._reuse(self._known[key])

    def _new(self, batch: Sequence[Operator], places: Sequence[tuple[Target, str]]) -> list[tuple[Operator, Target, str]]:
        return [
            (operator, target, precision)
            for target, precision in places
            for operator in batch
            if (operator.signature, str(target), precision) not in self.found
        ]

    def _may_measure(self) -> bool:
        return self.measure_new and not self.stop() and time.perf_counter() < self._ends

    def _patience_s(self) -> float:
        return max(0.0, self._ends - time.perf_counter()) + _MARGIN_S

    # --- ceilings

    def _measure_ceilings(self, target: Target, precision: str) -> None:
        """Have the ceilings of a target in a precision, from the database or measured now."""
        fixed = [call_ceiling(), *copy_ceilings()]
        outcomes = self._ceiling_outcomes(fixed, target, precision)
        products: list[tuple[int, Outcome]] = []
        while (size := grows(products)) is not None:
            answer = self._ceiling_outcomes([matmul_ceiling(size)], target, precision)
            if not answer:
                break  # out of budget
            products.append((size, answer[0]))
        ceilings = Ceilings.of([*outcomes, *(each for _, each in products)])
        if ceilings is not None:
            self.ceilings[str(target), precision] = ceilings

    def _ceiling_outcomes(self, wanted: Sequence[Ceiling], target: Target, precision: str) -> list[Outcome]:
        keys = {self._key(each.subject, target, precision): each for each in wanted}
        outcomes = [self._reuse(self._known[key]) for key in keys if key in self._known]
        jobs = []
        for number, (key, ceiling) in enumerate(keys.items()):
            if key in self._known or not self._may_measure():
                continue
            path = self.folder / f"ceiling-{number}.onnx"
            path.write_bytes(ceiling.model())
            jobs.append(_Job(key=key, target=target, path=path, flops=ceiling.flops, bytes=ceiling.bytes))
        measured = self._store(self._probe(jobs)) if jobs else []
        for job in jobs:
            job.path.unlink()
        return [*outcomes, *measured]

    def _ceiling_keys(self, target: Target, precision: str) -> Iterator[ProbeKey]:
        from aivmm.probes.ceilings import MATMUL_SIZES

        for each in (call_ceiling(), *copy_ceilings(), *map(matmul_ceiling, MATMUL_SIZES)):
            yield self._key(each.subject, target, precision)

    # --- operators

    def _probe_batch(self, models: OperatorModels, batch: Sequence[Operator], new: Sequence[tuple[Operator, Target, str]]) -> None:
        """Probe what is new of a batch, target by target, so that workers take turns no more often than they must."""
        built = {operator.signature: self._build(models, operator) for operator in batch if any(operator is each for each, _, _ in new)}
        try:
            for place in dict.fromkeys((target, precision) for _, target, precision in new):
                mine = [operator for operator, target, precision in new if (target, precision) == place]
                if not self._may_measure():
                    self.skipped += len(mine)
                    continue
                jobs: list[_Job] = []
                outcomes: list[Outcome] = []
                for operator in mine:
                    key, model = self._operator_key(operator, *place), built[operator.signature]
                    if isinstance(model, str):
                        outcomes.append(Refused(key=key, reason=model))
                    else:
                        path, values = model
                        jobs.append(_Job(key=key, target=place[0], path=path, values=values, flops=operator.flops, bytes=operator.bytes))
                outcomes += self._probe(jobs)
                self._store(outcomes)
                by_key = {each.key: each for each in outcomes}
                for operator in mine:
                    outcome = by_key.get(self._operator_key(operator, *place))
                    if outcome is None:
                        self.skipped += 1
                    else:
                        self.found[operator.signature, str(place[0]), place[1]] = outcome
        finally:
            written = [each for each in built.values() if not isinstance(each, str)]
            for file in (file for files in written for file in files if file is not None):
                file.unlink()

    def _build(self, models: OperatorModels, operator: Operator) -> tuple[Path, Path | None] | str:
        """Write the operator's model and, where it needs some, values; return both files, or why it cannot stand alone."""
        path = self.folder / f"operator-{operator.signature[:32]}.onnx"
        try:
            path.write_bytes(models.build(operator.signature))
        except Unsupported as error:
            return error.message
        needed = models.values_needed(operator.signature)
        known = self._tensor_values(models) if needed else {}
        mine = {name: known[tensor] for name, tensor in needed.items() if tensor in known}
        values = path.with_suffix(".npz") if mine else None
        if values is not None:
            save_arrays(values, mine)
        return path, values

    def _tensor_values(self, models: OperatorModels) -> dict[str, Any]:
        """Return the values that tensors have inside the whole model, from one run on the reference target; nothing where that fails."""
        if self._values is None:
            self._values = {}
            names = dict.fromkeys(tensor for signature in models.signatures for tensor in models.values_needed(signature).values())
            target = self.subject.target_named(self.subject.reference_name.partition(" ")[0])
            sample = self.subject.at(self.subject.base_batch).samples[0]
            destination = self.folder / "tensor-values.npz"
            try:
                self.lab.worker(target.runtime).call(
                    "tensor_values",
                    limit_s=_LIMIT_S,
                    patience_s=self._patience_s(),
                    model=str(self.subject.path),
                    target=wire.target_out(target),
                    config=wire.config_out(Config(precision="fp32" if "fp32" in target.precisions else None)),
                    inputs=str(sample),
                    names=list(names),
                    destination=str(destination),
                )
                self._values = dict(load_arrays(str(destination)))
            except (AivmmError, WorkerDied):
                pass  # operators are then fed with what can be made up, and say themselves when they cannot work with that
        return self._values

    def _probe(self, jobs: Sequence[_Job]) -> list[Outcome]:
        """Probe operators on one target in one request.

        What a crash leaves open is tried again one by one, so that it costs one probe; a hang each time, so only within the budget. What
        would run beyond the budget has no outcome, nor has what was stopped there: it may hang, or only be slow.
        """
        if not jobs:
            return []
        first = jobs[0]
        worker = self.lab.worker(first.target.runtime)
        self.lab.wait_for_others(worker)
        with measuring() as waited:
            self._ends += waited  # for the machine-wide lock: no part of the budget
            try:
                answer = worker.call(
                    "probe_operators",
                    limit_s=_LIMIT_S,
                    run_limit_s=_LIMIT_S,
                    patience_s=self._patience_s(),
                    models=[{"path": str(job.path), "values": str(job.values or "")} for job in jobs],
                    target=wire.target_out(first.target),
                    config=wire.config_out(first.key.config),
                    seconds=OPERATOR_S,
                    within_s=max(0.0, self._ends - time.perf_counter()),
                )
            except WorkerLate:
                return []
            except WorkerDied as died:
                if len(jobs) == 1:
                    return [Failed(key=first.key, reason=died.reason, output=died.output)]
                answer = None
        if answer is None:
            return [outcome for job in jobs if self._may_measure() for outcome in self._probe([job])]
        return [self._outcome(job, each) for job, each in zip(jobs, answer["answers"], strict=True) if "late" not in each]

    def _outcome(self, job: _Job, answer: dict[str, Any]) -> Outcome:
        if "refused" in answer:
            return Refused(key=job.key, reason=answer["refused"])
        samples = Samples(timed_s=tuple(answer["durations"]))
        metrics = {"compile_s": answer["compile_s"], "first_inference_s": answer["first_inference_s"]}
        metrics |= rates(samples.median_s, job.flops, job.bytes)
        ceilings = self.ceilings.get((job.key.target, job.key.config.precision or ""))
        roofline = ceilings.roofline(seconds=samples.median_s, flops=job.flops, moved_bytes=job.bytes) if ceilings else None
        return Measured(
            key=job.key,
            samples=samples,
            metrics=metrics | (roofline.metrics() if roofline else {}),
            cautions=cautions(samples),
            effective_config=answer["effective_config"],
            placement=answer["nodes"],
        )

    # --- keys and rows

    def _operator_key(self, operator: Operator, target: Target, precision: str) -> ProbeKey:
        subject = f"{operator.signature}@{self.subject.judged}" if operator.data_dependent else operator.signature
        return self._key(subject, target, precision, batch=self.subject.base_batch)

    def _key(self, subject: str, target: Target, precision: str, *, batch: int = 1) -> ProbeKey:
        return ProbeKey(
            kind="operator",
            subject=subject,
            target=str(target),
            environment=environment_of(target).fingerprint,
            config=Config(precision=precision),
            batch=batch,
        )

    def _reuse(self, outcome: Outcome) -> Outcome:
        self.counts.add(outcome, reused=True)
        self._used.append(outcome.key)
        return outcome

    def _link_reused(self) -> None:
        if self.run_id is not None:
            self.database.link(self.run_id, self._used)
        self._used.clear()

    def _store(self, outcomes: list[Outcome]) -> list[Outcome]:
        for outcome in outcomes:
            self.counts.add(outcome, reused=False)
            self._known[outcome.key] = outcome
        self.database.add_many(outcomes, run_id=self.run_id)
        return outcomes


def _operator_models(path: Path) -> OperatorModels:
    from aivmm.models.operators import OperatorModels  # here: it loads onnx_ir, a second before the first line is shown

    return OperatorModels(path)


def _batches(operators: Iterable[Operator]) -> Iterator[list[Operator]]:
    """Yield runs of operators that are probed together."""
    batch: list[Operator] = []
    size, flops = 0, 0.0
    for operator in operators:
        larger, more = size + (operator.bytes or 0), flops + (operator.flops or 0.0)
        if batch and (len(batch) == _BATCH or larger > _BATCH_BYTES or more > _BATCH_FLOPS):
            yield batch
            batch, size, flops = [], 0, 0.0
        batch.append(operator)
        size += operator.bytes or 0
        flops += operator.flops or 0.0
    if batch:
        yield batch
